/**
 * aembit-auth: log an AWS workload in to Aembit, without the AWS SDK and without dependencies.
 *
 * A workload on EC2, ECS, Fargate, EKS or Lambda holds temporary role credentials. This file
 * turns them into an Aembit access token, and that token into the credential the workload needs:
 *
 *   1. find AWS credentials: environment, web identity (EKS IRSA), container endpoint, IMDSv2
 *   2. find the region, and on ECS the container and task metadata
 *   3. sign an STS GetCallerIdentity request with Signature Version 4, and do NOT send it to STS
 *   4. POST the signed headers to https://{tenant}.ec.{stack}.aembit.io/edge/v1/auth
 *   5. Aembit replays them to STS, learns the role, and answers with a bearer token
 *   6. POST /edge/v1/credentials with that token returns the credential of a Server Workload
 *
 * Sections, in the order the bytes flow:
 *
 *    1. Types                      8. Signature Version 4
 *    2. Errors                     9. Answers of Aembit
 *    3. One exchange              10. One HTTP request
 *    4. A client to leave running 11. Deadlines and shared work
 *    5. Options and environment   12. Text and secrets
 *    6. AWS credentials           13. Command line
 *    7. Region and metadata       14. Doctor
 *
 * What a reviewer may hold this file to:
 *
 *   - It talks to AWS metadata endpoints, to STS for web identity only, and to one Aembit origin.
 *     It follows no redirect, and a metadata request never passes through a proxy.
 *   - The signed request is a bearer secret for about 15 minutes: it goes to Aembit over TLS and
 *     nowhere else, and is never logged.
 *   - Keys and tokens are read by property only. Printing, inspecting or serialising what this
 *     file returns or throws does not show them, whatever a server answered.
 *   - Nothing falls through to another identity: a source that is configured but fails is an error.
 *   - Every wait has an end. Importing the file does nothing at all.
 *
 * As a library:   const { accessToken } = await authenticate({ clientId: "aembit:…" });
 * As a command:   node --experimental-strip-types aembit-auth.ts token --client-id aembit:…
 *
 * @module
 */

import { createHash, createHmac } from "node:crypto";

/** The version of this file; package.json and `--version` say the same. */
export const VERSION = "1.0.0";

// --- 1. Types ---
// What goes in and what comes out. Everything here is erased when the file runs.

/** What {@link authenticate} and the others accept. The option wins over its variable. */
export interface AembitAuthOptions {
  /**
   * Edge SDK Client ID of the Trust Provider, `aembit:{stack}:{tenant}:identity:{type}:{uuid}`;
   * `AEMBIT_CLIENT_ID`. Required for everything that addresses Aembit.
   */
  readonly clientId?: string | undefined;
  /** Origin of the Edge API; `AEMBIT_EDGE_BASE_URL`; by default derived from the client ID. */
  readonly edgeUrl?: string | undefined;
  /** Resource Set, sent as `X-Aembit-ResourceSet`; `AEMBIT_RESOURCE_SET_ID`. */
  readonly resourceSetId?: string | undefined;
  /** Client Workload, sent as `os.environment.CLIENT_WORKLOAD_ID`; `CLIENT_WORKLOAD_ID`. */
  readonly clientWorkloadId?: string | undefined;
  /**
   * AWS region of the signature; `AWS_REGION`, `AWS_DEFAULT_REGION`; then the ARN of the ECS task,
   * then IMDS. There is no default region: a guess would sign for the wrong partition.
   */
  readonly region?: string | undefined;
  /** AWS credentials, or a function that returns them: any AWS SDK provider. Skips discovery. */
  readonly credentials?: AwsCredentials | AwsCredentialsProvider | undefined;
  /** Where to look for credentials. `auto` (default): env, web-identity, ecs, imds. */
  readonly source?: "auto" | CredentialSource | undefined;
  /**
   * `auto` (default): sent on ECS, a warning when unreadable. `require`: an error instead.
   * `omit`: not sent.
   */
  readonly ecsMetadata?: "auto" | "require" | "omit" | undefined;
  /** ARN of the running Lambda function (`context.invokedFunctionArn`), sent as `lambda.arn`. */
  readonly lambdaArn?: string | undefined;
  /** Add the EC2 instance identity document for an AWS Metadata Service Trust Provider. */
  readonly instanceIdentity?: boolean | undefined;
  /** Deadline of one whole call in milliseconds. Default 30 000. */
  readonly timeoutMs?: number | undefined;
  /** Tries of one HTTP request, the first included. Default 3. */
  readonly maxAttempts?: number | undefined;
  /** Abandons the call, which then rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
  /** Replaces `globalThis.fetch`, for tests and custom transports. */
  readonly fetch?: typeof globalThis.fetch | undefined;
  /** Replaces `process.env`. Read at each call: Lambda and tests change it. */
  readonly env?: Readonly<Record<string, string | undefined>> | undefined;
  /** Wall clock in milliseconds since 1970. Default `Date.now`. */
  readonly now?: (() => number) | undefined;
  /** Receives one line of text at a time, without secrets. Default: silence. */
  readonly logger?: AembitLogger | undefined;
}

/** Any logger with these two methods will do: `console`, pino, winston. */
export interface AembitLogger {
  debug(line: string): void;
  warn(line: string): void;
}

/** Where AWS credentials come from, in the order `auto` tries them. */
export type CredentialSource = "env" | "web-identity" | "ecs" | "imds";

/** Temporary role credentials, in the shape the AWS SDK for JavaScript uses. */
export interface AwsCredentials {
  readonly accessKeyId: string;
  /** Hidden from printing and JSON when this file returned it. */
  readonly secretAccessKey: string;
  /** Hidden likewise; absent for keys of an IAM user. */
  readonly sessionToken?: string | undefined;
  readonly expiration?: Date | undefined;
}

/** A function that returns credentials, such as `fromNodeProviderChain()`. */
export type AwsCredentialsProvider = () => AwsCredentials | Promise<AwsCredentials>;

/** A bearer token of Aembit. */
export interface AembitToken {
  /** Hidden from printing and JSON. */
  readonly accessToken: string;
  readonly tokenType: string;
  /** Lifetime in seconds, as Aembit said when it issued the token. */
  readonly expiresIn: number;
  readonly expiresAt: Date;
}

/** Names the Server Workload whose credential is wanted. */
export interface AembitCredentialsRequest {
  readonly host: string;
  readonly port: number;
  readonly credentialType:
    | "ApiKey"
    | "UsernamePassword"
    | "OAuthToken"
    | "GoogleWorkloadIdentityFederation"
    | "AwsStsFederation"
    | (string & {});
  readonly connectionMetadata?: Readonly<Record<string, string>> | undefined;
}

/** The credential of a Server Workload. */
export interface AembitCredentials {
  readonly credentialType: string;
  /** `null`: the credential does not expire. */
  readonly expiresAt: Date | null;
  /** By type: `apiKey`; `username`, `password`; `token`; `awsAccessKeyId`, … Values are hidden. */
  readonly data: Readonly<Record<string, unknown>>;
}

/** What one call of a long-running client may ask for. */
export interface CallOptions {
  /** Ends this caller's wait only; others that share the exchange go on. */
  readonly signal?: AbortSignal | undefined;
}

/** As {@link CallOptions}, for a token. */
export interface TokenOptions extends CallOptions {
  /** Ask Aembit even if a live token is held. */
  readonly forceRefresh?: boolean | undefined;
}

/** Base64 of the two ECS task metadata documents, byte for byte as the agent sent them. */
export interface EcsMetadata {
  readonly containerMetadata: string;
  readonly taskMetadata: string;
}

/** The headers of a signed `GetCallerIdentity`, and the region whose STS they are for. */
export interface StsGetCallerIdentity {
  readonly headers: {
    readonly "Content-Type": string;
    readonly "X-Amz-Date": string;
    readonly "X-Amz-Security-Token"?: string;
    readonly Authorization: string;
  };
  readonly region: string;
}

/** Body of `POST /edge/v1/auth`. A secret: whoever holds it is this workload for 15 minutes. */
export interface AuthRequest {
  readonly clientId: string;
  readonly client: ClientAttestation;
}

/** What both Edge endpoints accept as proof of who asks. */
export interface ClientAttestation {
  readonly aws: {
    readonly stsGetCallerIdentity: StsGetCallerIdentity;
    readonly ecs?: EcsMetadata;
    readonly lambda?: { readonly arn: string };
    readonly instanceIdentityDocument?: string;
    readonly instanceIdentityDocumentSignature?: string;
  };
  readonly os?: { readonly environment: { readonly CLIENT_WORKLOAD_ID: string } };
}

/** A request to sign for any AWS service. */
export interface SignableRequest {
  readonly method: string;
  /** Raw request target, `?query` included. */
  readonly path: string;
  /** All of them are signed; put `Host` among them, as AWS requires. */
  readonly headers: Iterable<readonly [name: string, value: string]>;
  readonly body?: string | Uint8Array | undefined;
}

/** With what, for where and when to sign. */
export interface SigningContext {
  readonly credentials: AwsCredentials;
  readonly region: string;
  readonly service: string;
  readonly date: Date;
  /** Remove dot segments and doubled slashes. Default true; S3 wants false. */
  readonly normalizePath?: boolean | undefined;
}

/** Every artefact of Signature Version 4, and the headers to add to the request. */
export interface SignedRequest {
  readonly canonicalRequest: string;
  readonly stringToSign: string;
  readonly signature: string;
  readonly authorization: string;
  /** `X-Amz-Date`, `X-Amz-Security-Token` with a session token, `Authorization`. */
  readonly headers: Record<string, string>;
}

// --- 2. Errors ---
// One class and a closed list of codes. Branch on `code`; the message is for people.

/** Why a call failed. */
export type AembitAuthErrorCode =
  | "invalid_config"
  | "no_aws_credentials"
  | "invalid_aws_credentials"
  | "metadata_unavailable"
  | "no_region"
  | "edge_rejected"
  | "no_matching_policy"
  | "edge_unavailable"
  | "invalid_edge_response"
  | "timeout";

/** Exit status of the command for each code, and whether the same call may succeed later. */
const ERRORS: Readonly<Record<AembitAuthErrorCode, readonly [exit: number, retryable?: true]>> = {
  invalid_config: [2],
  no_aws_credentials: [3],
  invalid_aws_credentials: [3],
  metadata_unavailable: [3, true],
  no_region: [3],
  edge_rejected: [4],
  no_matching_policy: [4],
  edge_unavailable: [5, true],
  invalid_edge_response: [5],
  timeout: [5, true],
};

/** Facts that go with an {@link AembitAuthError}. */
export interface AembitAuthErrorDetails {
  readonly status?: number | undefined;
  readonly attempts?: number | undefined;
  readonly retryable?: boolean | undefined;
  readonly cause?: unknown;
}

/**
 * The one error this file throws, but for an abort, which rejects with `signal.reason`.
 *
 * `status` is the HTTP status Aembit or a metadata service gave, `attempts` the number of tries,
 * `retryable` whether the same call may succeed later. `cause` is a system error without bodies,
 * headers or URLs: the runtimes' own errors quote all three.
 */
export class AembitAuthError extends Error {
  static {
    // On the prototype, so that it survives minifiers and is not repeated in each inspection.
    Object.defineProperty(this.prototype, "name", { value: "AembitAuthError" });
  }
  readonly code: AembitAuthErrorCode;
  readonly status?: number;
  readonly retryable: boolean;
  readonly attempts?: number;

  constructor(code: AembitAuthErrorCode, message: string, details: AembitAuthErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.retryable = details.retryable ?? ERRORS[code][1] ?? false;
    if (details.status !== undefined) this.status = details.status;
    if (details.attempts !== undefined) this.attempts = details.attempts;
  }
}

/** What is not so is the caller's own mistake: in an option, a variable, a flag or a URL. */
function assertConfig(right: unknown, message: string): asserts right {
  if (!right) throw new AembitAuthError("invalid_config", message);
}

// --- 3. One exchange ---
// The whole story in three steps: gather the evidence, sign it late, post it once.

/**
 * Logs the workload in: one exchange, nothing kept. For a process that lives longer than one
 * token, use {@link AembitAuth}.
 *
 * @throws {AembitAuthError} with any code but `no_matching_policy`
 * @see https://docs.aembit.io/api-guide/edge/endpoints/auth
 */
export async function authenticate(options?: AembitAuthOptions): Promise<AembitToken> {
  return runCall(options, newMemory(), exchange);
}

/**
 * The body of `POST /edge/v1/auth`, signed now and not sent. Plain data, and a secret: whoever
 * has it is this workload for about 15 minutes.
 *
 * @throws {AembitAuthError} when there are no credentials or no region
 */
export async function createAuthRequest(options?: AembitAuthOptions): Promise<AuthRequest> {
  return runCall(options, newMemory(), async (call) => {
    const { clientId } = readEdge(call);
    return { clientId, client: attest(call, await gatherEvidence(call)) };
  });
}

/** Finds AWS credentials as {@link authenticate} would. Key and token are hidden in the result. */
export async function loadAwsCredentials(options?: AembitAuthOptions): Promise<AwsCredentials> {
  return runCall(options, newMemory(), findCredentials);
}

/** Finds the region as {@link authenticate} would. */
export async function resolveRegion(options?: AembitAuthOptions): Promise<string> {
  return runCall(options, newMemory(), findRegion);
}

/** Reads the container and task metadata of ECS. Off ECS it is `invalid_config`. */
export async function readEcsMetadata(options?: AembitAuthOptions): Promise<EcsMetadata> {
  return runCall(options, newMemory(), fetchEcsMetadata);
}

/**
 * The origin that a client ID stands for: `https://{tenant}.ec.{stack}.aembit.io`.
 *
 * @throws {AembitAuthError} `invalid_config` for anything that is not an Edge SDK Client ID
 */
export function edgeUrlFromClientId(clientId: string): string {
  return originOfClientId(clientId);
}

/** One exchange within a call: nothing is sent before the whole configuration has been read. */
async function exchange(call: Call): Promise<AembitToken> {
  const { clientId, origin } = readEdge(call);
  const evidence = await gatherEvidence(call);
  const reply = await postSigned(call, {
    what: "exchange",
    url: `${origin}/edge/v1/auth`,
    headers: edgeHeaders(call),
    body: () => JSON.stringify({ clientId, client: attest(call, evidence) }),
  });
  return parseToken(reply);
}

/** All that a signed request is made of, but for the time. */
interface Evidence {
  readonly credentials: AwsCredentials;
  readonly region: string;
  readonly ecs: EcsMetadata | undefined;
  readonly instance: InstanceIdentity | undefined;
}

/** Signs with the time of this very moment: a signature that waited is a signature that fails. */
function attest(call: Call, { credentials, region, ecs, instance }: Evidence): ClientAttestation {
  const { lambdaArn, clientWorkloadId } = call;
  return {
    aws: {
      stsGetCallerIdentity: signGetCallerIdentity(credentials, region, new Date(clock(call))),
      ...(ecs && { ecs }),
      ...(lambdaArn && { lambda: { arn: lambdaArn } }),
      ...instance,
    },
    ...(clientWorkloadId && { os: { environment: { CLIENT_WORKLOAD_ID: clientWorkloadId } } }),
  };
}

/** AWS hands out new role credentials at least this long before the old ones end. */
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
const REREAD_BEFORE_EXPIRY_MS = 5 * 60_000;

/**
 * Evidence is kept until five minutes before its credentials end, then read again, all of it: the
 * region and the documents belong to the same machine. Credentials without an end are read for
 * each exchange, because the environment may have changed. Callers in flight share one reading,
 * and a failed one costs nothing while the old credentials are good.
 */
async function gatherEvidence(call: Call): Promise<Evidence> {
  const { memory, signal } = call;
  let evidence = memory.evidence;
  const lifeLeftMs = (evidence?.credentials.expiration?.getTime() ?? 0) - clock(call);
  if (!evidence || lifeLeftMs <= REREAD_BEFORE_EXPIRY_MS) {
    if (!memory.reading || memory.reading.ended) {
      memory.reading = new Shared((own) => readEvidence({ ...call, signal: own, once: {} }));
    }
    call.progress.step = "reading AWS credentials";
    try {
      memory.evidence = evidence = await memory.reading.join(signal);
    } catch (error) {
      signal.throwIfAborted();
      if (!evidence || lifeLeftMs <= 0) throw error;
      call.log.warn("AWS credentials cannot be read again; using the old ones");
    }
  }
  keepSecret(call, evidence.credentials.secretAccessKey, evidence.credentials.sessionToken);
  return evidence;
}

/** Reads at the same time what does not depend on each other, and fails in a fixed order. */
async function readEvidence(call: Call): Promise<Evidence> {
  // What is malformed is reported before anything is asked of anyone.
  if (call.region) parseRegion(call.region, call.from["region"]);
  ecsMetadataBase(call);
  const credentials = findCredentials(call);
  const region = findRegion(call);
  const ecs = findEcsMetadata(call);
  const instance = call.instanceIdentity ? fetchInstanceIdentity(call) : undefined;
  // Whoever fails second is not listened to any more, which is not an unhandled rejection.
  for (const started of [region, ecs, instance]) started?.catch(() => {});
  return {
    credentials: await credentials,
    region: await region,
    ecs: await ecs,
    instance: await instance,
  };
}

// --- 4. A client to leave running ---
// Keeps one token alive for any number of callers. No timers: all is decided when it is called,
// so that it neither holds a process open nor wakes up wrong after a suspended laptop or Lambda.
//
//   issued                                        30 %..20 % left      a minute left     end
//     |-------------- served from memory -------------|--- served, renewed ---|-- renewed --|
//                                                          behind the caller    before use

/** A token with so little life left is not given out: it could end on its way. */
const USABLE_MS = 60_000;
/** Short-lived tokens are used until this share of their life is left instead. */
const USABLE_SHARE = 0.1;
/** Renewal starts when this share of the life is left… */
const RENEW_SHARE = 0.2;
/** …and earlier by up to this much, drawn once for each client: a fleet must not move as one. */
const SPREAD_SHARE = 0.1;
/** A failed renewal behind a live token is not repeated sooner: Aembit has a bad moment already. */
const RENEWAL_PAUSE_MS = 30_000;

/** The token in hand, with its times as numbers: a `Date` given out can be changed by anyone. */
interface HeldToken {
  readonly token: AembitToken;
  readonly endsMs: number;
  readonly lifeMs: number;
}

/**
 * A client for the life of a process. Make one and share it.
 *
 * The constructor reads nothing and never throws; bad options reject the first call.
 */
export class AembitAuth {
  readonly #options: AembitAuthOptions | undefined;
  readonly #memory: Memory = newMemory();
  readonly #renewShare: number = RENEW_SHARE + Math.random() * SPREAD_SHARE;
  #held: HeldToken | undefined;
  #running: Shared<AembitToken> | undefined;
  #forced: Shared<AembitToken> | undefined;
  #failedMs = -Infinity;

  constructor(options?: AembitAuthOptions) {
    this.#options = options;
  }

  /**
   * A token with at least a minute (or a tenth of its life) left: from memory while there is one,
   * renewed behind the caller's back in the last stretch, else by an exchange that all callers
   * share.
   *
   * @throws {AembitAuthError} when there is no usable token and the exchange failed
   */
  async getToken(options?: TokenOptions): Promise<AembitToken> {
    const { signal, forceRefresh = false } = readCallOptions(options, this.#options);
    if (!forceRefresh && this.#held) {
      const { token, lifeMs } = this.#held;
      const leftMs = this.#leftMs(this.#held);
      if (leftMs > Math.min(USABLE_MS, lifeMs * USABLE_SHARE)) {
        if (leftMs <= lifeMs * this.#renewShare) this.#renewBehind();
        return token;
      }
    }
    return this.#exchange(forceRefresh).join(signal);
  }

  /**
   * The credential of a Server Workload. A token that Aembit no longer accepts is replaced once.
   *
   * @throws {AembitAuthError} `no_matching_policy` when no Access Policy grants it
   * @see https://docs.aembit.io/api-guide/edge/endpoints/credentials
   */
  async getCredentials(
    request: AembitCredentialsRequest,
    options?: CallOptions,
  ): Promise<AembitCredentials> {
    const { signal } = readCallOptions(options, this.#options);
    const wanted = parseCredentialsRequest(request);
    return runCall(this.#options, this.#memory, async (call) => {
      const reply = await this.#askCredentials(call, wanted);
      if (reply.status !== 401) return parseCredentials(reply);
      return parseCredentials(await this.#askCredentials(call, wanted));
    }, signal);
  }

  /** Asks with the token in hand; a 401 takes the token away from this and all other callers. */
  async #askCredentials(call: Call, wanted: CredentialsBody): Promise<Reply> {
    const { origin } = readEdge(call);
    call.progress.step = "waiting for an access token";
    const { accessToken } = await this.getToken({ signal: call.signal });
    const evidence = await gatherEvidence(call);
    keepSecret(call, accessToken);
    const reply = await postSigned(call, {
      what: "credential",
      url: `${origin}/edge/v1/credentials`,
      headers: { ...edgeHeaders(call), Authorization: `Bearer ${accessToken}` },
      body: () => JSON.stringify({ client: attest(call, evidence), ...wanted }),
    });
    // Another caller may have replaced the token already: only the refused one is dropped.
    const refused = reply.status === 401 && this.#held?.token.accessToken === accessToken;
    if (refused) this.#held = undefined;
    return reply;
  }

  #nowMs(): number {
    return (this.#options?.now ?? Date.now)();
  }

  /** Life left; none when the clock was set back so far that the token seems not yet issued. */
  #leftMs({ endsMs, lifeMs }: HeldToken): number {
    const leftMs = endsMs - this.#nowMs();
    return leftMs > lifeMs + USABLE_MS ? 0 : leftMs;
  }

  /** A failure stays silent while the held token serves; later calls try again. */
  #renewBehind(): void {
    const pausing = Math.abs(this.#nowMs() - this.#failedMs) < RENEWAL_PAUSE_MS;
    if (pausing || this.#inFlight(false)) return;
    const renewal = this.#exchange(false);
    renewal.background = true;
    renewal.result.catch(() => {
      this.#failedMs = this.#nowMs();
    });
  }

  /** A forced exchange serves everybody; one that was not forced does not serve a forced call. */
  #inFlight(forced: boolean): Shared<AembitToken> | undefined {
    const candidates = forced ? [this.#forced] : [this.#running, this.#forced];
    return candidates.find((shared) => shared && !shared.ended);
  }

  /** The exchange under way, or a new one. */
  #exchange(forced: boolean): Shared<AembitToken> {
    const running = this.#inFlight(forced);
    if (running) return running;
    const started = new Shared(async (signal) => {
      const token = await runCall(this.#options, this.#memory, exchange, signal);
      const endsMs = token.expiresAt.getTime();
      this.#held = { token, endsMs, lifeMs: endsMs - this.#nowMs() };
      return token;
    });
    if (forced) this.#forced = started;
    else this.#running = started;
    return started;
  }
}

// --- 5. Options and environment ---
// The only place that reads `process.env`, but for the runtime's own proxy settings. Everything is
// checked before the first packet, and a complaint names the option, its flag or its variable, and
// never the value, which may be a secret in the wrong place.

const DEFAULT_TIMEOUT_MS = 30_000;
const DEFAULT_MAX_ATTEMPTS = 3;
/** Longer timers fire at once: https://nodejs.org/api/timers.html#settimeoutcallback-delay-args */
const MAX_TIMEOUT_MS = 2 ** 31 - 1;
/** Far above any ID, ARN or URL in use, far below what a header may be. */
const MAX_TEXT = 2048;
/** Characters that may stand in a header without a second look. */
const VISIBLE_ASCII = /^[\x21-\x7e]+$/;
/** What IDs, ARNs, regions and URLs are made of. */
const TEXT = `visible ASCII without spaces, at most ${MAX_TEXT}`;
const SOURCES = "auto|env|web-identity|ecs|imds";
const ECS_MODES = "auto|require|omit";

const SILENCE: AembitLogger = { debug() {}, warn() {} };

/** What an option must be, how that is told, and the variables that stand in for it. */
type OptionRow = readonly [check: (value: unknown) => boolean, rule: string, ...string[]];

/** Every option but `credentials`, which is a source. The first ten are flags as well. */
const OPTIONS: Readonly<Record<string, OptionRow>> = {
  clientId: [isShortText, TEXT, "AEMBIT_CLIENT_ID"],
  edgeUrl: [isShortText, TEXT, "AEMBIT_EDGE_BASE_URL"],
  resourceSetId: [isShortText, TEXT, "AEMBIT_RESOURCE_SET_ID"],
  clientWorkloadId: [isShortText, TEXT, "CLIENT_WORKLOAD_ID"],
  region: [isShortText, TEXT, "AWS_REGION", "AWS_DEFAULT_REGION"],
  lambdaArn: [(v) => isShortText(v) && /^\s*arn:[\w-]+:lambda:/.test(v), "a function's ARN"],
  source: [isOneOf(SOURCES), SOURCES],
  ecsMetadata: [isOneOf(ECS_MODES), ECS_MODES],
  timeoutMs: [(v) => isWithin(v, MAX_TIMEOUT_MS), "up to 24 days"],
  instanceIdentity: [(v) => typeof v === "boolean", "a boolean"],
  maxAttempts: [(v) => isWithin(v, 100) && Number.isInteger(v), "1 to 100"],
  signal: [isSignal, "an AbortSignal"],
  fetch: [isFunction, "a function"],
  env: [isRecord, "an object"],
  now: [isFunction, "a function"],
  logger: [(v) => isRecord(v) && isFunction(v["debug"]) && isFunction(v["warn"]),
    "an object with debug and warn"],
};

/** Options and environment after checking: what the rest of the file works with. */
interface Config {
  readonly clientId?: string;
  readonly edgeUrl?: string;
  readonly resourceSetId?: string;
  readonly clientWorkloadId?: string;
  readonly region?: string;
  readonly lambdaArn?: string;
  readonly credentials?: unknown;
  readonly source: "auto" | CredentialSource;
  readonly ecsMetadata: "auto" | "require" | "omit";
  readonly instanceIdentity?: boolean;
  readonly timeoutMs: number;
  readonly maxAttempts: number;
  readonly signal?: AbortSignal;
  readonly fetch: typeof globalThis.fetch;
  /** With a transport of the caller's own, proxies are the caller's business. */
  readonly ownFetch: boolean;
  readonly now: () => number;
  /** A variable, trimmed unless it is wanted raw; empty is unset, as in every AWS SDK. */
  readonly env: (name: string, raw?: "raw") => string | undefined;
  readonly log: AembitLogger;
  /** Where each option came from, for messages. */
  readonly from: Readonly<Record<string, string>>;
}

/** An option is what was given, else its variable, else its default. */
function readOptions(options: AembitAuthOptions = {}): Config {
  assertConfig(isRecord(options), "options must be an object");
  const { fetch, logger, credentials, env: variables }: AembitAuthOptions = options;
  const set: Record<string, unknown> = {};
  const from: Record<string, string> = {};
  const env: Config["env"] = (name, raw) => {
    const all: Readonly<Record<string, unknown>> = variables ?? process.env;
    const value = Object.hasOwn(all, name) ? all[name] ?? "" : "";
    assertConfig(typeof value === "string", `the variable ${name} must be a string`);
    return (raw ? value : value.trim()) || undefined;
  };
  for (const [name, [isRight, rule, ...names]] of Object.entries(OPTIONS)) {
    const given: unknown = options[name];
    const variable = given === undefined ? names.find((candidate) => env(candidate)) : undefined;
    const value = variable ? env(variable) : given;
    if (value === undefined) continue;
    from[name] = variable ?? nameOf(name);
    assertConfig(isRight(value), `${from[name]} must be ${rule}`);
    set[name] = typeof value === "string" ? value.trim() : value;
  }
  return {
    source: "auto",
    ecsMetadata: "auto",
    timeoutMs: DEFAULT_TIMEOUT_MS,
    maxAttempts: DEFAULT_MAX_ATTEMPTS,
    now: Date.now,
    ...set,
    credentials,
    fetch: fetch ?? globalThis.fetch,
    ownFetch: fetch !== undefined,
    env,
    log: logger ?? SILENCE,
    from,
  };
}

/** `clientId (--client-id)`: as it is known in a program and on the command line. */
function nameOf(option: string): string {
  return `${option} (--${toFlag(option)})`;
}

function toFlag(option: string): string {
  return option.replace("Ms", "").replace(/[A-Z]/g, (capital) => `-${capital.toLowerCase()}`);
}

function readCallOptions(options: TokenOptions = {}, client?: AembitAuthOptions): TokenOptions {
  assertConfig(isRecord(options), "options must be an object");
  const { signal }: TokenOptions = options;
  assertConfig(signal === undefined || isSignal(signal), "signal must be an AbortSignal");
  signal?.throwIfAborted();
  if (client?.signal?.aborted) throw client.signal.reason;
  return options;
}

/** Stack and tenant become parts of a host name: nothing but host labels may stand there. */
const CLIENT_ID = new RegExp(
  "^aembit:(L):(L):identity:[\\w-]+:[\\da-f]{8}(-[\\da-f]{4}){3}-[\\da-f]{12}$"
    .replaceAll("L", "[a-z\\d](?:[a-z\\d-]{0,61}[a-z\\d])?"),
  "i",
);

function originOfClientId(clientId: unknown, from = "clientId"): string {
  const [, stack, tenant] = isShortText(clientId) ? CLIENT_ID.exec(clientId) ?? [] : [];
  const form = "aembit:{stack}:{tenant}:identity:{type}:{uuid}";
  assertConfig(stack && tenant, `${from} must be an Edge SDK Client ID, ${form}`);
  return `https://${tenant}.ec.${stack}.aembit.io`.toLowerCase();
}

/** Whom to ask. The client ID is required even where the URL is given: Aembit looks it up. */
function readEdge(call: Call): { readonly clientId: string; readonly origin: string } {
  const { clientId, edgeUrl, from } = call;
  assertConfig(clientId, "clientId (--client-id) or AEMBIT_CLIENT_ID must be set");
  const derived = originOfClientId(clientId, from["clientId"]);
  return { clientId, origin: edgeUrl ? originOfEdgeUrl(edgeUrl, from["edgeUrl"]) : derived };
}

/** The attestation is a bearer secret: TLS always, but for a test server on this machine. */
function originOfEdgeUrl(edgeUrl: string, from = ""): string {
  const url = parseHttpUrl(edgeUrl, from);
  const bare = url.pathname === "/" && !/[?#]/.test(edgeUrl);
  assertConfig(bare, `${from} must be an origin, https://{host}`);
  const safe = url.protocol === "https:" || isLoopback(url);
  assertConfig(safe, `${from} must be https, as it gets a secret`);
  return url.origin;
}

/** An http or https URL that carries no credentials, which would end up in logs. */
function parseHttpUrl(value: string, from: string): URL {
  const url = /^https?:\/\/[^/]/i.test(value) && URL.canParse(value) && new URL(value);
  const right = url && !url.username && !url.password;
  assertConfig(right, `${from} must be an https URL without credentials`);
  return url;
}

/** `new URL()` has already written 127.1 and 0x7f.1 out as 127.0.0.1. */
function isLoopback({ hostname }: URL): boolean {
  return hostname === "localhost" || hostname === "[::1]" || /^127(\.\d+){3}$/.test(hostname);
}

// --- 6. AWS credentials ---
// Four sources, one table. The first that is configured answers for the workload; if it fails,
// that is the error: the next source would be somebody else's identity (the node's, on EKS).

// https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
const RELATIVE_URI = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";
const FULL_URI = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
const AUTH_TOKEN = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
// https://docs.aws.amazon.com/sdkref/latest/guide/access-assume-role-web.html
const IDENTITY_FILE = "AWS_WEB_IDENTITY_TOKEN_FILE";
// https://docs.aws.amazon.com/sdkref/latest/guide/environment-variables.html
const KEY_ID = "AWS_ACCESS_KEY_ID";
const SECRET_KEY = "AWS_SECRET_ACCESS_KEY";
const NO_IMDS = "AWS_EC2_METADATA_DISABLED";

const SOURCE_NAMES: readonly CredentialSource[] = ["env", "web-identity", "ecs", "imds"];

/** One of `needs` configures a source. IMDS needs nothing: it is asked when all else is unset. */
const SOURCE_TABLE: Readonly<Record<CredentialSource, {
  readonly needs: readonly string[];
  readonly load: (call: Call) => Promise<AwsCredentials>;
}>> = {
  env: { needs: [KEY_ID, SECRET_KEY], load: loadFromEnvironment },
  "web-identity": { needs: [IDENTITY_FILE], load: loadFromWebIdentity },
  ecs: { needs: [RELATIVE_URI, FULL_URI], load: loadFromContainer },
  imds: { needs: [], load: loadFromImds },
};

/** The reason why a source has nothing to give, if there is one. */
function whyAbsent(call: Call, name: CredentialSource): string | undefined {
  const { needs } = SOURCE_TABLE[name];
  if (name === "imds") return imdsDisabled(call) ? `${NO_IMDS} is true` : undefined;
  return needs.some((variable) => call.env(variable)) ? undefined : `${needs.join(", ")} not set`;
}

/**
 * The credentials of the first source that is configured. Not `async`, nor are the loaders: what
 * is malformed throws at once, before a packet of any other reader is on its way.
 */
function findCredentials(call: Call): Promise<AwsCredentials> {
  if (call.credentials !== undefined) return loadFromCaller(call);
  const reasons: string[] = [];
  for (const name of call.source === "auto" ? SOURCE_NAMES : [call.source]) {
    const reason = whyAbsent(call, name);
    if (reason === undefined) return loadFrom(call, name, reasons);
    reasons.push(`${name}: ${reason}`);
  }
  throw new AembitAuthError("no_aws_credentials", `no AWS credentials: ${reasons.join("; ")}`);
}

/** Off AWS the error says of each source why it gave nothing. A pinned source has to be there. */
function loadFrom(
  call: Call,
  name: CredentialSource,
  reasons: readonly string[],
): Promise<AwsCredentials> {
  return SOURCE_TABLE[name].load(call).then((credentials) => {
    keepSecret(call, credentials.secretAccessKey, credentials.sessionToken);
    call.log.debug(`AWS credentials from ${name}`);
    return credentials;
  }, (error: unknown) => {
    // Only IMDS says this: it is asked without a sign that it exists.
    if (!isCode(error, "no_aws_credentials")) throw error;
    const list = [...reasons, `${name}: ${error.message}`].join("; ");
    const code = call.source === "auto" ? error.code : "metadata_unavailable";
    throw new AembitAuthError(code, `no AWS credentials: ${list}`, error);
  });
}

/** Read at call time: Lambda and tests change the environment of a running process. */
function loadFromEnvironment(call: Call): Promise<AwsCredentials> {
  const accessKeyId = call.env(KEY_ID);
  const secretAccessKey = call.env(SECRET_KEY);
  const pair = accessKeyId && secretAccessKey;
  assertConfig(pair, `${KEY_ID} and ${SECRET_KEY} must be set together`);
  const fields = { accessKeyId, secretAccessKey, sessionToken: call.env("AWS_SESSION_TOKEN") };
  const origin: Origin = { code: "invalid_config", from: KEY_ID };
  return Promise.resolve(checkCredentials(fields, clock(call), origin));
}

/** A value is the caller's mistake when it is malformed; what a function returns is its source's. */
function loadFromCaller(call: Call): Promise<AwsCredentials> {
  const { credentials, progress } = call;
  const origin: Origin = { code: "invalid_config", from: "credentials" };
  if (!isFunction(credentials)) {
    return Promise.resolve(checkCredentials(credentials, clock(call), origin));
  }
  progress.step = "waiting for the credentials function";
  const from = "the credentials function";
  return Promise.resolve().then(() => credentials()).then(
    (answer) => checkCredentials(answer, clock(call), { from }),
    (cause: unknown) => {
      throw new AembitAuthError("metadata_unavailable", `${from} failed`, { cause });
    },
  );
}

/** Whose credentials they are, and whose mistake it is when they are malformed. */
interface Origin {
  readonly from: string;
  readonly code?: AembitAuthErrorCode;
}

/**
 * Foreign credentials become ours only whole: no empty string, no character that a header would
 * refuse (and quote in its error), no date that is `NaN` and therefore never expires.
 */
function checkCredentials(value: unknown, nowMs: number, origin: Origin): AwsCredentials {
  const { from, code = "invalid_aws_credentials" } = origin;
  const fields = isRecord(value) ? value : {};
  const text = (name: string): string => {
    const field = fields[name];
    if (isText(field)) return field;
    throw new AembitAuthError(code, `${from}: ${name} must be visible ASCII`);
  };
  const accessKeyId = text("accessKeyId");
  const secretAccessKey = text("secretAccessKey");
  const sessionToken = fields["sessionToken"] == null ? undefined : text("sessionToken");
  const hidden = { secretAccessKey, ...(sessionToken && { sessionToken }) };
  const expiration = fields["expiration"];
  if (expiration == null) return conceal({ accessKeyId }, hidden);
  const endsMs = expiration instanceof Date ? expiration.getTime() : NaN;
  if (Number.isNaN(endsMs)) throw new AembitAuthError(code, `${from}: expiration must be a date`);
  if (endsMs > nowMs) return conceal({ accessKeyId, expiration: new Date(endsMs) }, hidden);
  throw new AembitAuthError("invalid_aws_credentials", `${from}: expired`);
}

/** The fields of AWS under our names. */
function toCredentials(reply: Reply, read: (name: string) => unknown): AwsCredentials {
  const fields = {
    accessKeyId: read("AccessKeyId"),
    secretAccessKey: read("SecretAccessKey"),
    sessionToken: read("SessionToken"),
    expiration: parseDate(read("Expiration")),
  };
  // The service's own clock decides: by a wrong one here, good credentials would look expired.
  return checkCredentials(fields, serverClock(reply), { from: outcome(reply) });
}

/**
 * The JSON of IMDS and of container endpoints. A container endpoint sends no `Code`; where there
 * is one it must be `Success`, and the service's own message explains any other.
 */
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
function parseCredentialDocument(reply: Reply): AwsCredentials {
  if (reply.status !== 200) throw failure(reply, "metadata_unavailable");
  const document = parseJson(reply.text);
  if (!isRecord(document) || (document["Code"] ?? "Success") !== "Success") {
    throw failure(reply, "invalid_aws_credentials", "expected JSON with credentials");
  }
  // What others call the session token is here just the token.
  return toCredentials(reply, (name) => document[name.replace("Session", "")]);
}

/** The ECS agent and the EKS Pod Identity agent: plain http, but never off the machine. */
const CONTAINER_HOSTS = ["169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];
const ECS_AGENT = "http://169.254.170.2";

/** ECS, Fargate, EKS Pod Identity, Lambda SnapStart: one endpoint, named by the environment. */
function loadFromContainer(call: Call): Promise<AwsCredentials> {
  // The address is judged before the token is read: no token for a host that may not have it.
  const url = containerUrl(call);
  return readContainerToken(call).then(async (token) => {
    const headers = token === undefined ? {} : { Authorization: token };
    return parseCredentialDocument(
      await sendMetadata(call, { what: "container credentials", url, headers }));
  });
}

function containerUrl({ env }: Call): string {
  const relative = env(RELATIVE_URI);
  if (relative === undefined) return metadataUrl(env(FULL_URI) ?? "", FULL_URI);
  // "@evil.example/" or ":8080/" behind the address would name another host or port.
  const url = metadataUrl(ECS_AGENT + relative, RELATIVE_URI);
  const right = /^\/(?!\/)/.test(relative) && url.startsWith(`${ECS_AGENT}/`);
  assertConfig(right, `${RELATIVE_URI} must be a path`);
  return url;
}

/** Plain http only to addresses that cannot leave the machine; https to any host. */
function metadataUrl(value: string, from: string): string {
  const url = parseHttpUrl(value, from);
  const local = isLoopback(url) || CONTAINER_HOSTS.includes(url.hostname);
  const right = local || url.protocol === "https:";
  assertConfig(right, `${from} must be https, or http to ${CONTAINER_HOSTS.join(", ")}`);
  return url.href;
}

/** Sent as it is, without `Bearer`. Read each time: the file is replaced while we run. */
async function readContainerToken(call: Call): Promise<string | undefined> {
  const file = call.env(`${AUTH_TOKEN}_FILE`);
  const from = file ? `${AUTH_TOKEN}_FILE` : AUTH_TOKEN;
  const token = file ? await readTokenFile(call, file, from) : call.env(AUTH_TOKEN, "raw");
  keepSecret(call, token);
  if (token === undefined || /^[\x20-\x7e]+$/.test(token)) return token;
  throw new AembitAuthError(
    "invalid_aws_credentials",
    `${from} must be one line of visible ASCII`,
  );
}

const MAX_TOKEN_FILE = 65_536;

/** A pipe would never end and a directory never begin: only regular files of a sane size. */
async function readTokenFile(call: Call, path: string, from: string): Promise<string> {
  call.progress.step = `reading ${from}`;
  try {
    // Loaded on demand: most workloads have no token file, and every start pays for imports.
    const { readFile, stat } = await import("node:fs/promises");
    const file = await stat(path);
    if (!file.isFile() || file.size > MAX_TOKEN_FILE) throw new Error("not a file under 64 KiB");
    return await readFile(path, "utf8");
  } catch (error) {
    const cause = cleanError(call, error);
    const message = `${from} cannot be read: ${cause.message}`;
    throw new AembitAuthError("invalid_aws_credentials", message, { cause });
  }
}

const STS_ATTEMPT_MS = 5_000;

/** EKS IRSA: STS turns the service account's token into role credentials. */
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html
function loadFromWebIdentity(call: Call): Promise<AwsCredentials> {
  const role = call.env("AWS_ROLE_ARN") ?? "";
  const right = /^arn:[\w-]+:iam::\d{12}:role\/[\w+=,.@/-]+$/.test(role);
  assertConfig(right, `AWS_ROLE_ARN must be the ARN of a role, as ${IDENTITY_FILE} is set`);
  const session = call.env("AWS_ROLE_SESSION_NAME") ?? "aembit-auth";
  const named = /^[\w+=,.@-]{2,64}$/.test(session);
  assertConfig(named, "AWS_ROLE_SESSION_NAME must be 2 to 64 of A-Za-z0-9_+=,.@-");
  return assumeRole(call, { RoleArn: role, RoleSessionName: session });
}

async function assumeRole(call: Call, names: Record<string, string>): Promise<AwsCredentials> {
  const file = call.env(IDENTITY_FILE) ?? "";
  const WebIdentityToken = (await readTokenFile(call, file, IDENTITY_FILE)).trim();
  keepSecret(call, WebIdentityToken);
  const Action = "AssumeRoleWithWebIdentity";
  const form = new URLSearchParams({ Action, Version: "2011-06-15", ...names, WebIdentityToken });
  const reply = await send(call, {
    what: `STS ${Action}`,
    method: "POST",
    url: `https://${stsHost(await findRegion(call))}/`,
    headers: { "Content-Type": FORM },
    body: () => form.toString(),
    attemptMs: STS_ATTEMPT_MS,
  });
  if (isRejection(reply.status)) {
    throw failure(reply, "invalid_aws_credentials", "check the role's trust policy");
  }
  return toCredentials(reply, (name) => xmlText(expectOk(reply).text, name));
}

// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
const IMDS_ENDPOINTS = { ipv4: "http://169.254.169.254", ipv6: "http://[fd00:ec2::254]" };
const IMDS_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
const IMDS_TOKEN_SECONDS = 21_600;
/** A token is not used in its last minute, in which it could end on its way. */
const IMDS_TOKEN_MARGIN_MS = 60_000;
/** Off AWS nobody answers: two tries of a second each, and the error is there within three. */
const IMDS_SEARCH_MS = 2_300;
const IMDS_ROLES = "/latest/meta-data/iam/security-credentials/";
const IMDS_ROLE = /^(?!\.+$)[\w+=,.@-]{1,64}$/;

function imdsDisabled({ env }: Call): boolean {
  return env(NO_IMDS)?.toLowerCase() === "true";
}

/** The role of the instance: its name, then its credentials. The name is kept for later calls. */
async function loadFromImds(call: Call): Promise<AwsCredentials> {
  const { memory } = call;
  const kept = memory.imdsRole;
  const role = kept ?? await fetchImdsRole(call);
  const reply = await imdsGet(call, "IMDS credentials", IMDS_ROLES + role);
  // The instance profile was replaced while we ran: its new role has another name.
  memory.imdsRole = reply.status === 404 ? undefined : role;
  return reply.status === 404 && kept ? loadFromImds(call) : parseCredentialDocument(reply);
}

/** The list has one role. It becomes part of a path, so it must look like a role's name. */
async function fetchImdsRole(call: Call): Promise<string> {
  const reply = await imdsGet(call, "IMDS role name", IMDS_ROLES);
  const role = reply.text.split("\n", 1)[0]?.trim() ?? "";
  if (reply.status === 404 || (reply.status === 200 && reply.bytes?.length === 0)) {
    throw failure(reply, "no_aws_credentials", "attach a role to the instance");
  }
  if (reply.status !== 200) throw failure(reply, "metadata_unavailable");
  if (IMDS_ROLE.test(role)) return role;
  throw failure(reply, "invalid_aws_credentials", "not a role");
}

/** One GET with the session token; a 401 means that the token has ended: it is renewed once. */
async function imdsGet(call: Call, what: string, path: string): Promise<Reply> {
  const url = imdsEndpoint(call) + path;
  const get = (token: string): Promise<Reply> =>
    sendMetadata(call, { what, url, headers: { "X-aws-ec2-metadata-token": token } });
  const token = await imdsToken(call);
  const reply = await get(token);
  if (reply.status !== 401) return reply;
  // Of two reads that were refused at once, the second finds the first one's renewal under way.
  if (call.memory.imdsToken?.value === token) {
    call.memory.imdsToken = undefined;
    call.once.imdsToken = undefined;
  }
  return get(await imdsToken(call));
}

/** The endpoint wins over the mode, as in every AWS SDK. */
function imdsEndpoint({ env }: Call): string {
  const endpoint = env(IMDS_ENDPOINT);
  const mode = env(`${IMDS_ENDPOINT}_MODE`)?.toLowerCase() ?? "ipv4";
  if (endpoint) return trimUrl(parseHttpUrl(endpoint, IMDS_ENDPOINT).href);
  assertConfig(mode === "ipv4" || mode === "ipv6", `${IMDS_ENDPOINT}_MODE must be IPv4 or IPv6`);
  return IMDS_ENDPOINTS[mode];
}

/** The session token of IMDSv2, fetched once for all readers. There is no way back to IMDSv1. */
function imdsToken(call: Call): Promise<string> {
  const kept = call.memory.imdsToken;
  const nowMs = clock(call);
  // The second comparison is for a clock that was set back: then the token's end means nothing.
  if (kept && nowMs < kept.endsMs && nowMs >= kept.sinceMs) {
    keepSecret(call, kept.value);
    return Promise.resolve(kept.value);
  }
  return call.once.imdsToken ??= fetchImdsToken(call);
}

async function fetchImdsToken(call: Call): Promise<string> {
  const reply = await sendMetadata(call, {
    what: "IMDS token",
    method: "PUT",
    url: `${imdsEndpoint(call)}/latest/api/token`,
    headers: { "X-aws-ec2-metadata-token-ttl-seconds": String(IMDS_TOKEN_SECONDS) },
    giveUpMs: call.source === "auto" ? IMDS_SEARCH_MS : Infinity,
  });
  const { status, text, headers } = reply;
  if (status === 0 || isRejection(status)) {
    const hint = "not on EC2, or a container and the IMDS hop limit is 1 (set it to 2)";
    throw failure(reply, "no_aws_credentials", hint);
  }
  if (status !== 200) throw failure(reply, "metadata_unavailable");
  const value = text.trim();
  if (!isText(value)) throw failure(reply, "invalid_aws_credentials", "not a token");
  keepSecret(call, value);
  const seconds = Number(headers.get("x-aws-ec2-metadata-token-ttl-seconds")) || IMDS_TOKEN_SECONDS;
  const sinceMs = clock(call);
  const lifeMs = Math.min(seconds, IMDS_TOKEN_SECONDS) * 1000 - IMDS_TOKEN_MARGIN_MS;
  call.memory.imdsToken = { value, sinceMs, endsMs: sinceMs + lifeMs };
  return value;
}

// --- 7. Region and metadata ---
// The region becomes part of a host name and of the signature, so only a region's form gets
// through. The ECS documents are evidence: their bytes are passed on as they came.

const REGION = /^[a-z]{2,}(-[a-z0-9]+)+-\d+$/;

/** Partitions by region prefix; a region that fits none is in the `aws` partition. */
// https://github.com/boto/botocore/blob/develop/botocore/data/partitions.json
const DNS_SUFFIXES = [
  ["cn-", "amazonaws.com.cn"],
  ["eusc-", "amazonaws.eu"],
  ["us-iso-", "c2s.ic.gov"],
  ["us-isob-", "sc2s.sgov.gov"],
  ["eu-isoe-", "cloud.adc-e.uk"],
  ["us-isof-", "csp.hci.ic.gov"],
  ["", "amazonaws.com"],
] as const;

/** The regional endpoint: the global one knows nothing of other partitions. */
// https://docs.aws.amazon.com/general/latest/gr/sts.html
function stsHost(region: string): string {
  return `sts.${region}.${DNS_SUFFIXES.find(([prefix]) => region.startsWith(prefix))?.[1]}`;
}

function parseRegion(value: unknown, from = "region"): string {
  const region = typeof value === "string" ? value.trim() : "";
  const right = REGION.test(region) && region.length < 64;
  assertConfig(right, `${from} must be a region such as us-east-1`);
  return region;
}

function findRegion(call: Call): Promise<string> {
  return call.once.region ??= searchRegion(call);
}

async function searchRegion(call: Call): Promise<string> {
  if (call.region) return parseRegion(call.region, call.from["region"]);
  const reasons = ["region (--region), AWS_REGION not set"];
  for (const read of [regionOfTask, regionOfInstance]) {
    try {
      const found = await read(call);
      if (found !== undefined) return found;
    } catch (error) {
      // A region that could not be read is one reason more; a region that is malformed is final.
      if (!(error instanceof AembitAuthError) || error.code === "invalid_config") throw error;
      reasons.push(error.message);
    }
  }
  throw new AembitAuthError("no_region", `no AWS region: ${reasons.join("; ")}`);
}

/** `arn:{partition}:ecs:{region}:{account}:task/…`: ECS on EC2 sets no AWS_REGION of its own. */
async function regionOfTask(call: Call): Promise<string | undefined> {
  const base = ecsMetadataBase(call);
  const document = base && parseJson((await fetchTask(call, base)).text);
  const arn = isRecord(document) ? String(document["TaskARN"]) : "";
  const region = /^arn:[^:]*:ecs:([^:]*):/.exec(arn)?.[1];
  return region === undefined ? undefined : parseRegion(region, "TaskARN");
}

/** `placement/region`, not the availability zone less a letter: Local Zones are named otherwise. */
async function regionOfInstance(call: Call): Promise<string | undefined> {
  if (imdsDisabled(call)) return undefined;
  const reply = await imdsGet(call, "IMDS region", "/latest/meta-data/placement/region");
  return parseRegion(expectOk(reply).text, "the region of IMDS");
}

// https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
const ECS_METADATA_URI = "ECS_CONTAINER_METADATA_URI_V4";

function ecsMetadataBase({ env }: Call): string | undefined {
  const uri = env(ECS_METADATA_URI);
  return uri && trimUrl(metadataUrl(uri, ECS_METADATA_URI));
}

async function fetchEcsMetadata(call: Call): Promise<EcsMetadata> {
  const base = ecsMetadataBase(call);
  assertConfig(base, `${ECS_METADATA_URI} must be set`);
  const [container, task] = await Promise.all([
    fetchEcsDocument(call, "ECS container metadata", base),
    fetchTask(call, base),
  ]);
  return { containerMetadata: toBase64(container), taskMetadata: toBase64(task) };
}

/** Off ECS there is none. On ECS a failure is worth a warning, and an error when required. */
async function findEcsMetadata(call: Call): Promise<EcsMetadata | undefined> {
  if (call.ecsMetadata === "require") return fetchEcsMetadata(call);
  if (call.ecsMetadata === "omit" || !ecsMetadataBase(call)) return undefined;
  try {
    return await fetchEcsMetadata(call);
  } catch (error) {
    if (!isCode(error, "metadata_unavailable")) throw error;
    call.log.warn(`going on without ${error.message}`);
    return undefined;
  }
}

/** The task document serves as evidence and for the region: it is read once for both. */
function fetchTask(call: Call, base: string): Promise<Reply> {
  return call.once.task ??= fetchEcsDocument(call, "ECS task metadata", `${base}/task`);
}

/** A container may ask before the agent has registered it: that 404 passes. */
async function fetchEcsDocument(call: Call, what: string, url: string): Promise<Reply> {
  return expectObject(await sendMetadata(call, { what, url, retry404: true }));
}

/** In the field names of the Edge API. */
interface InstanceIdentity {
  readonly instanceIdentityDocument: string;
  readonly instanceIdentityDocumentSignature: string;
}

/** IMDS breaks the signature into lines; Aembit takes it on one. */
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-identity-documents.html
async function fetchInstanceIdentity(call: Call): Promise<InstanceIdentity> {
  assertConfig(!imdsDisabled(call), `instanceIdentity needs IMDS, and ${NO_IMDS} is true`);
  const read = (name: string): Promise<Reply> =>
    imdsGet(call, `IMDS identity ${name}`, `/latest/dynamic/instance-identity/${name}`);
  const [document, signature] = await Promise.all([read("document"), read("signature")]);
  const oneLine = expectOk(signature).text.replace(/\s+/g, "");
  if (!/^[\w+/=]+$/.test(oneLine)) {
    throw failure(signature, "metadata_unavailable", "not a signature");
  }
  return {
    instanceIdentityDocument: toBase64(expectObject(document)),
    instanceIdentityDocumentSignature: oneLine,
  };
}

function expectOk(reply: Reply): Reply {
  if (reply.status === 200 && reply.bytes) return reply;
  throw failure(reply, "metadata_unavailable");
}

/** Looked at only to tell a document from a proxy's page; what is sent are the bytes. */
function expectObject(reply: Reply): Reply {
  if (isRecord(parseJson(expectOk(reply).text))) return reply;
  throw failure(reply, "metadata_unavailable", "expected JSON");
}

// --- 8. Signature Version 4 ---
// Pure functions, one for each artefact the documentation names. No clock, no environment.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html

const ALGORITHM = "AWS4-HMAC-SHA256";
const FORM = "application/x-www-form-urlencoded; charset=utf-8";
/** Aembit rebuilds exactly this body from nothing, so not a byte of it may vary. */
const GET_CALLER_IDENTITY = "Action=GetCallerIdentity&Version=2011-06-15";

/**
 * Signs the STS request that proves the role. Aembit is told the headers and the region, and
 * rebuilds host, path and body itself: no other header could be signed.
 *
 * @param date when it is signed; valid for about 15 minutes from then. Default: now.
 * @throws {AembitAuthError} `invalid_config` for credentials or a region that cannot be signed
 */
export function signGetCallerIdentity(
  credentials: AwsCredentials,
  region: string,
  date: Date = new Date(),
): StsGetCallerIdentity {
  const checked = parseRegion(region);
  const signed = signRequest(
    {
      method: "POST",
      path: "/",
      headers: [["Content-Type", FORM], ["Host", stsHost(checked)]],
      body: GET_CALLER_IDENTITY,
    },
    { credentials, region: checked, service: "sts", date },
  );
  const { "X-Amz-Date": amzDate = "", "X-Amz-Security-Token": token } = signed.headers;
  return {
    headers: {
      "Content-Type": FORM,
      "X-Amz-Date": amzDate,
      ...(token !== undefined && { "X-Amz-Security-Token": token }),
      Authorization: signed.authorization,
    },
    region: checked,
  };
}

/**
 * Signs any AWS request with Signature Version 4, and shows every step of it.
 *
 * @throws {AembitAuthError} `invalid_config` when a part cannot be signed
 */
export function signRequest(request: SignableRequest, context: SigningContext): SignedRequest {
  const { credentials, region, service, date, normalizePath = true } = context;
  assertSignable(request, context);
  // Date and scope come from one instant: at midnight they must not be of two days.
  const amzDate = toAmzDate(date);
  const scope = credentialScope(amzDate, region, service);
  const added: [string, string][] = [["X-Amz-Date", amzDate]];
  if (credentials.sessionToken) added.push(["X-Amz-Security-Token", credentials.sessionToken]);
  const headers = canonicalHeaders(request.headers, added);
  const names = [...headers.keys()].sort();
  const canonical = canonicalRequest(request, headers, names, normalizePath);
  const toSign = stringToSign(amzDate, scope, canonical);
  const key = signingKey(credentials.secretAccessKey, amzDate, region, service);
  const signature = createHmac("sha256", key).update(toSign).digest("hex");
  const authorization =
    `${ALGORITHM} Credential=${credentials.accessKeyId}/${scope}, ` +
    `SignedHeaders=${names.join(";")}, Signature=${signature}`;
  return {
    canonicalRequest: canonical,
    stringToSign: toSign,
    signature,
    authorization,
    headers: Object.fromEntries([...added, ["Authorization", authorization]]),
  };
}

/** What is not checked here would be quoted by a runtime's error later on, or forge the scope. */
function assertSignable(request: SignableRequest, context: SigningContext): void {
  const { method, path, body = "" } = request;
  const { region, service, credentials, date } = context;
  assertConfig(isRecord(credentials), "credentials must be an object");
  const { accessKeyId, secretAccessKey, sessionToken = "none" }: AwsCredentials = credentials;
  const texts = [method, region, service, accessKeyId, secretAccessKey, sessionToken];
  const right = texts.every(isText) && typeof path === "string";
  assertConfig(right, "method, path, region, service and credentials must be visible ASCII");
  assertConfig(typeof body === "string" || body instanceof Uint8Array, "body must be bytes");
  const dated = date instanceof Date && !Number.isNaN(date.getTime());
  assertConfig(dated, "date must be a date");
}

/** `20250115T103045Z` */
function toAmzDate(date: Date): string {
  return date.toISOString().replace(/[-:]|\.\d+/g, "");
}

/** `20250115/us-east-1/sts/aws4_request` */
function credentialScope(amzDate: string, region: string, service: string): string {
  return `${amzDate.slice(0, 8)}/${region}/${service}/aws4_request`;
}

/**
 * Names in lower case, values trimmed, folded lines and runs of spaces made one space, and the
 * values of a name that is given twice joined in their order. Ours replace the caller's.
 */
function canonicalHeaders(
  given: SignableRequest["headers"],
  added: readonly (readonly [string, string])[],
): Map<string, string> {
  const headers = new Map<string, string>();
  for (const [name, value] of given) {
    const key = String(name).toLowerCase();
    const clean = String(value).replace(/[\t\n\r ]+/g, " ").replace(/^ | $/g, "");
    const right = typeof value === "string" && /^[!#$%&'*+.^`|~\w-]+$/.test(key) && !/[\0-\x1f\x7f]/.test(clean);
    assertConfig(right, "headers must be legal in HTTP");
    const before = headers.get(key);
    headers.set(key, before === undefined ? clean : `${before},${clean}`);
  }
  for (const [name, value] of added) headers.set(name.toLowerCase(), value);
  return headers;
}

function canonicalRequest(
  request: SignableRequest,
  headers: ReadonlyMap<string, string>,
  names: readonly string[],
  normalizePath: boolean,
): string {
  const [path, query] = splitTarget(request.path);
  const lines = names.map((name) => `${name}:${headers.get(name)}\n`).join("");
  // A caller that sends the hash, or UNSIGNED-PAYLOAD, has it signed as the payload's hash too.
  const payloadHash = headers.get("x-amz-content-sha256") ?? sha256(request.body ?? "");
  return [
    request.method.toUpperCase(),
    canonicalPath(path, normalizePath),
    canonicalQuery(query),
    lines,
    names.join(";"),
    payloadHash,
  ].join("\n");
}

function stringToSign(amzDate: string, scope: string, canonical: string): string {
  return `${ALGORITHM}\n${amzDate}\n${scope}\n${sha256(canonical)}`;
}

/** The key is made anew for each signature: one an hour is needed, and none lies about. */
function signingKey(secret: string, amzDate: string, region: string, service: string): Uint8Array {
  const hmac = (key: string | Uint8Array, data: string): Uint8Array =>
    createHmac("sha256", key).update(data).digest();
  const dateKey = hmac(`AWS4${secret}`, amzDate.slice(0, 8));
  return hmac(hmac(hmac(dateKey, region), service), "aws4_request");
}

function splitTarget(target: string): [path: string, query: string] {
  const mark = target.indexOf("?");
  return mark < 0 ? [target, ""] : [target.slice(0, mark), target.slice(mark + 1)];
}

/** Encoded once as given, so that what the caller has encoded is encoded twice, as AWS wants. */
function canonicalPath(path: string, normalize: boolean): string {
  if (path === "/" || path === "") return "/";
  const kept: string[] = [];
  for (const segment of normalize ? path.split("/") : []) {
    if (segment === "..") kept.pop();
    else if (segment !== "" && segment !== ".") kept.push(segment);
  }
  const tail = kept.length > 0 && path.endsWith("/") ? "/" : "";
  const plain = normalize ? `/${kept.join("/")}${tail}` : path;
  return plain.split("/").map(encode).join("/");
}

/** Decoded, so that `%41` and `A` are one; sorted after encoding, by name and then by value. */
function canonicalQuery(query: string): string {
  if (query === "") return "";
  const pairs = query.split("&").filter((pair) => pair !== "").map((pair) => {
    const [name = "", ...rest] = pair.split("=");
    return [encode(decode(name)), encode(decode(rest.join("=")))] as const;
  });
  pairs.sort(([a, x], [b, y]) => (a === b ? compare(x, y) : compare(a, b)));
  return pairs.map(([name, value]) => `${name}=${value}`).join("&");
}

/** By code unit, never by locale. */
function compare(a: string, b: string): number {
  return a < b ? -1 : Number(a > b);
}

/** RFC 3986: all but the unreserved characters, of which encodeURIComponent leaves five more. */
function encode(text: string): string {
  return encodeURIComponent(text.toWellFormed()).replace(/[!'()*]/g, (character) =>
    `%${character.charCodeAt(0).toString(16).toUpperCase()}`);
}

/** A `%` that starts no escape stands for itself. */
function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function sha256(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

// --- 9. Answers of Aembit ---
// Each answer is checked field by field before anything of it is believed.

/** A clock further off than this is corrected, as the AWS SDKs do: AWS bears five minutes. */
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html
const MAX_SKEW_MS = 4 * 60_000;
const EDGE_ATTEMPT_MS = 10_000;
/** The last instant a `Date` can hold. */
const MAX_DATE_MS = 8.64e15;

function edgeHeaders({ resourceSetId }: Call): Record<string, string> {
  return {
    "Content-Type": "application/json",
    Accept: "application/json",
    ...(resourceSetId && { "X-Aembit-ResourceSet": resourceSetId }),
  };
}

/**
 * Posts a signed body. If Aembit refuses it while its `Date` says that our clock is wrong, the
 * clock is the likely reason: the body is signed once more with Aembit's time. A correction that
 * helped is kept for later calls.
 */
async function postSigned(
  call: Call,
  post: Pick<Outgoing, "what" | "url" | "headers" | "body">,
): Promise<Reply> {
  const request: Outgoing = { ...post, method: "POST", attemptMs: EDGE_ATTEMPT_MS };
  const first = await send(call, request);
  const skewMs = serverClock(first) - clock(call);
  call.memory.seenSkewMs = skewMs;
  if (!isRejection(first.status) || Math.abs(skewMs) <= MAX_SKEW_MS) return first;
  call.skewMs += skewMs;
  const seconds = Math.round(Math.abs(skewMs) / 1000);
  const skew = `the clock is ${seconds} s ${skewMs > 0 ? "behind" : "ahead of"} Aembit's`;
  call.log.warn(`${skew}; signing again with its time`);
  const second = await send(call, request);
  const attempts = first.attempts + second.attempts;
  if (second.status === 0 || (second.status >= 400 && second.status < 500)) {
    return { ...second, attempts, note: `${skew}, and signing again did not help` };
  }
  call.memory.skewMs = call.skewMs;
  return { ...second, attempts };
}

/** The JSON of a success; anything else says who has to act, and whether waiting helps. */
function parseEdgeAnswer(reply: Reply): Record<string, unknown> {
  const { status, bytes, text } = reply;
  const body = parseJson(text);
  // Some failures come with a status of success.
  const success = isRecord(body) && body["success"] !== false;
  if (success && status >= 200 && status < 300) return body;
  if (isRejection(status) && bytes) {
    throw failure(reply, "edge_rejected", "check the Trust Provider of the client ID");
  }
  if ((status === 0 || status >= 400) && (bytes || status === 0)) {
    throw failure(reply, "edge_unavailable", "check the Edge URL, or wait");
  }
  const hint = "expected JSON under 1 MiB; check the Edge URL";
  throw failure(reply, "invalid_edge_response", hint);
}

function parseToken(reply: Reply): AembitToken {
  const { accessToken, expiresIn, tokenType: type } = parseEdgeAnswer(reply);
  const tokenType = type ?? "Bearer";
  if (!isText(accessToken) || !isText(tokenType) || !isWithin(expiresIn, Number.MAX_VALUE)) {
    const rule = "accessToken must be visible ASCII, expiresIn a positive number";
    throw failure(reply, "invalid_edge_response", rule);
  }
  // By our own uncorrected clock, which is the one that callers compare it with.
  const expiresAt = new Date(Math.min(reply.call.now() + expiresIn * 1000, MAX_DATE_MS));
  reply.call.log.debug(`Aembit issued a token for ${expiresIn} s`);
  return conceal({ tokenType, expiresIn, expiresAt }, { accessToken });
}

/** What `POST /edge/v1/credentials` wants to know beyond who asks. */
interface CredentialsBody {
  readonly server: { readonly transportProtocol: "TCP"; host: string; port: number };
  readonly credentialType: string;
  readonly connectionMetadata?: Readonly<Record<string, string>>;
}

function parseCredentialsRequest(request: AembitCredentialsRequest): CredentialsBody {
  assertConfig(isRecord(request), "request must be an object");
  const { host, port, credentialType, connectionMetadata }: AembitCredentialsRequest = request;
  const named = isText(host) && /^([\w.-]{1,253}|\[?[\da-f:.]{2,45}\]?)$/i.test(host);
  assertConfig(named, "host (--server-workload-host) must be a host name");
  const numbered = isWithin(port, 65_535) && Number.isInteger(port);
  assertConfig(numbered, "port (--server-workload-port) must be 1 to 65535");
  const typed = isText(credentialType) && /^\w{1,100}$/.test(credentialType);
  assertConfig(typed, `${nameOf("credentialType")} must be a word`);
  const metadata: unknown = connectionMetadata ?? {};
  const texts = isRecord(metadata) && Object.values(metadata).every((v) => typeof v === "string");
  assertConfig(texts, "connectionMetadata must be an object of strings");
  const server = { transportProtocol: "TCP", host, port } as const;
  return { server, credentialType, ...(connectionMetadata && { connectionMetadata }) };
}

function parseCredentials(reply: Reply): AembitCredentials {
  const { credentialType, expiresAt, data } =
    reply.status === 404 ? { credentialType: "Unknown" } : parseEdgeAnswer(reply);
  if (credentialType === "Unknown") {
    throw failure(reply, "no_matching_policy", "no Access Policy grants it: check host, port and type");
  }
  const ends = parseDate(expiresAt) ?? null;
  if (!isText(credentialType) || Number.isNaN(ends?.getTime()) || !isRecord(data)) {
    const rule = "expected credentialType, expiresAt and data";
    throw failure(reply, "invalid_edge_response", rule);
  }
  return Object.freeze({ credentialType, expiresAt: ends, data: conceal({}, data) });
}

// --- 10. One HTTP request ---
// The only function that touches the network, with the rules that hold for every request: no
// redirect, a deadline for each attempt, a limit for each body, and which answers are tried again.

/** A deadline of the whole attempt: behind an idle time-out, a server that drips holds us. */
const METADATA_ATTEMPT_MS = 1_000;
const MAX_BODY_BYTES = 1_048_576;
const BACKOFF_BASE_MS = 200;
const BACKOFF_CAP_MS = 2_000;
const RETRIED: readonly number[] = [429, 500, 502, 503, 504];

interface Outgoing {
  /** The subject of every message about this request. */
  readonly what: string;
  readonly method?: "GET" | "POST" | "PUT";
  readonly url: string;
  readonly headers?: Readonly<Record<string, string>>;
  /** Made for each attempt: a signature must not wait out the pause before it. */
  readonly body?: () => string;
  readonly attemptMs: number;
  readonly retry404?: boolean;
  /** No attempt may start that could end later than this. */
  readonly giveUpMs?: number;
}

/** An answer, with what it takes to judge it and to speak of it. */
interface Reply {
  readonly call: Call;
  readonly request: Outgoing;
  /** 0: there was no answer, for the reason that `cause` gives. */
  readonly status: number;
  readonly headers: Headers;
  /** Undefined when the body was too large to be read. */
  readonly bytes: Uint8Array | undefined;
  readonly text: string;
  readonly attempts: number;
  readonly cause?: Error;
  readonly note?: string;
}

/** Metadata is a second away at most, and never behind a proxy. */
function sendMetadata(call: Call, request: Omit<Outgoing, "attemptMs">): Promise<Reply> {
  if (!call.ownFetch) assertDirect(new URL(request.url));
  return send(call, { ...request, attemptMs: METADATA_ATTEMPT_MS });
}

/** Sends until there is an answer worth having, or no more attempts, or no more time. */
async function send(call: Call, request: Outgoing): Promise<Reply> {
  const giveUpMs = performance.now() + (request.giveUpMs ?? Infinity);
  for (let attempts = 1; ; attempts += 1) {
    const reply = { ...(await attempt(call, request)), attempts };
    call.log.debug(call.progress.step = outcome(reply));
    if (!isPassing(reply) || attempts >= call.maxAttempts) return reply;
    const pauseMs = pauseAfter(reply);
    const resumeMs = performance.now() + pauseMs;
    // The server asked for more time than there is: waiting for it would only waste it.
    if (reply.headers.has("retry-after") && resumeMs >= call.deadlineMs) {
      const seconds = Math.ceil(pauseMs / 1000);
      return { ...reply, note: `it asks to wait ${seconds} s, past the deadline` };
    }
    if (resumeMs + request.attemptMs > giveUpMs) return reply;
    await sleep(pauseMs, call.signal);
  }
}

/** No answer at all, or one that says: not now. An endless body is not asked for twice. */
function isPassing({ status, bytes, request }: Reply): boolean {
  if (status === 0) return true;
  return !!bytes && (RETRIED.includes(status) || (status === 404 && request.retry404 === true));
}

/** As the server asks, else full jitter: the pauses of many clients must not fall together. */
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
function pauseAfter(reply: Reply): number {
  const after = reply.headers.get("retry-after") ?? "";
  const isSeconds = /^\d+$/.test(after);
  const askedMs = isSeconds ? Number(after) * 1000 : Date.parse(after) - serverClock(reply);
  if (!Number.isNaN(askedMs)) return Math.max(0, askedMs);
  return Math.random() * Math.min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** (reply.attempts - 1));
}

/** One attempt: an answer, or why there was none. Only the end of the call is thrown. */
async function attempt(call: Call, request: Outgoing): Promise<Omit<Reply, "attempts">> {
  const { what, method = "GET", url, headers = {}, attemptMs } = request;
  call.signal.throwIfAborted();
  call.progress.step = `waiting for ${what}: ${method} ${shownUrl(url)}`;
  const body = request.body?.();
  const controller = new AbortController();
  const { signal } = controller;
  const unlink = onAbort(call.signal, () => controller.abort());
  const timer = setTimeout(() => controller.abort(), attemptMs);
  const { fetch } = call;
  try {
    const init: RequestInit = { method, headers, redirect: "manual", signal };
    if (body !== undefined) init.body = body;
    // The race is for transports that do not listen to their signal.
    const response = await untilAborted(fetch(url, init), signal);
    const bytes = await untilAborted(readBody(response), signal);
    // An unread rest would keep the connection and its sender busy.
    if (!bytes) controller.abort();
    const text = new TextDecoder().decode(bytes);
    return { call, request, status: response.status, headers: response.headers, bytes, text };
  } catch (error) {
    call.signal.throwIfAborted();
    const late = signal.aborted;
    controller.abort();
    const cause = late ? new Error(`no answer within ${attemptMs} ms`) : cleanError(call, error);
    return { call, request, status: 0, headers: new Headers(), bytes: undefined, text: "", cause };
  } finally {
    clearTimeout(timer);
    unlink();
  }
}

/** The whole body, or undefined when it is larger than anybody here has reason to send. */
async function readBody({ body }: Response): Promise<Uint8Array | undefined> {
  const chunks: Uint8Array[] = [];
  let length = 0;
  const reader = body?.getReader();
  for (let part = await reader?.read(); part && !part.done; part = await reader?.read()) {
    length += part.value.byteLength;
    if (length > MAX_BODY_BYTES) return undefined;
    chunks.push(part.value);
  }
  return Buffer.concat(chunks);
}

/**
 * Through a proxy, a metadata request would be answered with the identity of the proxy's host.
 * `fetch` takes no word on proxies, so where the runtime would use one the call stops here.
 */
// https://nodejs.org/api/cli.html#node_use_env_proxy1
function assertDirect({ protocol, hostname, origin }: URL): void {
  const { env, versions, execArgv, allowedNodeEnvironmentFlags } = process;
  const flag = "--use-env-proxy";
  const flags = `${execArgv.join(" ")} ${env["NODE_OPTIONS"]}`.split(" ");
  // Bun and Deno do so unasked; Node has it from 22.21 and 24.5, and only when asked.
  const asked = env["NODE_USE_ENV_PROXY"] === "1" || flags.includes(flag);
  const able = versions["bun"] || versions["deno"] || allowedNodeEnvironmentFlags.has(flag);
  if (!able || !(asked || versions["bun"] || versions["deno"])) return;
  // Without a proxy of its own, https goes through that of http.
  const schemes = protocol === "https:" ? ["https", "http", "all"] : ["http", "all"];
  const names = schemes.flatMap((scheme) => [`${scheme}_proxy`, `${scheme}_proxy`.toUpperCase()]);
  const proxy = names.find((name) => env[name]);
  const direct = env["no_proxy"] ?? env["NO_PROXY"] ?? "";
  const exempt = direct.toLowerCase().split(/[\s,]+/).some((entry) => {
    const name = entry.replace(/^\*?\./, "");
    return entry === "*" || hostname === name || (name && hostname.endsWith(`.${name}`));
  });
  assertConfig(
    !proxy || exempt,
    `${proxy} would proxy ${origin}, and the proxy's host would answer with its own identity;` +
      ` set NO_PROXY=${direct && `${direct},`}${hostname}`,
  );
}

/** 4xx, but for 429, which only says: not now. */
function isRejection(status: number): boolean {
  return status >= 400 && status < 500 && status !== 429;
}

/** The server's time, or ours where it does not say. */
function serverClock({ call, headers }: Reply): number {
  const dateMs = Date.parse(headers.get("date") ?? "");
  return Number.isNaN(dateMs) ? clock(call) : dateMs;
}

/** `exchange: POST https://… answered 503 (attempt 3)`: what was tried, where, what came back. */
function outcome({ request, status, attempts, cause, note }: Reply): string {
  const { what, method = "GET", url } = request;
  const answer = cause ? `failed: ${cause.message}` : `answered ${status}`;
  const tries = attempts > 1 ? ` (attempt ${attempts})` : "";
  return `${what}: ${method} ${shownUrl(url)} ${answer}${tries}${note ? `; ${note}` : ""}`;
}

/** The error of an answer: what was tried, what the service says of it, and what to do next. */
function failure(reply: Reply, code: AembitAuthErrorCode, hint = ""): AembitAuthError {
  const { status, attempts, cause } = reply;
  const message = [outcome(reply), serviceMessage(reply), hint].filter(Boolean).join("; ");
  const retryable = status === 0 || status === 429 || status >= 500;
  const details = { status: status || undefined, attempts, cause, retryable };
  return new AembitAuthError(code, message, details);
}

// --- 11. Deadlines and shared work ---
// Every wait is tied to a signal, every signal to a deadline, and no listener stays behind.

/** What is worth keeping between the calls of one client. */
interface Memory {
  imdsToken?: { readonly value: string; readonly sinceMs: number; readonly endsMs: number } | undefined;
  imdsRole?: string | undefined;
  evidence?: Evidence;
  reading?: Shared<Evidence>;
  /** Aembit's clock less ours, as far as it was needed. */
  skewMs: number;
  /** The same as last seen, for the doctor. */
  seenSkewMs?: number;
}

function newMemory(): Memory {
  return { skewMs: 0 };
}

/** One call under way: its configuration, its end, and what it has learnt. */
interface Call extends Omit<Config, "signal"> {
  readonly memory: Memory;
  readonly signal: AbortSignal;
  /** On the monotonic clock, which nobody sets. */
  readonly deadlineMs: number;
  /** Reads that several parts of the call wait for. */
  readonly once: {
    imdsToken?: Promise<string> | undefined;
    region?: Promise<string>;
    task?: Promise<Reply>;
  };
  /** Cut out of whatever a server says. */
  readonly secrets: Set<string>;
  /** What it is doing, for the message when time runs out. */
  readonly progress: { step: string };
  skewMs: number;
}

/** Runs work under a deadline; at its end, however it ends, nothing of it is left running. */
async function runCall<T>(
  options: AembitAuthOptions | undefined,
  memory: Memory,
  work: (call: Call) => Promise<T>,
  outer?: AbortSignal,
): Promise<T> {
  const config = readOptions(options);
  const { timeoutMs } = config;
  const controller = new AbortController();
  const { signal } = controller;
  const progress = { step: "starting" };
  const deadlineMs = performance.now() + timeoutMs;
  const call: Call = {
    ...config, memory, signal, deadlineMs, once: {}, secrets: new Set(), progress,
    skewMs: memory.skewMs,
  };
  const unlink = [config.signal, outer].map((end) =>
    end && onAbort(end, () => controller.abort(end.reason)));
  const timer = setTimeout(() => {
    const message = `no result within ${timeoutMs} ms; last step: ${progress.step}`;
    controller.abort(new AembitAuthError("timeout", message));
  }, timeoutMs);
  try {
    signal.throwIfAborted();
    return await untilAborted(work(call), signal);
  } finally {
    clearTimeout(timer);
    for (const remove of unlink) remove?.();
    // Reads that the result did not need, or that failed with it, stop here.
    controller.abort();
  }
}

/** Work that any number of callers wait for. It ends with the last of them, unless it is kept. */
class Shared<T> {
  readonly result: Promise<T>;
  /** Settled or abandoned: not to be joined any more. */
  ended = false;
  /** Goes on without anybody waiting. */
  background = false;
  #waiting = 0;
  readonly #controller = new AbortController();

  constructor(work: (signal: AbortSignal) => Promise<T>) {
    this.result = work(this.#controller.signal).finally(() => {
      this.ended = true;
      // Reads that failed with it stop here.
      this.#controller.abort();
    });
    // Each caller that joins hears of a failure; with nobody there it is not an unhandled one.
    this.result.catch(() => {});
  }

  async join(signal: AbortSignal | undefined): Promise<T> {
    this.#waiting += 1;
    try {
      return await untilAborted(this.result, signal);
    } finally {
      this.#waiting -= 1;
      if (this.#waiting === 0 && !this.background && !this.ended) {
        this.ended = true;
        this.#controller.abort();
      }
    }
  }
}

/** The result of work, or the reason of the signal, whichever comes first. */
function untilAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work;
  return new Promise((resolve, reject) => {
    const unlink = onAbort(signal, () => reject(signal.reason));
    work.then(resolve, reject).finally(unlink);
  });
}

/** Calls back at once or later; the result takes the listener off a signal that lives on. */
function onAbort(signal: AbortSignal, listener: () => void): () => void {
  if (signal.aborted) listener();
  else signal.addEventListener("abort", listener, { once: true });
  return () => signal.removeEventListener("abort", listener);
}

function sleep(ms: number, signal: AbortSignal): Promise<void> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const slept = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms);
  });
  return untilAborted(slept, signal).finally(() => clearTimeout(timer));
}

/** The time, corrected by what Aembit's clock has taught us. */
function clock(call: Call): number {
  const nowMs = call.now() + call.skewMs;
  assertConfig(isWithin(nowMs, MAX_DATE_MS), "now must return milliseconds");
  return nowMs;
}

// --- 12. Text and secrets ---
// Whatever a server or a runtime says is cut down to one harmless line before it is shown.

const MAX_SHOWN = 200;

function keepSecret(call: Call, ...secrets: readonly (string | undefined)[]): void {
  for (const secret of secrets) {
    if (secret) call.secrets.add(secret).add(encodeURIComponent(secret));
  }
}

/**
 * One line of at most 200 printable characters, with the secrets of the call cut out of it, and
 * every unbroken run of 40 or more characters of which keys, tokens and signatures are made.
 */
function shown(call: Call, text: string): string {
  let line = text.replace(/[^\p{L}\p{M}\p{N}\p{P}\p{S}]+/gu, " ");
  for (const secret of call.secrets) line = line.replaceAll(secret, "[cut]");
  const clean = [...line.replace(/[\w+/=.~%-]{40,}/g, "[cut]").trim()];
  return clean.length > MAX_SHOWN ? `${clean.slice(0, MAX_SHOWN - 1).join("")}…` : clean.join("");
}

/** What a service says of its refusal: Aembit and AWS in JSON or XML, the agents in plain text. */
function serviceMessage({ call, text, status }: Reply): string {
  const json = parseJson(text);
  const words = isRecord(json)
    ? [json["Code"] ?? json["code"], json["message"] ?? json["Message"]]
    : [xmlText(text, "Code"), xmlText(text, "Message")];
  // Markup and broken JSON tell a person nothing, and the body of a success may be a secret.
  if (status >= 400 && !/^\s*[<{[]/.test(text)) words.push(typeof json === "string" ? json : text);
  const said = words.filter((word) => typeof word === "string" && word.trim() !== "");
  return said.length > 0 ? `"${shown(call, said.join(": "))}"` : "";
}

/**
 * The system code of a runtime's error, or its words without the URL. The error itself goes no
 * further: Bun's holds the whole URL, and header errors quote the value.
 */
function cleanError(call: Call, error: unknown): Error {
  let code: unknown;
  for (let inner = error, depth = 0; inner instanceof Error && depth < 5; depth += 1) {
    code = "code" in inner && typeof inner.code === "string" ? inner.code : code;
    inner = inner.cause;
  }
  const words = error instanceof Error ? error.message.replace(/\S+:\/\/\S+/g, "") : "";
  return typeof code === "string"
    ? Object.assign(new Error(shown(call, code)), { code: shown(call, code) })
    : new Error(shown(call, words) || "unknown error");
}

/** A URL without its query, which may hold anything. */
function shownUrl(url: string): string {
  return url.replace(/[?#].*/, "");
}

/** A URL that paths can be added to. */
function trimUrl(url: string): string {
  return shownUrl(url).replace(/\/+$/, "");
}

/** Secrets live behind getters of a prototype made for the one object that shows the rest. */
class Concealed {
  toJSON(): object {
    return { ...this };
  }
  // Node, Bun and Deno ask for this before they look at anything else.
  [Symbol.for("nodejs.util.inspect.custom")](): object {
    return { ...this };
  }
}

/**
 * An object whose hidden values are read by property only. Properties that are merely not
 * enumerable would not do: `util.inspect` with `showHidden` prints them.
 */
function conceal<S extends object, H extends object>(visible: S, hidden: H): Readonly<S & H> {
  const getters: object = Object.create(Concealed.prototype);
  for (const [name, value] of Object.entries(hidden)) {
    Object.defineProperty(getters, name, { get: () => value, enumerable: true });
  }
  return Object.freeze(Object.assign(Object.create(getters), visible));
}

/** JSON, or undefined: the parser's own error quotes the text, which may be a credential. */
function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Absent is undefined; what is not a date is an invalid one. Without a zone it is UTC. */
function parseDate(value: unknown): Date | undefined {
  if (value === undefined || value === null) return undefined;
  const text = typeof value === "string" ? value : "";
  return new Date(/T[\d:.]+$/.test(text) ? `${text}Z` : text);
}

/** The values of STS need no entities, and its tags no attributes. */
function xmlText(text: string, tag: string): string | undefined {
  return new RegExp(`<${tag}>([^<]*)</${tag}>`).exec(text)?.[1]?.trim();
}

/** Of bytes, not of text: decoding would replace what is not UTF-8. */
function toBase64({ bytes }: Reply): string {
  return Buffer.from(bytes ?? []).toString("base64");
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isFunction(value: unknown): value is (...args: unknown[]) => unknown {
  return typeof value === "function";
}

function isShortText(value: unknown): value is string {
  return typeof value === "string" && isText(value.trim()) && value.length <= MAX_TEXT;
}

function isText(value: unknown): value is string {
  return typeof value === "string" && VISIBLE_ASCII.test(value);
}

/** For `a|b|c`, as the help text shows a choice. */
function isOneOf(choice: string): (value: unknown) => boolean {
  return (value) => choice.split("|").some((word) => word === value);
}

/** A positive number up to a limit. What is below 1 ms or 1 attempt is no limit at all. */
function isWithin(value: unknown, limit: number): value is number {
  return typeof value === "number" && value > 0 && value <= limit;
}

function isSignal(value: unknown): value is AbortSignal {
  return isRecord(value) && "aborted" in value && isFunction(value["addEventListener"]);
}

function isCode(error: unknown, code: AembitAuthErrorCode): error is AembitAuthError {
  return error instanceof AembitAuthError && error.code === code;
}

// --- 13. Command line ---
// The result on stdout, everything else on stderr, one line for a failure, and an exit status that
// a script can act on.

/** Every flag and what it takes, the empty text for nothing. */
const FLAGS: Readonly<Record<string, string>> = {
  ...Object.fromEntries(Object.entries(OPTIONS).slice(0, 8).map(([name, [, rule]]) =>
    [toFlag(name), rule])),
  timeout: "seconds",
  "server-workload-host": "a host",
  "server-workload-port": "a port",
  "credential-type": "a word",
  "output-format": "json|sh-export|sh-env|powershell-env|aws-credential-process",
  "instance-identity": "",
  json: "",
  verbose: "",
  help: "",
  version: "",
};

type Flags = Readonly<Record<string, string>>;

type Print = (line: string) => void;

/** Every command and what it prints. */
const COMMANDS: Readonly<Record<string, {
  readonly help: string;
  readonly run: (options: AembitAuthOptions, print: Print, flags: Flags) => Promise<void>;
}>> = {
  token: { help: "print an access token (default)", run: printToken },
  request: { help: "print the body of /edge/v1/auth: a secret", run: printRequest },
  headers: { help: "print the signed headers: a secret", run: printHeaders },
  credentials: { help: "print the credential of a Server Workload", run: printCredentials },
  doctor: { help: "check each step", run: examine },
};

/** What a shell reports for a process that SIGINT has ended. */
const EXIT_INTERRUPTED = 130;

/** Runs the command line and returns its exit status. */
async function main(args: readonly string[]): Promise<number> {
  const { stdout, stderr } = process;
  const interrupt = new AbortController();
  const { signal } = interrupt;
  const onInterrupt = (): void => interrupt.abort();
  const print: Print = (line) => void stdout.write(`${line}\n`);
  const tell: Print = (line) => void stderr.write(`aembit-auth: ${line}\n`);
  // A reader that has seen enough (`| head`) is no failure of ours.
  for (const stream of [stdout, stderr]) stream.on("error", () => {});
  process.on("SIGINT", onInterrupt);
  try {
    const { command, flags } = parseArguments(args);
    const debug = flags["verbose"] === undefined ? (): void => {} : tell;
    const logger = { debug, warn: (line: string): void => tell(`warning: ${line}`) };
    const options = { ...toOptions(flags), signal, logger };
    if (flags["version"] !== undefined) print(VERSION);
    else if (flags["help"] !== undefined) print(usage());
    else await COMMANDS[command]?.run(options, print, flags);
    return 0;
  } catch (error) {
    if (signal.aborted) return EXIT_INTERRUPTED;
    if (!(error instanceof AembitAuthError)) throw error;
    const { code, message, status } = error;
    const json = args.includes("--json") && JSON.stringify({ error: { code, message, status } });
    if (json) stderr.write(`${json}\n`);
    else tell(`${code}: ${message}`);
    return ERRORS[code][0];
  } finally {
    process.removeListener("SIGINT", onInterrupt);
  }
}

/** `--flag value` or `--flag=value`; what is not known is refused together with what is. */
function parseArguments(args: readonly string[]): { command: string; flags: Flags } {
  const flags: Record<string, string> = {};
  const words = [...args];
  const command = words[0]?.startsWith("-") === false ? words.shift() ?? "" : "token";
  const known = Object.hasOwn(COMMANDS, command);
  assertConfig(known, `unknown command, not ${Object.keys(COMMANDS).join("|")}`);
  for (let word = words.shift(); word !== undefined; word = words.shift()) {
    const [, name = "", inline] = /^--([\w-]+)(?:=(.*))?$/s.exec(word) ?? [];
    const takes = Object.hasOwn(FLAGS, name) ? FLAGS[name] : undefined;
    assertConfig(takes !== undefined, `unknown flag, not --${Object.keys(FLAGS).join("|--")}`);
    const value = inline ?? (takes ? words.shift() : "");
    const right = takes ? value && !value.startsWith("--") : !value;
    assertConfig(right, `--${name} takes ${takes || "no value"}`);
    flags[name] = value ?? "";
  }
  return { command, flags };
}

/** The options that flags set. Their values are checked where all options are. */
function toOptions(flags: Flags): AembitAuthOptions {
  const { timeout, "instance-identity": identity } = flags;
  return {
    ...Object.fromEntries(Object.keys(OPTIONS).map((name) => [name, flags[toFlag(name)]])),
    timeoutMs: timeout === undefined ? undefined : Number(timeout) * 1000,
    instanceIdentity: identity === undefined ? undefined : true,
  };
}

function usage(): string {
  const row = (name: string, help: string): string => `  ${name.padEnd(24)} ${help}`;
  return [
    "aembit-auth [command] [flags]",
    ...Object.entries(COMMANDS).map(([name, { help }]) => row(name, help)),
    ...Object.entries(FLAGS).map(([name, takes]) => row(`--${name}`, takes)),
  ].join("\n");
}

async function printToken(options: AembitAuthOptions, print: Print, flags: Flags): Promise<void> {
  const { accessToken, ...rest } = await authenticate(options);
  print(flags["json"] === undefined ? accessToken : JSON.stringify({ accessToken, ...rest }));
}

async function printRequest(options: AembitAuthOptions, print: Print): Promise<void> {
  print(JSON.stringify(await createAuthRequest(options)));
}

/** Without a client ID: these headers are for STS, whoever replays them. */
async function printHeaders(options: AembitAuthOptions, print: Print): Promise<void> {
  const signed = await runCall({ ...options, ecsMetadata: "omit" }, newMemory(), async (call) =>
    attest(call, await gatherEvidence(call)));
  print(JSON.stringify(signed.aws.stsGetCallerIdentity));
}

/** Quotes as the shells read them; PowerShell takes four typographic quotes for its own. */
// https://learn.microsoft.com/powershell/module/microsoft.powershell.core/about/about_quoting_rules
const quoteSh = (value: string): string => `'${value.replaceAll("'", "'\\''")}'`;
const quotePowerShell = (value: string): string => `'${value.replace(/['‘’‚‛]/g, "$&$&")}'`;

/** How a credential is printed. The assignments are one for each key of `data`. */
const FORMATS: Readonly<Record<string, (credential: AembitCredentials) => string>> = {
  json: ({ credentialType, expiresAt, data }) =>
    JSON.stringify({ credentialType, expiresAt, data: Object.fromEntries(fieldsOf(data)) }),
  "sh-export": ({ data }) => assign(data, (name, value) => `export ${name}=${quoteSh(value)}`),
  "sh-env": ({ data }) => assign(data, (name, value) => `${name}=${quoteSh(value)}`),
  "powershell-env": ({ data }) =>
    assign(data, (name, value) => `$env:${name} = ${quotePowerShell(value)}`),
  // https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html
  "aws-credential-process": ({ data, expiresAt }) =>
    JSON.stringify({
      Version: 1,
      AccessKeyId: data["awsAccessKeyId"],
      SecretAccessKey: data["awsSecretAccessKey"],
      SessionToken: data["awsSessionToken"],
      ...(expiresAt && { Expiration: expiresAt }),
    }),
};

async function printCredentials(
  options: AembitAuthOptions,
  print: Print,
  flags: Flags,
): Promise<void> {
  const {
    "server-workload-host": host = "",
    "server-workload-port": port,
    "credential-type": credentialType = "",
    "output-format": format = "json",
  } = flags;
  const write = Object.hasOwn(FORMATS, format) && FORMATS[format];
  assertConfig(write, `--output-format must be ${FLAGS["output-format"]}`);
  const aws = format !== "aws-credential-process" || credentialType === "AwsStsFederation";
  assertConfig(aws, `--output-format ${format} needs --credential-type AwsStsFederation`);
  const request = { host, port: Number(port), credentialType };
  print(write(await new AembitAuth(options).getCredentials(request)));
}

/** Hidden values are getters of the prototype, which `for…in` sees and spreading does not. */
function fieldsOf(data: AembitCredentials["data"]): [string, unknown][] {
  const fields: [string, unknown][] = [];
  for (const name in data) if (name !== "toJSON") fields.push([name, data[name]]);
  return fields;
}

/** `apiKey` becomes `API_KEY`. A server's key that is no name of a variable could be a command. */
function assign(
  data: AembitCredentials["data"],
  line: (name: string, value: string) => string,
): string {
  return fieldsOf(data).map(([key, value]) => {
    const name = key.replace(/([a-z\d])([A-Z])/g, "$1_$2").toUpperCase();
    const text = typeof value === "string" ? value : JSON.stringify(value);
    if (/^[A-Z_][A-Z\d_]*$/.test(name) && !text.includes("\0")) return line(name, text);
    const message = "data cannot be variables; use --output-format json";
    throw new AembitAuthError("invalid_edge_response", message);
  }).join("\n");
}

// --- 14. Doctor ---
// The same functions as in a real run, one at a time, each with its own line.

/** A check passed (`ok`), found nothing to check (`-`), or is worth a look (`warn`). */
type Finding = readonly [mark: "ok" | "-" | "warn" | "FAIL", text: string];

/** Prints one line and returns its mark. What is in vain is not asked. */
type Check = (
  name: string,
  asked: boolean,
  work: (call: Call) => Promise<Finding> | Finding,
) => Promise<Finding[0]>;

async function examine(options: AembitAuthOptions, print: Print): Promise<void> {
  const memory = newMemory();
  const { source } = readOptions(options);
  let first: AembitAuthError | undefined;
  const check: Check = async (name, asked, work) => {
    const startedMs = performance.now();
    let finding: Finding = ["-", "not asked"];
    try {
      if (asked) finding = await runCall(options, memory, async (call) => work(call));
    } catch (error) {
      if (!(error instanceof AembitAuthError)) throw error;
      first ??= error;
      finding = ["FAIL", `${error.code}: ${error.message}`];
    }
    const [mark, text] = finding;
    const ms = Math.round(performance.now() - startedMs);
    print(`${mark.padEnd(5)}${name.padEnd(13)} ${text}${asked ? ` (${ms} ms)` : ""}`);
    return mark;
  };
  await examineSetup(check, source);
  const ready = first === undefined;
  let token: Promise<AembitToken> | undefined;
  await check("clock", ready, async (call) => {
    token = exchange(call);
    await token.catch(() => {});
    const seconds = Math.round((memory.seenSkewMs ?? 0) / 1000);
    return [Math.abs(seconds * 1000) > MAX_SKEW_MS ? "warn" : "ok", `${seconds} s behind Aembit's`];
  });
  await check("exchange", ready, async () => ["ok", `a token for ${(await token)?.expiresIn} s`]);
  if (first) throw first;
}

/** Everything before the exchange; returns nothing, as each check has its say on its own. */
async function examineSetup(check: Check, source: Config["source"]): Promise<void> {
  const target = await check("client ID", true, (call) => ["ok", readEdge(call).clientId]);
  await check("Edge URL", target === "ok", (call) => ["ok", readEdge(call).origin]);
  let settled = false;
  for (const name of SOURCE_NAMES) {
    const asked = !settled && (source === "auto" || source === name);
    const mark = await check(name, asked, async (call) => {
      const reason = whyAbsent(call, name);
      if (reason !== undefined) return ["-", reason];
      const { accessKeyId, expiration } = await loadFrom(call, name, []);
      return ["ok", `${accessKeyId} until ${expiration?.toISOString() ?? "changed"}`];
    });
    settled ||= mark !== "-";
  }
  // Where no source is configured, this says so for all of them.
  if (!settled) await check("credentials", true, async (call) => ["ok", String(await findCredentials(call))]);
  await check("region", true, async (call) => ["ok", await findRegion(call)]);
  await check("ECS metadata", true, async (call) =>
    (await findEcsMetadata(call)) ? ["ok", "read"] : ["-", "none to send"]);
}

/** Whether this file is what was started, and not part of something else that was. */
async function isEntry(): Promise<boolean> {
  const [url, script] = [import.meta.url ?? "", process.argv[1] ?? ""];
  const own = /[\\/]aembit-auth[^\\/]*$/;
  // In a bundle, `import.meta.main` is true for the whole program, whose name is another.
  if (!own.test(url)) return false;
  if (import.meta.main || !own.test(script)) return import.meta.main;
  // Node before 24 does not say. The link in node_modules/.bin has another path than the file.
  const [{ realpath }, { fileURLToPath }] = await Promise.all([
    import("node:fs/promises"), import("node:url"),
  ]);
  return (await realpath(script).catch(() => "")) === fileURLToPath(url);
}

void isEntry().then(async (entry) => {
  if (entry) process.exitCode = await main(process.argv.slice(2));
});
