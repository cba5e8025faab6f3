#!/usr/bin/env node
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
import { setTimeout as sleep } from "node:timers/promises";

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
  readonly sessionToken?: string;
  readonly expiration?: Date;
}

/** A function that returns credentials, such as `fromNodeProviderChain()`. */
export type AwsCredentialsProvider = () => AwsCredentials | Promise<AwsCredentials>;

/**
 * A bearer token of Aembit.
 *
 * @see https://docs.aembit.io/api-guide/edge/endpoints/auth
 */
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
  /** Name or address, without a scheme: `db.example.com`. */
  readonly host: string;
  /** 1 to 65535. */
  readonly port: number;
  readonly credentialType:
    | "ApiKey"
    | "UsernamePassword"
    | "OAuthToken"
    | "GoogleWorkloadIdentityFederation"
    | "AwsStsFederation"
    | (string & {});
  /** Passed on to Aembit as it is. */
  readonly connectionMetadata?: Readonly<Record<string, string>> | undefined;
}

/**
 * The credential of a Server Workload, as its Credential Provider in Aembit issues it.
 *
 * @see https://docs.aembit.io/api-guide/edge/endpoints/credentials
 */
export interface AembitCredentials {
  readonly credentialType: string;
  /** `null`: the credential does not expire. */
  readonly expiresAt: Date | null;
  /** By type: `apiKey`; `username`, `password`; `token`; `awsAccessKeyId`, … Values hidden. */
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
  readonly headers: SignedHeaders & { readonly "Content-Type": string };
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
  /** As in the host name: `sts`, `s3`, `execute-api`. */
  readonly service: string;
  /** Now, by a clock that is right to a few minutes. */
  readonly date: Date;
  /** Remove dot segments and doubled slashes. Default true; S3 wants false. */
  readonly normalizePath?: boolean | undefined;
}

/** Every artefact of Signature Version 4, and the headers to add to the request. */
export interface SignedRequest {
  readonly canonicalRequest: string;
  readonly stringToSign: string;
  /** 64 hexadecimal digits. */
  readonly signature: string;
  /** The value of the `Authorization` header. */
  readonly authorization: string;
  /** To be added to the request. */
  readonly headers: SignedHeaders & Record<string, string>;
}

/** The security token is there when the credentials carry a session token. */
export interface SignedHeaders {
  readonly "X-Amz-Date": string;
  readonly "X-Amz-Security-Token"?: string;
  readonly Authorization: string;
}

// --- 2. Errors ---
// One class and a closed list of codes. Branch on `code`; the message is for people.

/** Why a call failed. */
export type AembitAuthErrorCode =
  /** An option, a variable, a flag or a URL is missing or malformed. */
  | "invalid_config"
  /** No source had any AWS credentials; the message lists each with its reason. */
  | "no_aws_credentials"
  /** A source answered with something unusable or expired, or STS refused the web identity. */
  | "invalid_aws_credentials"
  /** A source that is configured could not be reached, or kept failing. */
  | "metadata_unavailable"
  /** No region in the options, the environment or the metadata. */
  | "no_region"
  /** Aembit answered 4xx; `status` and Aembit's own words say which and why. */
  | "edge_rejected"
  /** The login is good, but no Access Policy grants this credential. */
  | "no_matching_policy"
  /** Aembit could not be reached, or answered 429 or 5xx to every attempt. */
  | "edge_unavailable"
  /** What answered is not Aembit: no JSON, a redirect, an endless body. */
  | "invalid_edge_response"
  /** `timeoutMs` passed; the message names what was being waited for. */
  | "timeout";

/** The command's exit status for each code, what to do, and whether waiting may help. */
const ERRORS: Readonly<Record<AembitAuthErrorCode, ErrorRow>> = {
  invalid_config: [2],
  no_aws_credentials: [3],
  invalid_aws_credentials: [3],
  metadata_unavailable: [3, "check the endpoint", true],
  no_region: [3],
  edge_rejected: [4, "check the Trust Provider"],
  no_matching_policy: [4, "check the Access Policy"],
  edge_unavailable: [5, "check the Edge URL", true],
  invalid_edge_response: [5, "check the Edge URL"],
  timeout: [5, "", true],
};

type ErrorRow = readonly [exit: number, hint?: string, retryable?: true];

/** Facts that go with an {@link AembitAuthError}. */
export interface AembitAuthErrorDetails {
  /** HTTP status of the answer, if there was one. */
  readonly status?: number | undefined;
  /** How often the request was sent. */
  readonly attempts?: number | undefined;
  /** Default: as for the code in general. */
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
    this.prototype.name = "AembitAuthError";
  }
  readonly code: AembitAuthErrorCode;
  readonly retryable: boolean;
  // Declared only: a field would be there, and shown, as undefined.
  declare readonly status?: number;
  declare readonly attempts?: number;

  constructor(code: AembitAuthErrorCode, message: string, details: AembitAuthErrorDetails = {}) {
    super(message, details.cause ? details : {});
    this.code = code;
    this.retryable = details.retryable ?? ERRORS[code][2] ?? false;
    if (details.status) this.status = details.status;
    if (details.attempts) this.attempts = details.attempts;
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
export function authenticate(options?: AembitAuthOptions): Promise<AembitToken> {
  return runCall(options, newMemory(), exchange);
}

/**
 * The body of `POST /edge/v1/auth`, signed now and not sent. Plain data, and a secret: whoever
 * has it is this workload for about 15 minutes.
 *
 * @throws {AembitAuthError} when there are no credentials or no region
 */
export function createAuthRequest(options?: AembitAuthOptions): Promise<AuthRequest> {
  return runCall(options, newMemory(), async (call) => {
    const { clientId } = readEdge(call);
    return { clientId, client: attest(call, await gatherEvidence(call)) };
  });
}

/**
 * Finds AWS credentials as {@link authenticate} would, and asks Aembit nothing. Secret key and
 * session token are hidden in the result.
 *
 * @throws {AembitAuthError} `no_aws_credentials` when no source is configured, else what the one
 *   that is says: `invalid_aws_credentials`, `metadata_unavailable`
 * @see https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
 */
export function loadAwsCredentials(options?: AembitAuthOptions): Promise<AwsCredentials> {
  return runCall(options, newMemory(), findCredentials);
}

/**
 * Finds the region as {@link authenticate} would, such as `eu-west-1`.
 *
 * @throws {AembitAuthError} `no_region` when nothing names one, `invalid_config` for what is none
 */
export function resolveRegion(options?: AembitAuthOptions): Promise<string> {
  return runCall(options, newMemory(), findRegion);
}

/**
 * Reads the container and task metadata of ECS, each as base64 of the very bytes.
 *
 * @throws {AembitAuthError} `invalid_config` off ECS, `metadata_unavailable` when it can't be read
 * @see https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
 */
export function readEcsMetadata(options?: AembitAuthOptions): Promise<EcsMetadata> {
  return runCall(options, newMemory(), fetchEcsMetadata);
}

/**
 * The origin that a client ID stands for: `https://{tenant}.ec.{stack}.aembit.io`.
 *
 * @throws {AembitAuthError} `invalid_config` for anything that is not an Edge SDK Client ID
 */
export function edgeUrlFromClientId(clientId: string): string {
  assertConfig(isClientId(clientId), `clientId must be ${CLIENT_ID_FORM}`);
  return originOfClientId(clientId);
}

/** One exchange within a call: nothing is sent before the whole configuration has been read. */
async function exchange(call: Call): Promise<AembitToken> {
  const { clientId } = readEdge(call);
  return parseToken(await postSigned(call, "auth", { clientId }));
}

/** All that a signed request is made of, but for the time. */
interface Evidence {
  readonly credentials: AwsCredentials;
  readonly region: string;
  readonly documents: { readonly ecs?: EcsMetadata } & Partial<InstanceIdentity>;
}

/** Signs with the time of this very moment: a signature that waited is a signature that fails. */
function attest(call: Call, { credentials, region, documents }: Evidence): ClientAttestation {
  const { lambdaArn, clientWorkloadId } = call;
  return {
    aws: {
      stsGetCallerIdentity: signGetCallerIdentity(credentials, region, new Date(clock(call))),
      ...documents,
      ...(lambdaArn && { lambda: { arn: lambdaArn } }),
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
  // Without the documents that belong to it, it is read again for the next exchange.
  const whole = evidence?.documents.ecs || call.ecsMetadata !== "auto" || !ecsMetadataBase(call);
  if (!evidence || !whole || lifeLeftMs <= REREAD_BEFORE_EXPIRY_MS) {
    if (memory.reading?.ended !== false) {
      memory.reading = new Shared((own) => readEvidence({ ...call, signal: own, once: {} }));
    }
    try {
      memory.evidence = evidence = await memory.reading.join(signal);
    } catch (error) {
      signal.throwIfAborted();
      if (!evidence || lifeLeftMs <= 0) throw error;
      call.logger.warn("going on with the old credentials");
    }
  }
  const { secretAccessKey, sessionToken } = evidence.credentials;
  keepSecret(call, secretAccessKey, sessionToken);
  return evidence;
}

/** Reads at the same time what does not depend on each other, and fails in a fixed order. */
async function readEvidence(call: Call): Promise<Evidence> {
  // What is malformed is reported before anything is asked of anyone.
  const onEcs = ecsMetadataBase(call) || call.ecsMetadata !== "require";
  assertConfig(onEcs, `${ECS_METADATA_URI} must be set`);
  const credentials = findCredentials(call);
  const region = findRegion(call);
  const ecs = findEcsMetadata(call);
  const instance = call.instanceIdentity ? fetchInstanceIdentity(call) : undefined;
  // Whoever fails second is not listened to any more, which is not an unhandled rejection.
  for (const started of [region, ecs, instance]) started?.catch(() => {});
  return {
    credentials: await credentials,
    region: await region,
    documents: { ...(await ecs), ...(await instance) },
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

/**
 * A client for the life of a process. Make one and share it.
 *
 * The constructor reads nothing and never throws; bad options reject the first call.
 */
export class AembitAuth {
  #options: AembitAuthOptions | undefined;
  #memory: Memory = newMemory();
  #renewShare: number = RENEW_SHARE + Math.random() * SPREAD_SHARE;
  #token: AembitToken | undefined;
  /** The end of the token, which nobody can change as they can the `Date` they were given. */
  #endsMs = 0;
  /** The last exchange that was begun, and the last that was forced. */
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
    const { signal, forceRefresh } = readCallOptions(options, this.#options);
    const token = this.#token;
    if (token && !forceRefresh) {
      const lifeMs = token.expiresIn * 1000;
      const leftMs = this.#endsMs - this.#nowMs();
      // With more than a life left the clock was set back, and the end cannot be told any more.
      if (leftMs > Math.min(USABLE_MS, lifeMs * USABLE_SHARE) && leftMs <= lifeMs + USABLE_MS) {
        if (leftMs < lifeMs * this.#renewShare) this.#renewBehind();
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
    const wanted = toCredentialsBody(request);
    return runCall(this.#options, this.#memory, async (call) =>
      parseCredentials(await this.#ask(call, wanted)), signal);
  }

  async #ask(call: Call, wanted: object, last = false): Promise<Reply> {
    const token = await this.getToken({ signal: call.signal });
    keepSecret(call, token.accessToken);
    // The exchange may have learnt in the meantime how wrong the clock is.
    call.skewMs = this.#memory.skewMs;
    const reply = await postSigned(call, "credentials", wanted, token.accessToken);
    if (reply.status !== 401 || last) return reply;
    // Another caller may have replaced the token already: only the refused one is dropped.
    if (this.#token === token) this.#token = undefined;
    return this.#ask(call, wanted, true);
  }

  #nowMs(): number {
    return (this.#options?.now ?? Date.now)();
  }

  /** A failure stays silent while the held token serves; later calls try again. */
  #renewBehind(): void {
    if (this.#running?.ended === false) return;
    if (Math.abs(this.#nowMs() - this.#failedMs) < RENEWAL_PAUSE_MS) return;
    // Waits for it itself, so that it goes on when every other caller has gone.
    this.#exchange().join().catch(() => {
      this.#failedMs = this.#nowMs();
    });
  }

  /** The exchange under way, or a new one. One that was not forced serves no forced call. */
  #exchange(forced?: boolean): Shared<AembitToken> {
    const running = forced ? this.#forced : this.#running;
    if (running?.ended === false) return running;
    const started: Shared<AembitToken> = new Shared(async (signal) => {
      const token = await runCall(this.#options, this.#memory, exchange, signal);
      // One that began earlier and took longer must not undo a forced one.
      if (this.#running === started || !this.#token) {
        this.#token = token;
        this.#endsMs = this.#nowMs() + token.expiresIn * 1000;
      }
      return token;
    });
    this.#running = started;
    if (forced) this.#forced = started;
    return started;
  }
}

// --- 5. Options and environment ---
// The only place that reads `process.env`, but for the runtime's own proxy settings. Everything is
// checked before the first packet, and a complaint names the option, its flag or its variable, and
// never the value, which may be a secret in the wrong place.

/** Room for three attempts at Aembit that all time out. */
const DEFAULT_TIMEOUT_MS = 30_000;
/** As the AWS SDKs: https://docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html */
const DEFAULT_MAX_ATTEMPTS = 3;
/** Longer timers fire at once: https://nodejs.org/api/timers.html#settimeoutcallback-delay-args */
const MAX_TIMEOUT_MS = 2 ** 31 - 1;
/** Safe in a header, a URL and a log line. */
const isText = matches(/^[\x21-\x7e]+$/);
/** What IDs are made of, for messages. */
const TEXT = "visible ASCII";
// https://docs.aembit.io/api-guide/edge/auth/aws-iam-role
const CLIENT_ID_FORM = "aembit:{stack}:{tenant}:identity:{type}:{uuid}";
/** Stack and tenant become parts of a host name: nothing but host labels may stand there. */
const isClientId =
  matches(/^aembit(:(?!-)[a-z\d-]{1,63}(?<!-)){2}:identity:[\w-]+:[\da-f-]{36}$/i);
// https://docs.aws.amazon.com/lambda/latest/api/API_GetFunction.html
const isLambdaArn = matches(/^arn:[\w-]+:lambda:[\w:$-]+$/);
/** A form and not a list: a new region must work without a new release of this file. */
const A_REGION = "like us-east-1";
const isRegion = matches(/^[a-z]{2,}(-[a-z\d]+)+-\d+$/);
const SOURCES = "auto|env|web-identity|ecs|imds";
const ECS_MODES = "auto|require|omit";
/** How the command prints a credential: the shells quote, the last is for the AWS SDKs. */
const FORMATS = "json|sh-export|sh-env|powershell-env|aws-credential-process";

/** What a value must be, how that is told, and the variables that stand in for it. */
type Rows = Readonly<Record<string, readonly [
  check: (value: unknown) => boolean,
  rule: string,
  ...variables: string[],
]>>;

/** The options that are flags as well; `credentials` is none, but a source. */
const OPTIONS: Rows = {
  clientId: [isClientId, CLIENT_ID_FORM, "AEMBIT_CLIENT_ID"],
  edgeUrl: [isEdgeUrl, "https://{host}", "AEMBIT_EDGE_BASE_URL"],
  resourceSetId: [isText, TEXT, "AEMBIT_RESOURCE_SET_ID"],
  clientWorkloadId: [isText, TEXT, "CLIENT_WORKLOAD_ID"],
  region: [isRegion, A_REGION, "AWS_REGION", "AWS_DEFAULT_REGION"],
  lambdaArn: [isLambdaArn, "a function's ARN"],
  source: [isOneOf(SOURCES), SOURCES],
  ecsMetadata: [isOneOf(ECS_MODES), ECS_MODES],
  timeoutMs: [(v) => isWithin(v, MAX_TIMEOUT_MS), "up to 24 days (flag: seconds)"],
  instanceIdentity: [isBoolean, "a boolean"],
};

/** What only a program can give, to a client or to one call. */
const SETTINGS: Rows = {
  signal: [(v) => v instanceof AbortSignal, "an AbortSignal"],
  fetch: [isFunction, "a function"],
  env: [isRecord, "an object"],
  now: [isFunction, "a function"],
  logger: [(v) => isRecord(v) && isFunction(v["debug"]) && isFunction(v["warn"]), "a logger"],
  forceRefresh: [isBoolean, "a boolean"],
  maxAttempts: [(v) => isWithin(v, 100) && Number.isInteger(v), "1 to 100"],
  connectionMetadata: [(v) => isRecord(v) && Object.values(v).every(isString), "text"],
};

/** The Server Workload whose credential is wanted. */
const REQUEST: Rows = {
  host: [matches(/^[\w.:[\]-]+$/), "a host"],
  port: [(v) => isWithin(v, 65_535) && Number.isInteger(v), "1 to 65535"],
  credentialType: [isText, "a word"],
};

/** What only the command line can give. */
const SWITCHES: Rows = {
  outputFormat: [isOneOf(FORMATS), FORMATS],
  json: [isBoolean, "a boolean"],
  verbose: [isBoolean, "a boolean"],
  help: [isBoolean, "a boolean"],
  version: [isBoolean, "a boolean"],
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
  readonly now: () => number;
  /** A variable, trimmed unless it is wanted raw; empty is unset, as in every AWS SDK. */
  readonly env: (name: string, raw?: "raw") => string | undefined;
  readonly logger: AembitLogger;
}

/** An option is what was given, else its variable, else its default. */
function readOptions(options: AembitAuthOptions = {}): Config {
  const env: Config["env"] = (name, raw) => {
    const value = String((options.env ?? process.env)[name] ?? "");
    return (raw ? value : value.trim()) || undefined;
  };
  const set = readTable({ ...OPTIONS, ...SETTINGS }, options, env);
  return {
    source: "auto",
    ecsMetadata: "auto",
    timeoutMs: DEFAULT_TIMEOUT_MS,
    maxAttempts: DEFAULT_MAX_ATTEMPTS,
    fetch: globalThis.fetch,
    now: Date.now,
    logger: { debug() {}, warn() {} },
    ...set,
    credentials: options.credentials,
    env,
  };
}

/** What is set, checked. Without an environment, only what was given counts. */
function readTable(rows: Rows, given: unknown, env?: Config["env"]): Record<string, unknown> {
  assertConfig(isRecord(given), "options must be an object");
  const set: Record<string, unknown> = {};
  for (const [name, [isRight, rule, ...names]] of Object.entries(rows)) {
    const variable = given[name] === undefined && names.find((candidate) => env?.(candidate));
    const found = variable ? env?.(variable) : given[name];
    if (found === undefined) continue;
    const value = isString(found) ? found.trim() : found;
    assertConfig(isRight(value), `${variable || nameOf(name)} must be ${rule}`);
    set[name] = value;
  }
  return set;
}

/** `region (--region, AWS_REGION)`: as it is known in a program, a command line, an environment. */
function nameOf(option: string): string {
  const { [option]: [, , ...variables] = [] } = OPTIONS;
  const others = [`--${toFlag(option)}`, ...variables].join(", ");
  return option in SETTINGS ? option : `${option} (${others})`;
}

/** `timeoutMs` is `timeout`, in seconds, as a person would type it. */
function toFlag(option: string): string {
  const words = option.replace(/^(host|port)$/, "server-workload-$1").replace("Ms", "");
  return words.replace(/[A-Z]/g, "-$&").toLowerCase();
}

/** Checked without waiting: an aborted caller is told so even where a token is at hand. */
function readCallOptions(options?: TokenOptions, client?: AembitAuthOptions): TokenOptions {
  // Most calls have none, and are answered from memory within a microsecond.
  if (options) readTable(SETTINGS, options);
  options?.signal?.throwIfAborted();
  if (client?.signal?.aborted) throw client.signal.reason;
  return options ?? {};
}

function originOfClientId(clientId: string): string {
  const [, stack, tenant] = clientId.split(":");
  return `https://${tenant}.ec.${stack}.aembit.io`.toLowerCase();
}

/** Whom to ask. The client ID is required even where the URL is given: Aembit looks it up. */
function readEdge({ clientId, edgeUrl }: Call): { readonly clientId: string; origin: string } {
  assertConfig(clientId, `${nameOf("clientId")} must be set`);
  return { clientId, origin: edgeUrl ? new URL(edgeUrl).origin : originOfClientId(clientId) };
}

/** The attestation is a bearer secret: TLS always, but for a test server on this machine. */
function isEdgeUrl(value: unknown): boolean {
  const url = parseHttpUrl(value);
  const bare = url?.href === `${url?.origin}/`;
  return bare && (url.protocol === "https:" || isLoopback(url));
}

/** An http or https URL that carries no credentials, which would end up in logs. */
function parseHttpUrl(value: unknown): URL | undefined {
  const whole = isText(value) && /^https?:\/\/[^/@]+(\/|$)/i.test(value) && URL.canParse(value);
  return whole ? new URL(value) : undefined;
}

/** `new URL()` has already written 127.1 and 0x7f.1 out as 127.0.0.1. */
function isLoopback({ hostname }: URL): boolean {
  return /^(localhost|\[::1\]|127\.[\d.]+)$/.test(hostname);
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

/** Where `auto` looks, in this order. One of the variables configures a source. */
const SOURCE_TABLE: readonly (readonly [
  name: CredentialSource,
  load: (call: Call) => Promise<AwsCredentials>,
  ...variables: string[],
])[] = [
  ["env", loadFromEnvironment, KEY_ID, SECRET_KEY],
  ["web-identity", loadFromWebIdentity, IDENTITY_FILE],
  ["ecs", loadFromContainer, RELATIVE_URI, FULL_URI],
  // It needs no variable, and is asked when all else is unset.
  ["imds", loadFromImds],
];

/**
 * The credentials of the first source that is configured. Not `async`, nor are the loaders: what
 * is malformed throws at once, before a packet of any other reader is on its way.
 */
function findCredentials(call: Call): Promise<AwsCredentials> {
  if (call.credentials !== undefined) return loadFromCaller(call);
  const { source, env } = call;
  const reasons: string[] = [];
  for (const [name, load, ...variables] of SOURCE_TABLE) {
    if (source !== "auto" && source !== name) continue;
    if (variables.length === 0 || variables.some((variable) => env(variable))) {
      call.logger.debug(`credentials: ${name}`);
      return load(call).catch((error: unknown) => {
        // Off AWS, IMDS says what it was, and the others why they were not asked.
        if (!isCode(error, "no_aws_credentials")) throw error;
        reasons.push(`${name}: ${error.message}`, "give the workload a role");
        throw new AembitAuthError(error.code, reasons.join("; "), error);
      });
    }
    reasons.push(`${name}: ${variables.join(", ")} not set`);
  }
  throw new AembitAuthError("no_aws_credentials", reasons.join("; "));
}

/** Read at call time: Lambda and tests change the environment of a running process. */
function loadFromEnvironment(call: Call): Promise<AwsCredentials> {
  const accessKeyId = call.env(KEY_ID);
  const secretAccessKey = call.env(SECRET_KEY);
  const pair = accessKeyId && secretAccessKey;
  assertConfig(pair, `${KEY_ID} and ${SECRET_KEY} must be set`);
  const fields = { accessKeyId, secretAccessKey, sessionToken: call.env("AWS_SESSION_TOKEN") };
  return Promise.resolve(checkGiven(call, fields, KEY_ID));
}

/** A malformed value is the caller's mistake; what a function returns is its source's. */
function loadFromCaller(call: Call): Promise<AwsCredentials> {
  const { credentials } = call;
  const from = "credentials";
  if (!isFunction(credentials)) return Promise.resolve(checkGiven(call, credentials, from));
  const given = Promise.resolve().then(() => credentials());
  return during(call, `waiting for ${from}()`, given).then(
    (answer) => checkGiven(call, answer, from, "invalid_aws_credentials"),
    (cause: unknown) => {
      throw new AembitAuthError("metadata_unavailable", `${from}() failed`, { cause });
    },
  );
}

/** Whose mistake it is when they are malformed depends; expired is always the same. */
function checkGiven(
  call: Call,
  value: unknown,
  from: string,
  code: AembitAuthErrorCode = "invalid_config",
): AwsCredentials {
  return checkCredentials(call, value, clock(call), (problem, expired) =>
    new AembitAuthError(expired ? "invalid_aws_credentials" : code, `${from}: ${problem}`));
}

/**
 * Foreign credentials become ours only whole: no empty string, no character that a header would
 * refuse (and quote in its error), no date that is `NaN` and therefore never expires.
 */
function checkCredentials(
  call: Call,
  value: unknown,
  nowMs: number,
  complain: (problem: string, expired?: boolean) => AembitAuthError,
): AwsCredentials {
  const fields = isRecord(value) ? value : {};
  keepSecret(call, fields["secretAccessKey"], fields["sessionToken"]);
  const text = (name: string): string => {
    const field = fields[name];
    if (isText(field)) return field;
    throw complain(`${name} must be visible ASCII`);
  };
  const accessKeyId = text("accessKeyId");
  const secretAccessKey = text("secretAccessKey");
  const sessionToken = fields["sessionToken"] ? text("sessionToken") : undefined;
  const given = fields["expiration"] ?? undefined;
  const expiration = isDate(given) ? given : undefined;
  if (given !== undefined && !expiration) throw complain("expiration must be a date");
  if (expiration && expiration.getTime() <= nowMs) throw complain("expired", true);
  return conceal({
    accessKeyId,
    ...(expiration && { expiration: new Date(expiration) }),
  }, { secretAccessKey, ...(sessionToken && { sessionToken }) });
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
  return checkCredentials(reply.call, fields, serverClock(reply), (problem) =>
    failure(reply, "invalid_aws_credentials", problem));
}

/**
 * The JSON of IMDS and of container endpoints. A container endpoint sends no `Code`; where there
 * is one it must be `Success`, and the service's own message explains any other.
 */
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
function parseCredentialDocument(reply: Reply): AwsCredentials {
  const document = parseJson(expectOk(reply).text);
  const { Code = "Success", SecretAccessKey, Token } = isRecord(document) ? document : {};
  // The service's message may quote them.
  keepSecret(reply.call, SecretAccessKey, Token);
  if (!isRecord(document) || Code !== "Success") {
    throw failure(reply, "invalid_aws_credentials", "expected credentials");
  }
  // What others call the session token is here just the token.
  return toCredentials(reply, (name) => document[name.replace("Session", "")]);
}

/** The ECS agent and the EKS Pod Identity agent: plain http, but never off the machine. */
const CONTAINER_HOSTS = ["169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];
/** Fixed by AWS; the relative URI is a path on it. */
const ECS_AGENT = "http://169.254.170.2";

/** ECS, Fargate, EKS Pod Identity, Lambda SnapStart: one endpoint, named by the environment. */
function loadFromContainer(call: Call): Promise<AwsCredentials> {
  const path = call.env(RELATIVE_URI);
  if (path === undefined) return fetchFromContainer(call, metadataUrl(call, FULL_URI));
  // "@evil.example/" or ":8080/" behind the address would name another host or port.
  assertConfig(/^\/(?!\/)/.test(path), `${RELATIVE_URI} must be a path`);
  return fetchFromContainer(call, metadataUrl(call, RELATIVE_URI, ECS_AGENT));
}

/** Plain http only to addresses that cannot leave the machine; https to any host. */
function metadataUrl({ env }: Call, variable: string, base = ""): string {
  const url = parseHttpUrl(`${base}${env(variable)}`);
  const local = url && (isLoopback(url) || CONTAINER_HOSTS.includes(url.hostname));
  const right = local || url?.protocol === "https:";
  assertConfig(right, `${variable} must be https, or http to ${CONTAINER_HOSTS.join(", ")}`);
  return url.href;
}

/** The token is sent as it is, without `Bearer`, and its file read each time: it is replaced. */
async function fetchFromContainer(call: Call, url: string): Promise<AwsCredentials> {
  const file = `${AUTH_TOKEN}_FILE`;
  const from = call.env(file) ? file : AUTH_TOKEN;
  const token = from === file ? await readTokenFile(call, file) : call.env(AUTH_TOKEN, "raw");
  keepSecret(call, token);
  if (token !== undefined && !/^[\x20-\x7e]+$/.test(token)) {
    throw new AembitAuthError("invalid_aws_credentials", `${from} must be visible ASCII`);
  }
  const headers = { ...(token && { Authorization: token }) };
  return parseCredentialDocument(
    await sendMetadata(call, { name: "container credentials", url, headers }));
}

/** What the file system says of a file that cannot be read is the best there is to say. */
async function readTokenFile(call: Call, variable: string): Promise<string> {
  const step = `reading ${variable}`;
  try {
    // Loaded on demand: most workloads have no token file, and every start pays for imports.
    const { readFile } = await import("node:fs/promises");
    return await during(call, step, readFile(String(call.env(variable)), "utf8"));
  } catch (error) {
    const cause = cleanError(call, error);
    throw new AembitAuthError("invalid_aws_credentials", `${step}: ${cause.message}`, { cause });
  }
}

/** STS is across the network, and may have to ask the identity provider for its keys. */
const STS_ATTEMPT_MS = 5_000;

/** EKS IRSA: STS turns the service account's token into role credentials. */
// https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html
function loadFromWebIdentity(call: Call): Promise<AwsCredentials> {
  const RoleArn = call.env("AWS_ROLE_ARN");
  assertConfig(RoleArn, `AWS_ROLE_ARN must be set for ${IDENTITY_FILE}`);
  const RoleSessionName = call.env("AWS_ROLE_SESSION_NAME") ?? "aembit-auth";
  return assumeRole(call, { RoleArn, RoleSessionName });
}

async function assumeRole(call: Call, names: Record<string, string>): Promise<AwsCredentials> {
  const WebIdentityToken = (await readTokenFile(call, IDENTITY_FILE)).trim();
  keepSecret(call, WebIdentityToken);
  const Action = "AssumeRoleWithWebIdentity";
  const form = new URLSearchParams({ Action, Version: "2011-06-15", ...names, WebIdentityToken });
  const reply = await send(call, {
    name: `STS ${Action}`,
    method: "POST",
    url: `https://${stsHost(await findRegion(call))}/`,
    headers: { "Content-Type": FORM },
    body: () => String(form),
    timeoutMs: STS_ATTEMPT_MS,
  });
  if (isRejection(reply.status)) {
    throw failure(reply, "invalid_aws_credentials", "check the trust policy");
  }
  return toCredentials(expectOk(reply), (name) => xmlText(reply.text, name));
}

// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
const IMDS_ENDPOINTS: Readonly<Record<string, string>> = {
  ipv4: "http://169.254.169.254",
  ipv6: "http://[fd00:ec2::254]",
};
const IMDS_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
/** Six hours, the longest that IMDS grants: asked for in seconds, and kept for as long. */
const IMDS_TOKEN_MS = 21_600_000;
/** Off AWS nobody answers: two tries of a second each, and the error is there within three. */
const IMDS_SEARCH_MS = 2_300;
const IMDS_ROLES = "/meta-data/iam/security-credentials/";
const IMDS_ROLE = /^(?!\.+$)[\w+=,.@-]{1,64}$/;

/** Only `true` disables it, as in botocore and the Go SDK. */
function imdsDisabled({ env }: Call): boolean {
  return env(NO_IMDS)?.toLowerCase() === "true";
}

/** The role of the instance: its name, then its credentials. The name is kept for later calls. */
async function loadFromImds(call: Call): Promise<AwsCredentials> {
  if (imdsDisabled(call)) throw new AembitAuthError("no_aws_credentials", `${NO_IMDS} is true`);
  const role = call.memory.role ?? await fetchImdsRole(call);
  const reply = await imdsGet(call, "credentials", IMDS_ROLES + role);
  // Where the instance profile was replaced, the role has another name, and is asked for anew.
  call.memory.role = reply.status === 404 ? undefined : role;
  return parseCredentialDocument(reply);
}

/** The list has one role. It becomes part of a path, so it must look like a role's name. */
async function fetchImdsRole(call: Call): Promise<string> {
  const reply = await imdsGet(call, "role", IMDS_ROLES);
  if (reply.status === 404 || expectOk(reply).bytes?.length === 0) {
    throw failure(reply, noCredentials(call), "give the instance a role");
  }
  const role = reply.text.split("\n", 1).join("").trim();
  if (IMDS_ROLE.test(role)) return role;
  throw failure(reply, "invalid_aws_credentials", "not a role");
}

/** What it means that IMDS has none: whoever names the source says that it is there. */
function noCredentials({ source }: Call): AembitAuthErrorCode {
  return source === "auto" ? "no_aws_credentials" : "metadata_unavailable";
}

/** One GET with the session token; a 401 means that the token has ended: it is renewed once. */
async function imdsGet(call: Call, name: string, path: string): Promise<Reply> {
  const url = imdsEndpoint(call) + path;
  const get = (token: string): Promise<Reply> => {
    const headers = { "X-aws-ec2-metadata-token": token };
    return sendMetadata(call, { name: `IMDS ${name}`, url, headers });
  };
  const token = await imdsToken(call);
  const reply = await get(token);
  if (reply.status !== 401) return reply;
  // Of two reads that were refused at once, the second finds the first one's renewal under way.
  if (call.memory.token?.value === token) {
    call.memory.token = undefined;
    call.once.token = undefined;
  }
  return get(await imdsToken(call));
}

/** The endpoint wins over the mode, as in every AWS SDK. */
function imdsEndpoint({ env }: Call): string {
  const mode = env(`${IMDS_ENDPOINT}_MODE`) ?? "IPv4";
  const url = parseHttpUrl(env(IMDS_ENDPOINT) ?? IMDS_ENDPOINTS[mode.toLowerCase()]);
  assertConfig(url, `${IMDS_ENDPOINT} must be a URL, or ${IMDS_ENDPOINT}_MODE IPv4 or IPv6`);
  return `${trimUrl(url.href)}/latest`;
}

/** The session token of IMDSv2, fetched once for all readers. There is no way back to IMDSv1. */
async function imdsToken(call: Call): Promise<string> {
  const kept = call.memory.token;
  // By a clock that was set back, or on its way, it may have ended all the same: a 401 will say so.
  if (kept && clock(call) < kept.endsMs) {
    keepSecret(call, kept.value);
    return kept.value;
  }
  return call.once.token ??= fetchImdsToken(call);
}

async function fetchImdsToken(call: Call): Promise<string> {
  const reply = await sendMetadata(call, {
    name: "IMDS token",
    method: "PUT",
    url: `${imdsEndpoint(call)}/api/token`,
    headers: { "X-aws-ec2-metadata-token-ttl-seconds": "21600" },
    deadlineMs: performance.now() + (call.source === "auto" ? IMDS_SEARCH_MS : Infinity),
  });
  const { status } = reply;
  if (status === 0 || isRejection(status)) {
    const hint = "not on EC2, or a container's hop limit is not 2";
    throw failure(reply, noCredentials(call), hint);
  }
  const value = expectOk(reply).text.trim();
  if (!isText(value)) throw failure(reply, "invalid_aws_credentials", "not a token");
  keepSecret(call, value);
  // Where it ends sooner than was asked for, a 401 will say so.
  call.memory.token = { value, endsMs: clock(call) + IMDS_TOKEN_MS };
  return value;
}

// --- 7. Region and metadata ---
// The region becomes part of a host name and of the signature, so only a region's form gets
// through. The ECS documents are evidence: their bytes are passed on as they came.

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

/** For what comes from documents and callers; options have been checked as such. */
function parseRegion(value: unknown, from = "region"): string {
  const region = isString(value) ? value.trim() : value;
  assertConfig(isRegion(region), `${from} must be ${A_REGION}`);
  return region;
}

/** Once for each call: the signature, STS and the doctor mean the same region. */
function findRegion(call: Call): Promise<string> {
  return call.once.region ??= searchRegion(call);
}

/** As given, then the ARN of the task, then IMDS. The error says of each why it had none. */
async function searchRegion(call: Call): Promise<string> {
  if (call.region) return call.region;
  const reasons = [`${nameOf("region")} not set`];
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
  throw new AembitAuthError("no_region", reasons.join("; "));
}

/** `arn:{partition}:ecs:{region}:{account}:task/…`: ECS on EC2 sets no AWS_REGION of its own. */
async function regionOfTask(call: Call): Promise<string | undefined> {
  const base = ecsMetadataBase(call);
  const document = base && parseJson((await fetchTask(call, base)).text);
  const arn = isRecord(document) ? String(document["TaskARN"]) : "";
  const [, , service, region] = arn.split(":");
  return service === "ecs" ? parseRegion(region, "TaskARN") : undefined;
}

/** `placement/region`, not the availability zone less a letter: Local Zones are named otherwise. */
async function regionOfInstance(call: Call): Promise<string | undefined> {
  if (imdsDisabled(call)) return undefined;
  const reply = await imdsGet(call, "region", "/meta-data/placement/region");
  return expectOk(reply).bytes && parseRegion(reply.text, "IMDS region");
}

// https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-metadata-endpoint-v4.html
const ECS_METADATA_URI = "ECS_CONTAINER_METADATA_URI_V4";

/** Undefined off ECS. The host rule is that of the credentials: this is an identity, too. */
function ecsMetadataBase(call: Call): string | undefined {
  return call.env(ECS_METADATA_URI) && trimUrl(metadataUrl(call, ECS_METADATA_URI));
}

/** Both documents at the same time; the limit of the endpoint is 40 requests a second. */
function fetchEcsMetadata(call: Call): Promise<EcsMetadata> {
  const base = ecsMetadataBase(call);
  assertConfig(base, `${ECS_METADATA_URI} must be set`);
  const container = fetchEcsDocument(call, "ECS container metadata", base);
  return Promise.all([container, fetchTask(call, base)]).then(([own, task]) =>
    ({ containerMetadata: toDocument(own), taskMetadata: toDocument(task) }));
}

/** Off ECS there is none. On ECS a failure is worth a warning, and an error when required. */
function findEcsMetadata(call: Call): Promise<Evidence["documents"]> {
  const { ecsMetadata: mode, logger } = call;
  const required = mode === "require";
  if (mode === "omit" || !(required || ecsMetadataBase(call))) return Promise.resolve({});
  return fetchEcsMetadata(call).then((ecs) => ({ ecs }), (error: unknown) => {
    if (required || !isCode(error, "metadata_unavailable")) throw error;
    logger.warn(`going on without ${error.message}`);
    return {};
  });
}

/** The task document serves as evidence and for the region: it is read once for both. */
function fetchTask(call: Call, base: string): Promise<Reply> {
  return call.once.task ??= fetchEcsDocument(call, "ECS task metadata", `${base}/task`);
}

/** A container may ask before the agent has registered it: that 404 passes. */
async function fetchEcsDocument(call: Call, name: string, url: string): Promise<Reply> {
  return expectOk(await sendMetadata(call, { name, url, retry404: true }));
}

/** In the field names of the Edge API. */
interface InstanceIdentity {
  readonly instanceIdentityDocument: string;
  readonly instanceIdentityDocumentSignature: string;
}

/** IMDS breaks the signature into lines; Aembit takes it on one. */
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-identity-documents.html
async function fetchInstanceIdentity(call: Call): Promise<InstanceIdentity> {
  assertConfig(!imdsDisabled(call), `instanceIdentity: ${NO_IMDS} is true`);
  const read = (name: string): Promise<Reply> =>
    imdsGet(call, `instance identity ${name}`, `/dynamic/instance-identity/${name}`);
  const [document, signature] = await Promise.all([read("document"), read("signature")]);
  const oneLine = expectOk(signature).text.replace(/\s+/g, "");
  if (!/^[\w+/=]+$/.test(oneLine)) {
    throw failure(signature, "metadata_unavailable", "expected base64");
  }
  return {
    instanceIdentityDocument: toDocument(document),
    instanceIdentityDocumentSignature: oneLine,
  };
}

/** For services that answer 200 or nothing of use: 204, 206 and redirects are failures as well. */
function expectOk(reply: Reply): Reply {
  if (reply.status === 200) return reply;
  throw failure(reply, "metadata_unavailable");
}

/**
 * Base64 of the bytes: decoding would replace what is not UTF-8. The text is looked at only to
 * tell a document from a proxy's page.
 */
function toDocument(reply: Reply): string {
  const { bytes, text } = expectOk(reply);
  if (bytes && isRecord(parseJson(text))) return bytes.toString("base64");
  throw failure(reply, "metadata_unavailable", "expected JSON");
}

// --- 8. Signature Version 4 ---
// Pure functions, one for each artefact the documentation names. No clock, no environment.
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html

/** The only one that needs nothing but hashes. */
const ALGORITHM = "AWS4-HMAC-SHA256";
const FORM = "application/x-www-form-urlencoded; charset=utf-8";
/** Aembit rebuilds exactly this body from nothing, so not a byte of it may vary. */
const GET_CALLER_IDENTITY = "Action=GetCallerIdentity&Version=2011-06-15";
/** One key for each credentials object, and gone with it: it serves a day and a region. */
const KEYS = new WeakMap<AwsCredentials, { readonly keyOf: string; readonly key: Uint8Array }>();

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
  return { headers: { "Content-Type": FORM, ...signed.headers }, region: checked };
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
  const { accessKeyId, secretAccessKey, sessionToken: token } = credentials;
  const added = { "X-Amz-Date": amzDate, ...(token && { "X-Amz-Security-Token": token }) };
  const headers = canonicalHeaders(request.headers, Object.entries(added));
  const names = [...headers.keys()].sort();
  const canonical = canonicalRequest(request, headers, names, normalizePath);
  const toSign = stringToSign(amzDate, scope, canonical);
  const keyOf = `${secretAccessKey}/${scope}`;
  let kept = KEYS.get(credentials);
  if (kept?.keyOf !== keyOf) {
    kept = { keyOf, key: signingKey(secretAccessKey, amzDate, region, service) };
    KEYS.set(credentials, kept);
  }
  const signature = createHmac("sha256", kept.key).update(toSign).digest("hex");
  const authorization =
    `${ALGORITHM} Credential=${accessKeyId}/${scope}, ` +
    `SignedHeaders=${names.join(";")}, Signature=${signature}`;
  return {
    canonicalRequest: canonical,
    stringToSign: toSign,
    signature,
    authorization,
    headers: { ...added, Authorization: authorization },
  };
}

/** What is not checked here would be quoted by a runtime's error later on, or forge the scope. */
function assertSignable(request: SignableRequest, context: SigningContext): void {
  const { method, path, body = "" } = request;
  const { region, service, credentials, date } = context;
  const { accessKeyId, secretAccessKey, sessionToken } = credentials ?? {};
  const texts = [method, region, service, accessKeyId, secretAccessKey, sessionToken || "none"];
  const right = texts.every(isText) && isString(path);
  assertConfig(right, "request and credentials must be visible ASCII");
  assertConfig(isString(body) || body instanceof Uint8Array, "body must be text");
  assertConfig(isDate(date), "date must be a date");
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
  given: Iterable<readonly [string, string]>,
  added: readonly (readonly [string, string])[],
): Map<string, string> {
  const headers = new Map<string, string>();
  assertConfig(isFunction(given?.[Symbol.iterator]), "headers must be visible ASCII");
  for (const [name, value] of given) {
    const key = String(name).toLowerCase();
    const clean = String(value).replace(/[\t\n\r ]+/g, " ").replace(/^ | $/g, "");
    const right = isString(value) && /^[\w.-]+$/.test(key) && /^[\x20-\x7e]*$/.test(clean);
    assertConfig(right, "headers must be visible ASCII");
    const before = headers.get(key);
    headers.set(key, before === undefined ? clean : `${before},${clean}`);
  }
  for (const [name, value] of added) headers.set(name.toLowerCase(), value);
  return headers;
}

/** Method, path, query, headers, their names, and the hash of the body, a line each. */
function canonicalRequest(
  request: SignableRequest,
  headers: ReadonlyMap<string, string>,
  names: readonly string[],
  normalizePath: boolean,
): string {
  // A character for each byte of UTF-8: escapes may be of bytes that are no text.
  const [path = "", ...query] = Buffer.from(request.path).toString("latin1").split("?");
  const lines = names.map((name) => `${name}:${headers.get(name)}\n`).join("");
  // A caller that sends the hash, or UNSIGNED-PAYLOAD, has it signed as the payload's hash too.
  const { body = "" } = request;
  const payloadHash = headers.get("x-amz-content-sha256") ?? sha256(body);
  return [
    request.method.toUpperCase(),
    canonicalPath(path, normalizePath),
    canonicalQuery(query.join("?")),
    lines,
    names.join(";"),
    payloadHash,
  ].join("\n");
}

/** Algorithm, time, scope, and the hash of the canonical request. */
function stringToSign(amzDate: string, scope: string, canonical: string): string {
  return `${ALGORITHM}\n${amzDate}\n${scope}\n${sha256(canonical)}`;
}

/** Four hashes of the seven that a signature takes. */
function signingKey(secret: string, amzDate: string, region: string, service: string): Uint8Array {
  const hmac = (key: string | Uint8Array, data: string): Uint8Array =>
    createHmac("sha256", key).update(data).digest();
  const dateKey = hmac(`AWS4${secret}`, amzDate.slice(0, 8));
  return hmac(hmac(hmac(dateKey, region), service), "aws4_request");
}

/** Encoded once as given, so that what the caller has encoded is encoded twice, as AWS wants. */
function canonicalPath(path: string, normalize: boolean): string {
  const kept: string[] = [];
  for (const segment of path.split("/")) {
    if (segment === "..") kept.pop();
    else if (segment !== "" && segment !== ".") kept.push(segment);
  }
  if (path.endsWith("/") && kept.length > 0) kept.push("");
  const plain = normalize || path === "" ? `/${kept.join("/")}` : path;
  return plain.split("/").map(encode).join("/");
}

/** Decoded, so that `%41` and `A` are one; sorted after encoding, by name and then by value. */
function canonicalQuery(query: string): string {
  const pairs = query.split("&").filter(Boolean).map((pair) => {
    const [name = "", ...value] = pair.split("=");
    // A space sorts before every encoded character: by name first, and never by locale.
    return `${encode(decode(name))} ${encode(decode(value.join("=")))}`;
  });
  return pairs.sort().join("&").replaceAll(" ", "=");
}

/** RFC 3986: every byte but the unreserved characters. */
function encode(bytes: string): string {
  return bytes.replace(/[^\w.~-]/g, (byte) =>
    `%${Buffer.from(byte, "latin1").toString("hex").toUpperCase()}`);
}

/** A `%` that starts no escape stands for itself. */
function decode(bytes: string): string {
  return bytes.replace(/%([\da-f]{2})/gi, (_, hex: string) =>
    Buffer.from(hex, "hex").toString("latin1"));
}

/** Lower-case hexadecimal, as every artefact wants it. */
function sha256(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

// --- 9. Answers of Aembit ---
// Each answer is checked field by field before anything of it is believed.

/** A clock further off than this is corrected, as the AWS SDKs do: AWS bears five minutes. */
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html
const MAX_SKEW_MS = 4 * 60_000;
/** Aembit asks STS in the meantime, so it is given longer than metadata. */
const EDGE_ATTEMPT_MS = 10_000;
/** The last instant a `Date` can hold. */
const MAX_DATE_MS = 8.64e15;

/**
 * Posts a signed body. If Aembit refuses it while its `Date` says that our clock is wrong, the
 * clock is the likely reason: the body is signed once more with Aembit's time. A correction that
 * helped is kept for later calls.
 */
async function postSigned(
  call: Call,
  endpoint: string,
  fields: object,
  accessToken?: string,
): Promise<Reply> {
  const { origin } = readEdge(call);
  const evidence = await gatherEvidence(call);
  const request: Outgoing = {
    name: "Aembit",
    method: "POST",
    url: `${origin}/edge/v1/${endpoint}`,
    headers: {
      "Content-Type": "application/json",
      Accept: "application/json",
      ...(call.resourceSetId && { "X-Aembit-ResourceSet": call.resourceSetId }),
      ...(accessToken && { Authorization: `Bearer ${accessToken}` }),
    },
    body: () => JSON.stringify({ ...fields, client: attest(call, evidence) }),
    timeoutMs: EDGE_ATTEMPT_MS,
  };
  const first = await send(call, request);
  const skewMs = serverClock(first) - clock(call);
  if (first.headers.has("date")) call.memory.seenSkewMs = skewMs;
  if (!isRejection(first.status) || Math.abs(skewMs) <= MAX_SKEW_MS) return first;
  call.skewMs += skewMs;
  const skew = `the clock is ${offBy(skewMs)}, signed again`;
  call.logger.warn(skew);
  const second = await send(call, request);
  const { status } = second;
  if (status > 0 && (status < 400 || status >= 500)) call.memory.skewMs = call.skewMs;
  return { ...second, attempts: first.attempts + second.attempts, note: skew };
}

/** Positive when the clock here is behind. */
function offBy(skewMs: number): string {
  return `off by ${Math.round(skewMs / 1000)} s`;
}

/** The JSON of a success; anything else says who has to act, and whether waiting helps. */
function parseEdgeAnswer(reply: Reply): Record<string, unknown> {
  const { status, bytes, text } = reply;
  const body = parseJson(text);
  // Some failures come with a status of success.
  const success = isRecord(body) && body["success"] !== false;
  if (success && status >= 200 && status < 300) return body;
  if (status > 0 && (status < 400 || !bytes)) throw failure(reply, "invalid_edge_response");
  throw failure(reply, isRejection(status) ? "edge_rejected" : "edge_unavailable");
}

/** A token that could not stand in a header, or that never ends, is worse than none. */
function parseToken(reply: Reply): AembitToken {
  const { accessToken, expiresIn, tokenType: type } = parseEdgeAnswer(reply);
  const tokenType = type ?? "Bearer";
  if (!isText(accessToken) || !isText(tokenType) || !isWithin(expiresIn, Number.MAX_VALUE)) {
    throw failure(reply, "invalid_edge_response", "accessToken or expiresIn is wrong");
  }
  // By our own uncorrected clock, which is the one that callers compare it with.
  const expiresAt = new Date(Math.min(reply.call.now() + expiresIn * 1000, MAX_DATE_MS));
  return conceal({ tokenType, expiresIn, expiresAt }, { accessToken });
}

/** The caller's part of the body: checked like options, before the first packet. */
function toCredentialsBody(request: AembitCredentialsRequest): object {
  const set = readTable({ ...REQUEST, ...SETTINGS }, request);
  const { host, port, credentialType, connectionMetadata } = set;
  for (const name of Object.keys(REQUEST)) {
    assertConfig(set[name], `${nameOf(name)} must be set`);
  }
  const server = { transportProtocol: "TCP", host, port };
  return { server, credentialType, connectionMetadata };
}

/** A 404 and the type `Unknown` both mean that no Access Policy matched. */
function parseCredentials(reply: Reply): AembitCredentials {
  const { credentialType, expiresAt, data } =
    reply.status === 404 ? { credentialType: "Unknown" } : parseEdgeAnswer(reply);
  if (credentialType === "Unknown") {
    throw failure(reply, "no_matching_policy");
  }
  const ends = parseDate(expiresAt) ?? null;
  if (!isText(credentialType) || !(ends === null || isDate(ends)) || !isRecord(data)) {
    throw failure(reply, "invalid_edge_response", "expiresAt or data is wrong");
  }
  return { credentialType, expiresAt: ends, data: conceal({}, data) };
}

// --- 10. One HTTP request ---
// The only function that touches the network, with the rules that hold for every request: no
// redirect, a deadline for each attempt, a limit for each body, and which answers are tried again.

/** A deadline of the whole attempt: behind an idle time-out, a server that drips holds us. */
const METADATA_ATTEMPT_MS = 1_000;
/** The largest document here, the task metadata, is some 15 KiB. */
const MAX_BODY_BYTES = 1_048_576;
/** The first pause is at most this, and each may be twice the one before… */
const BACKOFF_BASE_MS = 200;
/** …up to this: with three attempts, a call has not lost its 30 seconds to pauses. */
const BACKOFF_CAP_MS = 2_000;
/** 0 is no answer at all. */
const RETRIED: readonly number[] = [0, 429, 500, 502, 503, 504];

/** A request before it is sent, and how much patience it deserves. */
interface Outgoing {
  /** The subject of every message about this request. */
  readonly name: string;
  readonly method?: "GET" | "POST" | "PUT";
  readonly url: string;
  readonly headers?: Readonly<Record<string, string>>;
  /** Made for each attempt: a signature must not wait out the pause before it. */
  readonly body?: () => string;
  /** Metadata is a second away at most. */
  readonly timeoutMs?: number;
  readonly retry404?: boolean;
  /** On the monotonic clock: no attempt may start that could end later than this. */
  readonly deadlineMs?: number;
}

/** An answer, with what it takes to judge it and to speak of it. */
interface Reply {
  readonly call: Call;
  readonly request: Outgoing;
  /** 0: there was no answer, for the reason that `cause` gives. */
  readonly status: number;
  readonly headers: Headers;
  /** Undefined when the body was too large to be read. */
  readonly bytes: Buffer | undefined;
  readonly text: string;
  readonly attempts: number;
  readonly cause?: Error;
  readonly note?: string;
}

/** Metadata is never behind a proxy. */
function sendMetadata(call: Call, request: Outgoing): Promise<Reply> {
  // With a transport of the caller's own, proxies are the caller's business.
  if (call.fetch === globalThis.fetch) assertDirect(new URL(request.url));
  return send(call, request);
}

/** Sends until there is an answer worth having, or no more attempts, or no more time. */
async function send(call: Call, request: Outgoing, attempts = 1): Promise<Reply> {
  const reply = { ...(await attempt(call, request)), attempts };
  const { status, bytes, headers } = reply;
  const step = outcome(reply);
  call.logger.debug(step);
  const passing = RETRIED.includes(status) || (status === 404 && request.retry404);
  // An endless body is not asked for twice.
  if (!passing || (status > 0 && !bytes) || attempts >= call.maxAttempts) return reply;
  const pauseMs = pauseAfter(reply);
  const resumeMs = performance.now() + pauseMs;
  // The server asked for more time than there is: waiting for it would only waste it.
  if (headers.has("retry-after") && resumeMs >= call.deadlineMs) {
    return { ...reply, note: `asks to wait ${Math.ceil(pauseMs / 1000)} s, past the deadline` };
  }
  if (resumeMs + METADATA_ATTEMPT_MS > (request.deadlineMs ?? Infinity)) return reply;
  await during(call, step, sleep(pauseMs, undefined, { signal: call.signal }));
  return send(call, request, attempts + 1);
}

/** As the server asks, else full jitter: the pauses of many clients must not fall together. */
// https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
function pauseAfter(reply: Reply): number {
  const after = reply.headers.get("retry-after") ?? "";
  const isSeconds = /^\d+$/.test(after);
  // What is no date of HTTP is ignored: Date.parse would take "1.5" for a day in January.
  const date = Date.parse(after.includes(":") ? after : "");
  const askedMs = isSeconds ? Number(after) * 1000 : date - serverClock(reply);
  if (askedMs >= 0) return askedMs;
  return Math.random() * Math.min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** (reply.attempts - 1));
}

/** What one attempt has brought. */
type Answer = Omit<Reply, "attempts">;

/** One attempt: an answer, or why there was none. Only the end of the call is thrown. */
async function attempt(call: Call, request: Outgoing): Promise<Answer> {
  const { method = "GET", url, headers = {}, timeoutMs = METADATA_ATTEMPT_MS } = request;
  const { fetch } = call;
  call.signal.throwIfAborted();
  const body = request.body?.() ?? null;
  const controller = new AbortController();
  const { signal } = controller;
  const timer = setTimeout(() =>
    controller.abort(new Error(`no answer within ${timeoutMs} ms`)), timeoutMs);
  let answer: Answer =
    { call, request, status: 0, headers: new Headers(), bytes: undefined, text: "" };
  try {
    // The race is for transports that do not listen to their signal.
    const response = fetch(url, { method, headers, body, redirect: "manual", signal });
    const read = untilAborted(response.then(readAnswer), signal);
    answer = { ...answer, ...(await during(call, `waiting for ${labelOf(request)}`, read)) };
  } catch (error) {
    call.signal.throwIfAborted();
    answer = { ...answer, cause: cleanError(call, error) };
  } finally {
    clearTimeout(timer);
    // The unread rest of a body would keep the connection and its sender busy.
    if (!answer.bytes) controller.abort();
  }
  return answer;
}

/** With the whole body, unless it is larger than anybody here has reason to send. */
async function readAnswer(
  { status, headers, body }: Response,
): Promise<Partial<Reply>> {
  const chunks: Uint8Array[] = [];
  let length = 0;
  for await (const chunk of body ?? []) {
    length += chunk.byteLength;
    if (length > MAX_BODY_BYTES) return { status, headers };
    chunks.push(chunk);
  }
  const bytes = Buffer.concat(chunks);
  return { status, headers, bytes, text: new TextDecoder().decode(bytes) };
}

/**
 * Through a proxy, a metadata request would be answered with the identity of the proxy's host.
 * `fetch` takes no word on proxies, so where the runtime would use one the call stops here. Only
 * the host's own name in NO_PROXY counts, or `*` alone: on all else no two runtimes agree.
 */
// https://nodejs.org/api/cli.html#node_use_env_proxy1
function assertDirect({ protocol, hostname, origin }: URL): void {
  const { env, versions: { bun, deno }, execArgv } = process;
  // Bun and Deno do so unasked; Node has it from 22.21 and 24.5, and only when asked.
  const asked = env["NODE_USE_ENV_PROXY"] === "1"
    || /--use.env.proxy/.test(`${execArgv} ${env["NODE_OPTIONS"]}`);
  if (!bun && !deno && !asked) return;
  // Without a proxy of its own, https goes through that of http.
  const variable = protocol === "https:" ? /^(https?|all)_proxy$/i : /^(http|all)_proxy$/i;
  const proxy = Object.keys(env).find((name) => variable.test(name) && env[name]);
  // Deno does not know `*`, and wants IPv6 addresses without the brackets of the others.
  const [own = ""] = [hostname.replace(/[[\]]/g, ""), hostname].slice(Number(!deno));
  const lists = [env["no_proxy"], env["NO_PROXY"]].filter((list) => list !== undefined);
  const exempt = lists.length > 0 && lists.every((list) =>
    list.trim().split(/\s*,\s*/).includes(own) || (list === "*" && !deno));
  const wanted = [...lists, own].join(",");
  assertConfig(!proxy || exempt, `${proxy} would proxy ${origin}: set NO_PROXY=${wanted}`);
}

/** 4xx, but for 429, which only says: not now. */
function isRejection(status: number): boolean {
  return status >= 400 && status < 500 && status !== 429;
}

/** The server's time, or ours where it does not say. */
function serverClock({ call, headers }: Reply): number {
  return Date.parse(headers.get("date") ?? "") || clock(call);
}

/** `Aembit: POST https://…`: what is asked, and where. */
function labelOf({ name, method = "GET", url }: Outgoing): string {
  return `${name}: ${method} ${trimUrl(url)}`;
}

/** `Aembit: POST https://… answered 503 (attempt 3)`: what was tried, where, what came back. */
function outcome({ request, status, attempts, cause, note }: Reply): string {
  const answer = cause ? `failed: ${cause.message}` : `answered ${status}`;
  const tries = attempts > 1 ? ` (attempt ${attempts})` : "";
  return `${labelOf(request)} ${answer}${tries}${note ? `; ${note}` : ""}`;
}

/** The error of an answer: what was tried, what the service says of it, and what to do next. */
function failure(reply: Reply, code: AembitAuthErrorCode, hint = ERRORS[code][1]): AembitAuthError {
  const { status, attempts, cause } = reply;
  const message = [outcome(reply), serviceMessage(reply), hint].filter(Boolean).join("; ");
  const retryable = RETRIED.includes(status) || status >= 500;
  const details = { status, attempts, cause, retryable };
  return new AembitAuthError(code, message, details);
}

// --- 11. Deadlines and shared work ---
// Every wait is tied to a signal, every signal to a deadline, and no listener stays behind.

/** What is worth keeping between the calls of one client. */
interface Memory {
  token?: { value: string; endsMs: number } | undefined;
  role?: string | undefined;
  evidence?: Evidence | undefined;
  reading?: Shared<Evidence>;
  /** Aembit's clock less ours, as far as it was needed. */
  skewMs: number;
  /** The same as last seen, for the doctor. */
  seenSkewMs?: number;
  /** What is being waited for, for the message when time runs out. */
  readonly steps: string[];
}

/** A call of its own starts from nothing; a client keeps one for its life. */
function newMemory(): Memory {
  return { skewMs: 0, steps: [] };
}

/** One call under way: its configuration, its end, and what it has learnt. */
interface Call extends Omit<Config, "signal"> {
  readonly memory: Memory;
  readonly signal: AbortSignal;
  /** On the monotonic clock, which nobody sets. */
  readonly deadlineMs: number;
  /** Reads that several parts of the call wait for. */
  readonly once: {
    token?: Promise<string> | undefined;
    region?: Promise<string>;
    task?: Promise<Reply>;
  };
  /** Cut out of whatever a server says. */
  readonly secrets: Set<string>;
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
  const call: Call = {
    ...config,
    memory,
    signal,
    deadlineMs: performance.now() + timeoutMs,
    once: {},
    secrets: new Set(),
    skewMs: memory.skewMs,
  };
  const timer = setTimeout(() => {
    const reasons = [`no answer within ${timeoutMs} ms, ${nameOf("timeoutMs")}`, ...memory.steps];
    controller.abort(new AembitAuthError("timeout", reasons.join("; ")));
  }, timeoutMs);
  try {
    const ends = [config.signal, outer, signal];
    for (const end of ends) end?.throwIfAborted();
    let result = work(call);
    for (const end of ends) result = untilAborted(result, end);
    return await result;
  } finally {
    clearTimeout(timer);
    // Reads that the result did not need, or that failed with it, stop here.
    controller.abort();
  }
}

/** Work that any number of callers wait for, and that is abandoned with the last of them. */
class Shared<T> {
  readonly result: Promise<T>;
  /** Settled or abandoned: not to be joined any more. */
  ended = false;
  #waiting = 0;
  #controller = new AbortController();

  constructor(work: (signal: AbortSignal) => Promise<T>) {
    this.result = work(this.#controller.signal).finally(() => {
      this.ended = true;
      // Reads that failed with it stop here.
      this.#controller.abort();
    });
  }

  async join(signal?: AbortSignal): Promise<T> {
    this.#waiting += 1;
    try {
      return await untilAborted(this.result, signal);
    } finally {
      this.#waiting -= 1;
      if (this.#waiting === 0) {
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
    const abandon = (): void => reject(signal.reason);
    if (signal.aborted) abandon();
    else signal.addEventListener("abort", abandon, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener("abort", abandon));
  });
}

/** Work and what it is, for the message when time runs out before it is done. */
function during<T>({ memory, signal }: Call, step: string, work: Promise<T>): Promise<T> {
  const { steps } = memory;
  steps.push(step);
  return untilAborted(work, signal).finally(() => steps.splice(steps.indexOf(step), 1));
}

/** The time, corrected by what Aembit's clock has taught us. */
function clock(call: Call): number {
  return call.now() + call.skewMs;
}

// --- 12. Text and secrets ---
// Whatever a server or a runtime says is cut down to one harmless line before it is shown.

/** Enough for any sentence of a service, too little for a page of a proxy. */
const MAX_SHOWN = 200;

/**
 * From here on the text is cut out of whatever is shown of a server's words, and so is each of its
 * own words: however a server has escaped it, those stay as they are.
 */
function keepSecret(call: Call, ...secrets: readonly unknown[]): void {
  for (const secret of secrets) {
    if (!isString(secret) || !secret) continue;
    for (const word of [secret, ...secret.match(/\w{3,}/g) ?? []]) call.secrets.add(word);
  }
}

/**
 * One line of at most 200 printable characters, with the secrets of the call cut out of it, and
 * every unbroken run of 40 or more characters of which keys, tokens and signatures are made.
 */
function shown(call: Call, text: string): string {
  // What is not shown anyway is not worked on: a megabyte of hostile text would take seconds.
  let line = text.slice(0, 10_000).replace(/[\p{C}\p{Z}]+/gu, " ")
    .replace(/[\w+/=.~%-]{40,}/g, "[cut]");
  // The longest first: a word of one secret may be the beginning of another.
  for (const secret of [...call.secrets].sort((left, right) => right.length - left.length)) {
    line = line.replaceAll(secret, "[cut]");
  }
  return [...line.trim()].slice(0, MAX_SHOWN).join("");
}

/** What a service says of its refusal: Aembit and AWS in JSON or XML, the agents in plain text. */
function serviceMessage({ call, text, status }: Reply): string {
  const json = parseJson(text);
  // The message of an answer that brings secrets may quote them.
  if (isRecord(json) && ("data" in json || "accessToken" in json)) return "";
  const fields = isRecord(json) ? json : {};
  const words = ["Code", "code", "message", "Message"].map((name) =>
    fields[name] ?? xmlText(text, name)).filter(isString);
  // Markup and broken JSON tell a person nothing, and the body of a success may be a secret.
  if (status >= 400 && !/^\s*[<{[]/.test(text)) words.push(text);
  const said = shown(call, words.join(": "));
  return said && `"${said}"`;
}

/**
 * The system code of a runtime's error, or its words without the URL. The error itself goes no
 * further: Bun's holds the whole URL, and header errors quote the value.
 */
function cleanError(call: Call, error: unknown): Error {
  const outer = isRecord(error) ? error : {};
  const inner = isRecord(outer["cause"]) ? outer["cause"] : outer;
  const code = inner["code"] ?? outer["code"];
  const words = String(inner["message"] ?? "unknown").replace(/\S+:\/\/\S+/g, "");
  const text = shown(call, isText(code) ? code : words);
  return Object.assign(new Error(text), isText(code) && { code: text });
}

/** A URL that can be shown, and added to: without its query, which may hold anything. */
function trimUrl(url: string): string {
  return url.replace(/\/*([?#].*)?$/, "");
}

/**
 * How an object with secrets shows itself: by its own properties, not by the getters on its
 * prototype. Node, Bun and Deno ask for the second method before they look at anything else.
 */
class Concealed {
  toJSON(): object {
    return { ...this };
  }

  [Symbol.for("nodejs.util.inspect.custom")](): object {
    return { ...this };
  }
}

/**
 * An object whose hidden values are read by property only. Properties that are merely not
 * enumerable would not do: `util.inspect` with `showHidden` prints them.
 */
function conceal<S extends object, H extends object>(visible: S, hidden: H): Readonly<S & H> {
  const getters: object = new Concealed();
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
  const text = isString(value) ? value : "";
  return new Date(/T[\d:.]+$/.test(text) ? `${text}Z` : text);
}

/** The values of STS need no entities, and its tags no attributes. */
function xmlText(text: string, tag: string): string | undefined {
  return new RegExp(`<${tag}>([^<]*)</${tag}>`).exec(text)?.[1]?.trim();
}

/** JSON's objects, and what else has named parts: environments, options, errors. */
function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isFunction(value: unknown): value is (...args: unknown[]) => unknown {
  return typeof value === "function";
}

function isString(value: unknown): value is string {
  return typeof value === "string";
}

function isBoolean(value: unknown): value is boolean {
  return typeof value === "boolean";
}

function isDate(value: unknown): value is Date {
  return value instanceof Date && Number.isInteger(value.getTime());
}

/** For texts of one form. */
function matches(form: RegExp): (value: unknown) => value is string {
  return (value): value is string => isString(value) && form.test(value);
}

/** For `a|b|c`, as the help text shows a choice. */
function isOneOf(choice: string): (value: unknown) => boolean {
  return (value) => isString(value) && choice.split("|").includes(value);
}

/** A positive number up to a limit. What is below 1 ms or 1 attempt is no limit at all. */
function isWithin(value: unknown, limit: number): value is number {
  return typeof value === "number" && value > 0 && value <= limit;
}

/** For the few places that tell one failure of ours from another. */
function isCode(error: unknown, code: AembitAuthErrorCode): error is AembitAuthError {
  return error instanceof AembitAuthError && error.code === code;
}

// --- 13. Command line ---
// The result on stdout, everything else on stderr, one line for a failure, and an exit status that
// a script can act on.

/** Every flag as the parser of Node wants it, and what it must be. */
const FLAGS = Object.fromEntries(
  Object.entries({ ...OPTIONS, ...REQUEST, ...SWITCHES }).map(([name, [isRight, rule]]) =>
    [toFlag(name), { type: isRight === isBoolean ? "boolean" : "string", rule, name } as const]));

/** The options that are numbers, and how many of theirs make one of the flag's. */
const FACTORS: Readonly<Record<string, number>> = { timeoutMs: 1000, port: 1 };

/** The same as options, which are checked where all options are. */
type FlagOptions = AembitAuthOptions & AembitCredentialsRequest & {
  readonly outputFormat?: string;
  readonly json?: boolean;
  readonly verbose?: boolean;
  readonly help?: boolean;
  readonly version?: boolean;
};

/** Every command: what help says of it, and what prints its result. */
const COMMANDS: Readonly<Record<string, readonly [
  help: string,
  run: (options: FlagOptions) => Promise<void>,
]>> = {
  token: ["an access token", async (options) => {
    const { accessToken, ...rest } = await authenticate(options);
    print(options.json ? JSON.stringify({ accessToken, ...rest }) : accessToken);
  }],
  // For `curl --json @-`, to see what Aembit says with nothing of ours in between.
  request: ["the signed body, a secret", async (options) =>
    print(JSON.stringify(await createAuthRequest(options)))],
  // Without a client ID: these headers are for STS, whoever replays them.
  headers: ["the signed headers, a secret", async (options) => {
    const { aws } = await runCall(options, newMemory(), async (call) =>
      attest(call, await gatherEvidence({ ...call, ecsMetadata: "omit" })));
    print(JSON.stringify(aws.stsGetCallerIdentity));
  }],
  credentials: ["a credential", printCredentials],
  doctor: ["check each step", examine],
};

/** What a shell reports for a process that SIGINT has ended. */
const EXIT_INTERRUPTED = 130;

/** Runs the command line and sets the exit status. What is not an error of ours is a bug. */
async function main(args: string[]): Promise<void> {
  const { stdout, stderr } = process;
  const interrupt = new AbortController();
  const { signal } = interrupt;
  const tell = (line: string): void => void stderr.write(`${line}\n`);
  // A reader that has seen enough (`| head`) is no failure of ours.
  for (const stream of [stdout, stderr]) stream.on("error", () => {});
  process.once("SIGINT", () => interrupt.abort());
  try {
    const { command, flags } = await parseArguments(args);
    const debug = (line: string): unknown => flags.verbose && tell(`aembit-auth: ${line}`);
    const warn = (line: string): void => tell(`aembit-auth: warning: ${line}`);
    const options = { ...flags, signal, logger: { debug, warn } };
    if (flags.version) print(VERSION);
    else if (flags.help) print(usage());
    else await COMMANDS[command]?.[1](options);
  } catch (error) {
    process.exitCode = EXIT_INTERRUPTED;
    if (signal.aborted) return;
    if (!(error instanceof AembitAuthError)) throw error;
    const { code, message, status } = error;
    const json = JSON.stringify({ error: { code, message, status } });
    tell(args.includes("--json") ? json : `aembit-auth: ${code}: ${message}`);
    process.exitCode = ERRORS[code][0];
  }
}

/** Results go to stdout, and nothing else does. */
function print(line: string): void {
  process.stdout.write(`${line}\n`);
}

/** What is not known is refused together with what is. */
async function parseArguments(args: string[]): Promise<{ command: string; flags: FlagOptions }> {
  const { parseArgs } = await import("node:util");
  const names = Object.keys(COMMANDS).join("|");
  try {
    const { values, positionals } = parseArgs({ args, options: FLAGS, allowPositionals: true });
    const [command = "token", ...more] = positionals;
    assertConfig(isOneOf(names)(command) && more.length === 0, `commands are ${names}`);
    return { command, flags: toOptions(values) };
  } catch (error) {
    // The first sentence names the flag and what is wrong with it, and never a value.
    const words = String(error).replace(/^[^:]*: |[.\n].*/gs, "");
    assertConfig(false, `${words}; flags are --${Object.keys(FLAGS).join("|--")}`);
  }
}

/** The options that flags set. */
function toOptions(flags: Readonly<Record<string, unknown>>): FlagOptions {
  return Object.fromEntries(Object.entries(FLAGS).map(([flag, { name }]): unknown[] => {
    const value = flags[flag];
    const factor = FACTORS[name];
    return [name, factor && value !== undefined ? Number(value) * factor : value];
  }));
}

/** From the same tables that are obeyed, so that help cannot fall behind. */
function usage(): string {
  const row = (name: string, help: string): string => `  ${name.padEnd(24)} ${help}`;
  return [
    "aembit-auth [command] [flags]",
    ...Object.entries(COMMANDS).map(([name, [help]]) => row(name, help)),
    ...Object.entries(FLAGS).map(([name, { rule }]) => row(`--${name}`, rule)),
  ].join("\n");
}

/** What cannot work is refused before Aembit is asked. */
async function printCredentials(options: FlagOptions): Promise<void> {
  const format = String(readTable(SWITCHES, options)["outputFormat"] ?? "json");
  const fits = format !== "aws-credential-process" || options.credentialType === "AwsStsFederation";
  assertConfig(fits, `${format} needs --credential-type AwsStsFederation`);
  print(render(await new AembitAuth(options).getCredentials(options), format));
}

/** How a shell assigns a variable, and what stands for a quote within single quotes. */
// https://learn.microsoft.com/powershell/module/microsoft.powershell.core/about/about_quoting_rules
const SHELLS: Readonly<Record<string, readonly [string, string, quote: RegExp, quoted: string]>> = {
  "sh-export": ["export ", "=", /'/g, "'\\''"],
  "sh-env": ["", "=", /'/g, "'\\''"],
  // PowerShell takes four typographic quotes for its own.
  "powershell-env": ["$env:", " = ", /['‘’‚‛]/g, "$&$&"],
};

/** A credential as the format wants it, or an error for what the format cannot hold. */
function render(credential: AembitCredentials, format: string): string {
  const { data, expiresAt } = credential;
  // Hidden values are getters of the prototype, which `for…in` sees and spreading does not.
  const fields: [string, unknown][] = [];
  for (const name in data) fields.push([name, data[name]]);
  if (format === "json") return JSON.stringify({ ...credential, data: Object.fromEntries(fields) });
  const misfit = new AembitAuthError("invalid_edge_response", `data that does not fit ${format}`);
  const shell = SHELLS[format];
  if (!shell) {
    // https://docs.aws.amazon.com/sdkref/latest/guide/feature-process-credentials.html
    const { awsAccessKeyId, awsSecretAccessKey, awsSessionToken } = data;
    const texts = [awsAccessKeyId, awsSecretAccessKey, awsSessionToken ?? "none"];
    if (!texts.every(isText)) throw misfit;
    return JSON.stringify({
      Version: 1,
      AccessKeyId: awsAccessKeyId,
      SecretAccessKey: awsSecretAccessKey,
      SessionToken: awsSessionToken ?? undefined,
      Expiration: expiresAt ?? undefined,
    });
  }
  const [prefix, equals, quote, quoted] = shell;
  return fields.filter(([, value]) => value !== null).map(([key, value]) => {
    // `apiKey` becomes `API_KEY`. A key that is no name of a variable could be a command.
    const name = key.replace(/([a-z\d])([A-Z])/g, "$1_$2").toUpperCase();
    const text = isString(value) ? value : JSON.stringify(value);
    if (!/^[A-Z_][A-Z\d_]*$/.test(name) || text.includes("\0")) throw misfit;
    return `${prefix}${name}${equals}'${text.replace(quote, quoted)}'`;
  }).join("\n");
}

// --- 14. Doctor ---
// The same functions as in a real run, one at a time, each with its own line.

/** Prints a line for each check, and fails with the first that did: nothing is asked after it. */
async function examine(options: AembitAuthOptions): Promise<void> {
  const memory = newMemory();
  let failed: AembitAuthError | undefined;
  let settled = false;
  /** One line. An optional source may have none: the last to be asked has to. */
  const check = async (
    name: string,
    work: (call: Call) => unknown,
    optional?: boolean,
  ): Promise<void> => {
    let line = `-    ${name}: not asked`;
    try {
      const found = !failed && await runCall(options, memory, async (call) => work(call));
      if (found) line = `ok   ${name}: ${found}`;
    } catch (error) {
      if (!(error instanceof AembitAuthError)) throw error;
      const absent = optional && error.code === "no_aws_credentials";
      line = absent ? `-    ${error.message}` : `FAIL ${name}: ${error.code}: ${error.message}`;
      if (!absent) failed = error;
    }
    print(line);
  };
  await check("client ID", (call) => readEdge(call).clientId);
  await check("Edge URL", (call) => readEdge(call).origin);
  for (const [name] of SOURCE_TABLE) {
    await check(name, async (call) => {
      if (settled || (call.source !== "auto" && call.source !== name)) return;
      const { accessKeyId, expiration } = await findCredentials({ ...call, source: name });
      settled = true;
      return `${accessKeyId} ${expiration?.toJSON() ?? ""}`;
    }, name !== "imds" && name !== options.source);
  }
  await check("region", findRegion);
  await check("ECS metadata", async (call) =>
    (await findEcsMetadata(call)).ecs ? "read" : "none sent");
  await check("exchange", async (call) => `a token for ${(await exchange(call)).expiresIn} s`);
  // Learnt from any answer of Aembit; a wrong clock here may be why it refused.
  const { seenSkewMs } = memory;
  print(seenSkewMs === undefined ? "-    clock: not asked" : `ok   clock: ${offBy(seenSkewMs)}`);
  if (failed) throw failed;
}

/** Runs the command line if this file is what was started, and not part of something else. */
async function start(): Promise<void> {
  // Not taken apart: bundlers know these two by their whole names.
  const url = import.meta.url;
  const script = String(process.argv[1]);
  if (!url || !/[\\/]aembit-auth[^\\/]*$/.test(script)) return;
  // In a bundle `import.meta.main` is true for the whole program, whose name is another. Node
  // before 24 does not say, and the link in node_modules/.bin has another path than the file.
  if (!import.meta.main) {
    const { realpath } = await import("node:fs/promises");
    const real = (name: string | URL): Promise<unknown> => realpath(name).catch(() => name);
    if (await real(script) !== await real(new URL(url))) return;
  }
  await main(process.argv.slice(2));
}

void start();
