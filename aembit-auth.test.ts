/**
 * Tests of aembit-auth.ts, from outside: through its exports and its command, against real HTTP
 * servers on 127.0.0.1 (fixtures/cloud.ts), with no mocked module and nothing but loopback.
 *
 *   Signature Version 4, GetCallerIdentity        each artefact, against AWS's own vectors
 *   Configuration                                 every option, variable, flag and URL
 *   AWS credentials, region and metadata          every source, and what is refused of it
 *   the exchange                                  requests, errors, HTTP rules, a matrix of faults
 *                                                 over every endpoint, secrets, proxies
 *   a client that is left running                 lifetime, aborts, clocks, credentials
 *   The command line; being started, imported     commands, flags, formats, doctor, entry
 *   The package, the shape of the file            what is shipped, and how it reads
 *   on AWS's own addresses; in an empty root      inside namespaces, skipped where not permitted
 *   corners                                       what no other test turns
 */

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { getEventListeners, once } from "node:events";
import {
  copyFileSync, existsSync, linkSync, mkdirSync, mkdtempSync,
  readFileSync, readdirSync, realpathSync, rmSync, symlinkSync, writeFileSync,
} from "node:fs";
import { createServer, request as requestHttp } from "node:http";
import type { Server } from "node:http";
import * as nodeModule from "node:module";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { basename, delimiter, dirname, join } from "node:path";
import { after, before, beforeEach, describe, it, test } from "node:test";
import type { TestContext } from "node:test";
import { setImmediate as turn, setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { inspect } from "node:util";
import type { InspectOptions } from "node:util";
import { gzipSync } from "node:zlib";

import {
  AembitAuth, AembitAuthError, VERSION, authenticate, createAuthRequest, edgeUrlFromClientId,
  loadAwsCredentials, readEcsMetadata, resolveRegion, signGetCallerIdentity, signRequest,
} from "./aembit-auth.ts";
import type {
  AembitAuthErrorCode, AembitAuthOptions, AembitCredentialsRequest, AembitLogger, AembitToken,
  AuthRequest, AwsCredentials, SignableRequest, SigningContext,
} from "./aembit-auth.ts";
import { startCloud } from "./fixtures/cloud.ts";
import type {
  AccountName, Answer, Cloud, Env, FaultKind, Handler, KeyPair, Recorded, Service, ServiceName,
} from "./fixtures/cloud.ts";
import * as documents from "./fixtures/documents.ts";
import { FILE, ROOT, failure, runCommand, runProgram } from "./fixtures/harness.ts";
import type { Ended } from "./fixtures/harness.ts";
import { STS_BODY, STS_CONTENT_TYPE, judge, stsHost } from "./fixtures/judge.ts";
import { enterNamespace } from "./fixtures/real.ts";
import type { Places, Visit } from "./fixtures/real.ts";
import { json, text } from "./fixtures/service.ts";
import { suite, vectors } from "./fixtures/vectors.ts";

describe("Signature Version 4", () => {
  const context: SigningContext = {
    credentials: suite.credentials,
    region: suite.region,
    service: suite.service,
    date: suite.date,
  };
  const get = (path: string): SignableRequest =>
    ({ method: "GET", path, headers: [["Host", "example.amazonaws.com"]] });
  /** Of the canonical request: 1 is the path, 2 the query, the last the hash of the payload. */
  const line = (index: number, request: SignableRequest, more: Partial<SigningContext> = {}) =>
    signRequest(request, { ...context, ...more }).canonicalRequest.split("\n").at(index);

  test("the suite is complete", () => assert.equal(vectors.length, 31));

  for (const vector of vectors) {
    test(`every artefact of AWS's own case ${vector.name}`, () => {
      const { credentials, canonicalRequest, stringToSign, authorization } = vector;
      const signed = signRequest(vector.request, { ...context, credentials });
      const { sessionToken } = credentials;
      assert.equal(signed.canonicalRequest, canonicalRequest);
      assert.equal(signed.stringToSign, stringToSign);
      assert.equal(signed.authorization, authorization);
      assert.equal(signed.signature, authorization.split("Signature=")[1]);
      assert.deepEqual(Object.entries(signed.headers), [
        ["X-Amz-Date", "20150830T123600Z"],
        ...(sessionToken === undefined ? [] : [["X-Amz-Security-Token", sessionToken]]),
        ["Authorization", authorization],
      ]);
      assert.ok(vector.signedRequest.includes(`\nAuthorization: ${signed.authorization}`));
    });
  }

  const paths: readonly (readonly [name: string, path: string, canonical: string])[] = [
    ["an empty path is the root", "", "/"],
    ["letters beyond ASCII are UTF-8", "/ü/日本", "/%C3%BC/%E6%97%A5%E6%9C%AC"],
    ["the five marks that JavaScript leaves alone", "/!'()*", "/%21%27%28%29%2A"],
    ["what is encoded already is encoded again", "/a%20b%3Ac", "/a%2520b%253Ac"],
    ["a space is %20 and a plus is %2B", "/a b+c", "/a%20b%2Bc"],
    ["unreserved characters stay", "/-._~Az09", "/-._~Az09"],
    ["reserved characters do not", "/a:b@c=d,e;f$g&h", "/a%3Ab%40c%3Dd%2Ce%3Bf%24g%26h"],
    ["dot segments and doubled slashes go", "/a//b/./../c/", "/a/c/"],
    ["nothing is above the root", "/../../a", "/a"],
  ];
  for (const [name, path, canonical] of paths) {
    test(`path: ${name}`, () => assert.equal(line(1, get(path)), canonical));
  }

  test("without normalisation the path stays, and is still encoded", () => {
    const raw = { normalizePath: false };
    assert.equal(line(1, get("/a//b/./../c d/"), raw), "/a//b/./../c%20d/");
    assert.equal(line(1, get("//"), raw), "//");
  });

  const queries: readonly (readonly [name: string, query: string, canonical: string])[] = [
    ["an escape and its character are one", "a=%41%2d", "a=A-"],
    ["escapes in lower case become upper case", "a=%c3%bc", "a=%C3%BC"],
    ["names are sorted", "b=2&a=1", "a=1&b=2"],
    ["upper case sorts before lower case", "a=1&B=2", "B=2&a=1"],
    ["values of one name are sorted", "a=2&a=1&a=10", "a=1&a=10&a=2"],
    ["a name sorts before those it begins", "a-b=1&a=2", "a=2&a-b=1"],
    ["sorting follows encoding", "z=2&é=1", "%C3%A9=1&z=2"],
    ["a name without a value has an empty one", "b&a=", "a=&b="],
    ["only the first equals sign separates", "a=b=c", "a=b%3Dc"],
    ["a second question mark is data", "a=b?c", "a=b%3Fc"],
    ["a plus is a plus", "a=b+c", "a=b%2Bc"],
    ["a space is %20", "a=b c&d=e%20f", "a=b%20c&d=e%20f"],
    ["empty pairs go", "a=1&&b=2&", "a=1&b=2"],
    ["a percent sign at the end stands for itself", "a=100%", "a=100%25"],
    ["a percent sign before no digits stands for itself", "a=%zz", "a=%25zz"],
    ["an escape of half a character stays as it is", "a=%e0%A4", "a=%E0%A4"],
    ["an escape of no character stays as it is", "a=%ff", "a=%FF"],
    ["the five marks that JavaScript leaves alone", "a=!'()*", "a=%21%27%28%29%2A"],
  ];
  for (const [name, query, canonical] of queries) {
    test(`query: ${name}`, () => assert.equal(line(2, get(`/?${query}`)), canonical));
  }

  test("X-Amz-Content-Sha256 is signed, and its value is the payload's hash", () => {
    const request = { ...get("/"), body: "not hashed" };
    const headers = [...request.headers, ["x-amz-content-SHA256", "UNSIGNED-PAYLOAD"]] as const;
    const { canonicalRequest, authorization } = signRequest({ ...request, headers }, context);
    assert.ok(canonicalRequest.endsWith("\nUNSIGNED-PAYLOAD"));
    assert.match(authorization, /SignedHeaders=host;x-amz-content-sha256;x-amz-date,/);
    assert.match(canonicalRequest, /\nx-amz-content-sha256:UNSIGNED-PAYLOAD\n/);
  });

  const bodies: readonly (readonly [name: string, body: string | Uint8Array | undefined])[] = [
    ["bytes that are no text", Uint8Array.of(0, 255, 128, 10)],
    ["text as UTF-8", "naïve ☕"],
    ["no body", undefined],
    ["an empty body", ""],
  ];
  for (const [name, body] of bodies) {
    test(`the payload's hash is that of ${name}`, () => {
      const hash = createHash("sha256").update(body ?? "").digest("hex");
      assert.equal(line(-1, { ...get("/"), ...(body !== undefined && { body }) }), hash);
    });
  }

  test("a session token of the credentials is signed and sent, on a POST too", () => {
    const credentials = { ...suite.credentials, sessionToken: suite.sessionToken };
    const post = { ...get("/"), method: "POST", body: "Param1=value1" };
    const signed = signRequest(post, { ...context, credentials });
    assert.match(signed.authorization, /SignedHeaders=host;x-amz-date;x-amz-security-token,/);
    const token = suite.sessionToken;
    assert.equal(signed.headers["X-Amz-Security-Token"], token);
    assert.ok(signed.canonicalRequest.includes(`\nx-amz-security-token:${token}\n`));
  });

  test("a caller's X-Amz-Date and X-Amz-Security-Token are replaced, in any case", () => {
    const credentials = { ...suite.credentials, sessionToken: suite.sessionToken };
    const stale: readonly (readonly [string, string])[] = [
      ["x-amz-DATE", "19990101T000000Z"],
      ["X-AMZ-Security-Token", "stale"],
      ["X-Amz-Date", "19990102T000000Z"],
    ];
    const clean = get("/");
    const headers = [...clean.headers, ...stale];
    const signed = signRequest({ ...clean, headers }, { ...context, credentials });
    assert.deepEqual(signed, signRequest(clean, { ...context, credentials }));
  });

  test("a method is signed in upper case", () => {
    assert.equal(line(0, { ...get("/"), method: "post" }), "POST");
  });

  const keys = suite.credentials;
  const badInputs: readonly (readonly [name: string, request: object, context: object])[] = [
    ["no credentials", {}, { credentials: undefined }],
    ["credentials that are null", {}, { credentials: null }],
    ["an empty access key id", {}, { credentials: { ...keys, accessKeyId: "" } }],
    ["a missing secret", {}, { credentials: { accessKeyId: "AKIDEXAMPLE" } }],
    ["a secret that is a number", {}, { credentials: { ...keys, secretAccessKey: 1 } }],
    ["a line break in the key id", {}, { credentials: { ...keys, accessKeyId: "AK\nID" } }],
    ["a line break in the token", {}, { credentials: { ...keys, sessionToken: "a\nb" } }],
    ["a token beyond ASCII", {}, { credentials: { ...keys, sessionToken: "é" } }],
    ["an invalid date", {}, { date: new Date(NaN) }],
    ["a date that is a text", {}, { date: "2015-08-30" }],
    ["no region", {}, { region: undefined }],
    ["a region that is a number", {}, { region: 1 }],
    ["a line break in the region", {}, { region: "us-east-1\nx" }],
    ["no service", {}, { service: undefined }],
    ["a line break in the service", {}, { service: "sts\nx" }],
    ["no method", { method: undefined }, {}],
    ["a line break in the method", { method: "GET\n/" }, {}],
    ["no path", { path: undefined }, {}],
    ["no headers", { headers: undefined }, {}],
    ["a header value that is no text", { headers: [["Host", 5]] }, {}],
    ["a header name with a space", { headers: [["Ho st", "x"]] }, {}],
    ["an empty header name", { headers: [["", "x"]] }, {}],
    ["a header name with a line break", { headers: [["Host\nX", "x"]] }, {}],
    ["a NUL in a header value", { headers: [["Host", "a\0b"]] }, {}],
    ["a body that is a number", { body: 5 }, {}],
  ];
  for (const [name, request, more] of badInputs) {
    test(`${name} cannot be signed`, async () => {
      const args = [{ ...get("/"), ...request }, { ...context, ...more }];
      await failure(() => Reflect.apply(signRequest, undefined, args), "invalid_config");
    });
  }
});

describe("GetCallerIdentity", () => {
  const temporary = documents.fakeKeyPair("ASIAFAKEFAKEEXAMPLE1", "temporary");
  const permanent = documents.fakeKeyPair("AKIAFAKEFAKEEXAMPLE1", "permanent", false);
  const date = new Date("2025-01-15T10:30:45.678Z");
  const verdictOf = (identity: unknown, now: Date) =>
    judge(identity, {
      lookup: (id) => [temporary, permanent].find(({ accessKeyId }) => accessKeyId === id),
      now: now.getTime(),
    });

  const partitions: readonly (readonly [region: string, suffix: string])[] = [
    ["us-east-1", "amazonaws.com"],
    ["ap-southeast-7", "amazonaws.com"],
    ["us-gov-west-1", "amazonaws.com"],
    ["cn-north-1", "amazonaws.com.cn"],
    ["cn-northwest-1", "amazonaws.com.cn"],
    ["eusc-de-east-1", "amazonaws.eu"],
    ["us-iso-east-1", "c2s.ic.gov"],
    ["us-isob-east-1", "sc2s.sgov.gov"],
    ["eu-isoe-west-1", "cloud.adc-e.uk"],
    ["us-isof-south-1", "csp.hci.ic.gov"],
  ];
  for (const [region, suffix] of partitions) {
    for (const [keys, kind] of [[temporary, "temporary"], [permanent, "permanent"]] as const) {
      test(`${kind} keys in ${region} hold before the judge`, () => {
        const identity = signGetCallerIdentity(keys, region, date);
        const { accessKeyId, sessionToken } = keys;
        assert.deepEqual(verdictOf(identity, date), { ok: true, accessKeyId });
        // The judge is right about the host only if its own table is.
        assert.equal(stsHost(region), `sts.${region}.${suffix}`);
        assert.deepEqual(Object.keys(identity), ["headers", "region"]);
        assert.equal(identity.region, region);
        const { Authorization, ...rest } = identity.headers;
        assert.equal(Object.keys(identity.headers).at(-1), "Authorization");
        assert.deepEqual(Object.entries(rest), [
          ["Content-Type", STS_CONTENT_TYPE],
          ["X-Amz-Date", "20250115T103045Z"],
          ...(sessionToken === undefined ? [] : [["X-Amz-Security-Token", sessionToken]]),
        ]);
        const names = `content-type;host;x-amz-date${sessionToken ? ";x-amz-security-token" : ""}`;
        const scope = `${accessKeyId}/20250115/${region}/sts/aws4_request`;
        const start = `AWS4-HMAC-SHA256 Credential=${scope}, SignedHeaders=${names}, Signature=`;
        assert.ok(Authorization.startsWith(start), Authorization);
        assert.match(Authorization.slice(start.length), /^[0-9a-f]{64}$/);
      });
    }
  }

  test("the payload's hash is the one that Aembit computes", () => {
    const headers = [["Content-Type", STS_CONTENT_TYPE], ["Host", stsHost("eu-west-1")]] as const;
    const request = { method: "POST", path: "/", headers, body: STS_BODY };
    const context = { credentials: permanent, region: "eu-west-1", service: "sts", date };
    const { canonicalRequest, authorization } = signRequest(request, context);
    const hash = "ab821ae955788b0e33ebd34c208442ccfc2d406e2edc5e7a39bd6458fbb4f843";
    assert.equal(canonicalRequest.split("\n").at(-1), hash);
    const identity = signGetCallerIdentity(permanent, "eu-west-1", date);
    assert.equal(identity.headers.Authorization, authorization);
  });

  test("the date and the scope come from one instant, also before midnight", () => {
    const late = new Date("2025-01-15T23:59:59.999Z");
    const identity = signGetCallerIdentity(temporary, "eu-west-1", late);
    assert.equal(identity.headers["X-Amz-Date"], "20250115T235959Z");
    assert.equal(verdictOf(identity, late).ok, true);
  });

  test("without a date it is signed now", () => {
    const startedMs = Date.now();
    const { headers } = signGetCallerIdentity(temporary, "eu-west-1");
    const iso = headers["X-Amz-Date"].replace(/(..)(..)T(..)(..)(..)Z$/, "-$1-$2T$3:$4:$5Z");
    const signedMs = Date.parse(iso);
    assert.ok(signedMs > startedMs - 1000 && signedMs <= Date.now(), iso);
  });

  test("white space around the region is trimmed", () => {
    const identity = signGetCallerIdentity(temporary, " eu-west-1\r\n", date);
    assert.deepEqual(identity, signGetCallerIdentity(temporary, "eu-west-1", date));
  });

  test("credentials with an expiration and further fields of an SDK are fine", () => {
    const credentials = { ...temporary, expiration: new Date(), accountId: "111122223333" };
    const identity = signGetCallerIdentity(credentials, "eu-west-1", date);
    assert.equal(verdictOf(identity, date).ok, true);
  });

  const wrong: readonly (readonly [name: string, ...args: unknown[]])[] = [
    ["no credentials", undefined, "eu-west-1", date],
    ["credentials of one key", { accessKeyId: "AKIA" }, "eu-west-1", date],
    ["a secret with a line break", { ...permanent, secretAccessKey: "a\n" }, "eu-west-1", date],
    ["an invalid date", permanent, "eu-west-1", new Date(NaN)],
    ["a date that is a number", permanent, "eu-west-1", 1_736_937_045_000],
    ["no region", permanent, undefined, date],
    ["a region that is null", permanent, null, date],
    ["a region that is an array", permanent, ["eu-west-1"], date],
  ];
  for (const [name, ...args] of wrong) {
    test(`${name} cannot be signed`, async () => {
      await failure(() => Reflect.apply(signGetCallerIdentity, undefined, args), "invalid_config");
    });
  }
});

describe("Configuration", () => {
  let cloud: Cloud;
  before(async () => {
    cloud = await startCloud();
  });
  after(() => cloud.close());
  beforeEach(() => cloud.reset());

  const UUID = "01234567-89ab-4cde-8f01-23456789abcd";
  const withTenant = (tenant: string, stack = "useast2"): string =>
    `aembit:${stack}:${tenant}:identity:aws_role:${UUID}`;
  const isSilent = (): void => {
    assert.deepEqual(cloud.requests(), []);
    assert.deepEqual(cloud.fetched, []);
  };
  /** Fails with options that the types would forbid, in a place where all else would be asked. */
  const refuses = async (options: object, mention: string): Promise<void> => {
    const whole = { env: cloud.env.ec2(), fetch: cloud.fetch, ...options };
    const work = (): unknown => Reflect.apply(authenticate, undefined, [whole]);
    const { message } = await failure(work, "invalid_config");
    assert.ok(message.includes(mention), message);
    isSilent();
  };

  // --- The client ID and the host it stands for ---

  const origins: readonly (readonly [clientId: string, origin: string])[] = [
    [withTenant("a1b2c3"), "https://a1b2c3.ec.useast2.aembit.io"],
    [withTenant("my-tenant", "eu-1"), "https://my-tenant.ec.eu-1.aembit.io"],
    [withTenant("constructor"), "https://constructor.ec.useast2.aembit.io"],
    [withTenant("a".repeat(63)), `https://${"a".repeat(63)}.ec.useast2.aembit.io`],
    [
      withTenant("t").replace("aws_role", "aws_metadata"),
      "https://t.ec.useast2.aembit.io",
    ],
  ];
  for (const [clientId, origin] of origins) {
    test(`${clientId.slice(0, 60)} stands for its origin`, () => {
      assert.equal(edgeUrlFromClientId(clientId), origin);
    });
  }

  const badClientIds: readonly (readonly [name: string, clientId: unknown])[] = [
    ["nothing", undefined],
    ["null", null],
    ["a number", 5],
    ["an object", {}],
    ["an array with a good one", [withTenant("t")]],
    ["empty", ""],
    ["a name of every object", "constructor"],
    ["the name of the prototype", "__proto__"],
    ["a tenant that is the name of the prototype", withTenant("__proto__")],
    ["a line break at the end of the uuid", `${withTenant("t")}\nX`],
    ["a line break in the tenant", withTenant("a\nb")],
    ["a header in the tenant", withTenant("a\r\nHost: evil.example")],
    ["a dot in the tenant", withTenant("evil.example")],
    ["a slash in the tenant", withTenant("evil.example/")],
    ["a fragment in the tenant", withTenant("evil.example#")],
    ["a query in the tenant", withTenant("evil?")],
    ["user info in the tenant", withTenant("user@evil")],
    ["a backslash in the tenant", withTenant("evil\\")],
    ["an escape in the tenant", withTenant("evil%2eexample")],
    ["a host in the stack", withTenant("t", "evil.example/x")],
    ["user info in the stack", withTenant("t", "x@evil")],
    ["a port in the stack", withTenant("t", "x:80")],
    ["a tenant beyond ASCII", withTenant("ténant")],
    ["a tenant in full width letters", withTenant("ｔｅｎａｎｔ")],
    ["a tenant with a bidirectional mark", withTenant("t\u202e")],
    ["an empty tenant", withTenant("")],
    ["an empty stack", withTenant("t", "")],
    ["a tenant that begins with a dash", withTenant("-t")],
    ["a tenant that ends with a dash", withTenant("t-")],
    ["a tenant that no host label can hold", withTenant("a".repeat(64))],
    ["no uuid", withTenant("t").replace(UUID, "")],
    ["a short uuid", withTenant("t").slice(0, -1)],
    ["a long uuid", `${withTenant("t")}0`],
    ["another scheme", withTenant("t").replace("aembit:", "https:")],
    ["something before it", `x${withTenant("t")}`],
    ["another kind", withTenant("t").replace(":identity:", ":secret:")],
    ["no type", withTenant("t").replace("aws_role", "")],
  ];
  for (const [name, clientId] of badClientIds) {
    test(`no client ID: ${name}`, async () => {
      const work = (): unknown => Reflect.apply(edgeUrlFromClientId, undefined, [clientId]);
      await failure(work, "invalid_config");
      const env = { ...cloud.env.ec2(), AEMBIT_CLIENT_ID: "" };
      // Left out altogether, the message has to say which variable would do.
      const mention = clientId === undefined ? "AEMBIT_CLIENT_ID" : "clientId";
      await refuses({ env, clientId }, mention);
    });
  }

  // --- Options and variables that are one line of text ---

  const TEXTS: readonly (readonly [option: string, ...variables: string[]])[] = [
    ["clientId", "AEMBIT_CLIENT_ID"],
    ["edgeUrl", "AEMBIT_EDGE_BASE_URL"],
    ["resourceSetId", "AEMBIT_RESOURCE_SET_ID"],
    ["clientWorkloadId", "CLIENT_WORKLOAD_ID"],
    ["region", "AWS_REGION", "AWS_DEFAULT_REGION"],
    ["lambdaArn"],
  ];
  const NO_TEXT: readonly (readonly [name: string, value: unknown])[] = [
    ["a number", 5],
    ["true", true],
    ["null", null],
    ["an object", {}],
    ["an array", ["x"]],
    ["a function", () => "x"],
  ];
  const EMPTY: readonly (readonly [name: string, value: unknown])[] = [
    ["empty", ""],
    ["blank", " \t\r\n"],
  ];
  const NO_LINE: readonly (readonly [name: string, value: unknown])[] = [
    ["two lines", "a\nb"],
    ["a line break and a header", "x\r\nX-Evil: 1"],
    ["a carriage return", "a\rb"],
    ["beyond ASCII", "é"],
    ["a line separator", "a\u2028b"],
    ["a bidirectional mark", "a\u202eb"],
    ["a NUL", "a\0b"],
  ];
  for (const [option, ...variables] of TEXTS) {
    for (const [name, value] of [...NO_TEXT, ...EMPTY, ...NO_LINE]) {
      test(`${option} is refused before any packet: ${name}`, async () => {
        await refuses({ [option]: value }, option);
      });
    }
    for (const variable of variables) {
      for (const [name, value] of NO_LINE) {
        test(`${variable} is refused before any packet: ${name}`, async () => {
          await refuses({ env: { ...cloud.env.ec2(), [variable]: value } }, variable);
        });
      }
    }
  }

  // --- URLs, regions, ARNs ---

  const badEdgeUrls: readonly string[] = [
    "constructor",
    "__proto__",
    "tenant.ec.useast2.aembit.io",
    "//tenant.ec.useast2.aembit.io",
    "https://",
    "https:///x",
    "ftp://127.0.0.1",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "http://tenant.ec.useast2.aembit.io",
    "http://169.254.169.254",
    "http://10.0.0.1",
    "http://0.0.0.0",
    "http://localhost.",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "http://127.0.0.1@evil.example",
    "http://[::ffff:127.0.0.1]",
    "http://[::2]",
    "https://user@tenant.example",
    "https://user:secret@tenant.example",
    "https://:secret@tenant.example",
    "https://tenant.example/edge/v1",
    "https://tenant.example//",
    "https://tenant.example/?x",
    "https://tenant.example?",
    "https://tenant.example#",
    "https://evil.example\\@tenant.example",
    "https://tenant.example:99999",
    "https://ten%00ant.example",
    "https://[tenant.example",
  ];
  for (const url of badEdgeUrls) {
    test(`${url} is no Edge URL`, async () => {
      await refuses({ edgeUrl: url }, "edgeUrl");
      const env = { ...cloud.env.ec2(), AEMBIT_EDGE_BASE_URL: url };
      await refuses({ env }, "AEMBIT_EDGE_BASE_URL");
    });
  }

  for (const url of [
    "https://tenant.example",
    "https://tenant.example/",
    "HTTPS://tenant.example:8443/",
  ]) {
    test(`${url} is where the request goes`, async () => {
      const options = { env: cloud.env.staticKeys(), fetch: cloud.fetch, maxAttempts: 1 };
      await failure(authenticate({ ...options, edgeUrl: url }), "edge_unavailable");
      assert.deepEqual(cloud.fetched, [`${new URL(url).origin}/edge/v1/auth`]);
    });
  }
  for (const host of ["127.0.0.1", "localhost", "LOCALHOST", "127.1"]) {
    test(`http to ${host} is where the request goes`, async () => {
      const edgeUrl = `http://${host}:${new URL(cloud.edge.url).port}/`;
      await authenticate({ env: cloud.env.staticKeys(), fetch: cloud.fetch, edgeUrl });
      assert.equal(cloud.edge.issued.length, 1);
    });
  }
  test("http to [::1] is fine", async () => {
    await createAuthRequest({ env: cloud.env.staticKeys(), edgeUrl: "http://[::1]:8080" });
  });

  const badRegions: readonly string[] = [
    "us-east-1.evil.example#",
    "x@evil.example/",
    "us-east-1/",
    "us-east-1:80",
    "us-east-1\\",
    "us-east-1%0a",
    "US-EAST-1",
    "us-east",
    "aws-global",
    "aws-cn-global",
    "us-east-1-fips",
    "-us-east-1",
    "us-east-1-",
    "us--east-1",
    "us_east_1",
    "us-east-1a",
    "us-east-1,us-west-2",
    "*",
    "1",
    "__proto__",
    "constructor",
    "u-s-1",
    "us-éast-1",
  ];
  for (const region of badRegions) {
    test(`${region} is no region, wherever it is given`, async () => {
      await refuses({ region }, "region");
      const variables = { ...cloud.env.ec2() };
      await refuses({ env: { ...variables, AWS_REGION: region } }, "AWS_REGION");
      await refuses({ env: { ...variables, AWS_DEFAULT_REGION: region } }, "AWS_DEFAULT_REGION");
      const { ec2 } = cloud.accounts;
      await failure(() => signGetCallerIdentity(ec2, region), "invalid_config");
      await failure(resolveRegion({ region, fetch: cloud.fetch, env: {} }), "invalid_config");
      isSilent();
    });
  }

  const badArns: readonly string[] = [
    "constructor",
    "arn:aws:iam::111122223333:role/app",
    "x arn:aws:lambda:eu-west-1:111122223333:function:app",
  ];
  for (const lambdaArn of badArns) {
    test(`${lambdaArn} is no ARN of a function`, () => refuses({ lambdaArn }, "lambdaArn"));
  }

  // --- Everything else ---

  const others: readonly (readonly [option: string, ...values: unknown[]])[] = [
    ["source", "ECS", "", "env,ecs", "constructor", "__proto__", "toString", 5, null, ["env"]],
    ["ecsMetadata", "yes", "", "AUTO", "constructor", "__proto__", true, 0, null],
    ["instanceIdentity", "true", "", 1, 0, null, {}],
    ["timeoutMs", 0, -1, NaN, Infinity, 2 ** 31, "30000", null, {}, 10n],
    ["maxAttempts", 0, -1, 1.5, NaN, Infinity, "3", null, {}],
    ["signal", {}, 5, null, "x", new AbortController()],
    ["fetch", 5, null, "https://example.com", {}],
    ["now", 5, null, new Date()],
    ["logger", 5, null, {}, { debug: () => {} }, { debug: 1, warn: 1 }],
    ["env", 5, null, "AWS_REGION=x", ["x"]],
    ["credentials", 5, null, "AKIA:secret", {}, [], { accessKeyId: "AKIA" }],
  ];
  for (const [option, ...values] of others) {
    for (const value of values) {
      const name = typeof value === "bigint" ? `${value}n` : JSON.stringify(value) ?? String(value);
      test(`${option} is refused before any packet: ${name}`, async () => {
        await refuses({ [option]: value }, option);
      });
    }
  }
  test("options may stand among the settings of another program", async () => {
    const settings = { version: "2.1", host: "https://x", port: "80", json: 1, verbose: 3 };
    const options = { env: cloud.env.ec2(), fetch: cloud.fetch, ...settings };
    assert.equal(await resolveRegion(options), cloud.region);
  });
  for (const options of [null, 5, "x", []]) {
    test(`options are refused before any packet: ${JSON.stringify(options)}`, async () => {
      for (const api of [authenticate, createAuthRequest, loadAwsCredentials, resolveRegion]) {
        await failure(() => Reflect.apply(api, undefined, [options]), "invalid_config");
      }
      const client = Reflect.construct(AembitAuth, [options]);
      await failure(client.getToken(), "invalid_config");
    });
  }

  const badVariables: readonly (readonly [variable: string, ...values: string[]])[] = [
    ["AWS_EC2_METADATA_SERVICE_ENDPOINT", "not a uri", "127.0.0.1:80", "ftp://127.0.0.1",
      "http://", "//127.0.0.1", "http://user:pass@127.0.0.1", "constructor", "http://a b/"],
    ["AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv7", "6", "constructor", "__proto__"],
    ["ECS_CONTAINER_METADATA_URI_V4", "http://evil.example/v4/x", "http://169.254.169.254/v4/x",
      "file:///v4/x", "/v4/x", "http://user@127.0.0.1/v4/x", "constructor"],
  ];
  for (const [variable, ...values] of badVariables) {
    for (const value of values) {
      test(`${variable} is refused before any packet: ${value}`, async () => {
        // The endpoint would win over the mode, so it is there only where it is the matter.
        const env = { ...cloud.env.ec2(), AWS_EC2_METADATA_SERVICE_ENDPOINT: "" };
        await refuses({ env: { ...env, [variable]: value } }, variable);
      });
    }
  }

  describe("flags", { concurrency: 2 }, () => {
    const cases: readonly (readonly [flag: string, value: string])[] = [
      ["--client-id", "constructor"],
      ["--edge-url", "http://evil.example"],
      ["--resource-set-id", "a\nb"],
      ["--client-workload-id", "é"],
      ["--region", "us-east-1.evil.example#"],
      ["--source", "__proto__"],
      ["--ecs-metadata", "yes"],
      ["--lambda-arn", "arn:aws:iam::111122223333:role/app"],
      ["--timeout", "0"],
      ["--timeout", "soon"],
    ];
    for (const [flag, value] of cases) {
      test(`${flag} ${JSON.stringify(value)} ends the command with status 2`, async () => {
        const ended = await runCommand([flag, value], { env: cloud.env.ec2() });
        const { status, stdout, stderr } = ended;
        assert.equal(status, 2, stderr);
        assert.equal(stdout, "");
        assert.match(stderr, /^aembit-auth: invalid_config: /);
        assert.ok(stderr.includes(flag), stderr);
        isSilent();
      });
    }
  });

  // --- What is accepted ---

  /** The part of a document at the end of a path. */
  const dig = (document: unknown, ...path: readonly string[]): unknown =>
    path.reduce<unknown>(
      (value, key) =>
        typeof value === "object" && value !== null ? Reflect.get(value, key) : undefined,
      document,
    );
  /** Where each text ends up in the request to Edge. */
  const ARRIVES: Readonly<Record<string, (request: Recorded, body: unknown) => unknown>> = {
    clientId: (_, body) => dig(body, "clientId"),
    edgeUrl: () => new URL(cloud.fetched.at(-1) ?? "").origin,
    resourceSetId: ({ headers }) => headers["x-aembit-resourceset"],
    clientWorkloadId: (_, body) => dig(body, "client", "os", "environment", "CLIENT_WORKLOAD_ID"),
    region: (_, body) => dig(body, "client", "aws", "stsGetCallerIdentity", "region"),
    lambdaArn: (_, body) => dig(body, "client", "aws", "lambda", "arn"),
  };
  const arrived = async (name: string, options: AembitAuthOptions): Promise<unknown> => {
    await authenticate({ fetch: cloud.fetch, ...options });
    const request = cloud.edge.requests.at(-1);
    assert.ok(request);
    return ARRIVES[name]?.(request, JSON.parse(request.body));
  };
  const OTHER_ID = withTenant("other");
  const OTHER_EDGE = "https://other.ec.useast2.aembit.io";
  const ARN = "arn:aws:lambda:eu-west-1:111122223333:function:app:live";
  const accepted: readonly (readonly [option: string, value: string, variable: string])[] = [
    ["clientId", OTHER_ID, "AEMBIT_CLIENT_ID"],
    ["edgeUrl", OTHER_EDGE, "AEMBIT_EDGE_BASE_URL"],
    ["resourceSetId", "585677c8-9e3d-4fe1-8b3c-3b5a1b8f3c11", "AEMBIT_RESOURCE_SET_ID"],
    ["clientWorkloadId", "9c1f5e0e-55f7-4b19-a9a1-3f0d6c1b7a22", "CLIENT_WORKLOAD_ID"],
    ["region", "cn-north-1", "AWS_REGION"],
  ];
  for (const [option, value, variable] of accepted) {
    test(`${option} comes from ${variable}, white space trimmed`, async () => {
      const env = { ...cloud.env.staticKeys(), [variable]: ` \t${value} \r\n` };
      assert.equal(await arrived(option, { env }), value);
    });
    test(`${option} wins over ${variable}`, async () => {
      const env = { ...cloud.env.staticKeys(), [variable]: "not even valid\n here" };
      assert.equal(await arrived(option, { env, [option]: ` ${value}\n` }), value);
    });
  }
  test("lambdaArn is sent", async () => {
    assert.equal(await arrived("lambdaArn", { env: cloud.env.lambda(), lambdaArn: ARN }), ARN);
  });

  const unset: readonly (readonly [variable: string, option: string, then: unknown])[] = [
    ["AEMBIT_EDGE_BASE_URL", "edgeUrl", "https://a1b2c3.ec.useast2.aembit.io"],
    ["AEMBIT_RESOURCE_SET_ID", "resourceSetId", undefined],
    ["CLIENT_WORKLOAD_ID", "clientWorkloadId", undefined],
    ["AWS_REGION", "region", "ap-south-1"],
  ];
  for (const [variable, option, then] of unset) {
    test(`${variable} that is empty or blank counts as unset`, async () => {
      for (const value of ["", " \r\n"]) {
        const env = {
          ...cloud.env.staticKeys(),
          AWS_DEFAULT_REGION: "ap-south-1",
          [variable]: value,
        };
        assert.equal(await arrived(option, { env }), then);
      }
    });
  }
  test("an empty AEMBIT_CLIENT_ID counts as unset", async () => {
    await refuses({ env: { ...cloud.env.ec2(), AEMBIT_CLIENT_ID: " " } }, "AEMBIT_CLIENT_ID");
  });

  test("an option that is undefined counts as left out", async () => {
    const nothing = Object.fromEntries(
      [...TEXTS, ...others].filter(([name]) => name !== "env" && name !== "fetch")
        .map(([name]) => [name, undefined]),
    );
    const token = await authenticate({
      ...nothing, env: cloud.env.staticKeys(), fetch: cloud.fetch,
    });
    assert.deepEqual(cloud.edge.issued, [token.accessToken]);
  });
});

describe("AWS credentials, region and metadata", () => {
  let cloud: Cloud;
  let folder: string;
  before(async () => {
    cloud = await startCloud();
    folder = mkdtempSync(join(tmpdir(), "inputs-"));
  });
  after(async () => {
    await cloud.close();
    rmSync(folder, { recursive: true, force: true });
  });
  beforeEach(() => cloud.reset());

  const HOUR_MS = 3_600_000;
  const ROLES = "/latest/meta-data/iam/security-credentials/";
  const TOKEN_PATH = "/latest/api/token";
  const REGION_PATH = "/latest/meta-data/placement/region";
  const AUTH_TOKEN = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
  const FULL_URI = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
  const RELATIVE_URI = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";
  const METADATA_URI = "ECS_CONTAINER_METADATA_URI_V4";
  const IMDS = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
  const DISABLED = "AWS_EC2_METADATA_DISABLED";
  const NO_REGION = { AWS_REGION: "", AWS_DEFAULT_REGION: "" };

  const load = (env: Env, options: AembitAuthOptions = {}): Promise<AwsCredentials> =>
    loadAwsCredentials({ env, fetch: cloud.fetch, ...options });
  const secretsOf = ({ accessKeyId, secretAccessKey, sessionToken }: AwsCredentials) =>
    ({ accessKeyId, secretAccessKey, sessionToken });
  const isSilent = (): void => {
    assert.deepEqual(cloud.requests(), []);
    assert.deepEqual(cloud.fetched, []);
  };
  /** `PUT /latest/api/token`, in the order of arrival. */
  const asked = ({ requests }: Pick<Service, "requests">): string[] =>
    requests.map(({ method, path }) => `${method} ${path}`);
  let files = 0;
  const writeFile = (content: string): string => {
    const path = join(folder, `token-${++files}`);
    writeFileSync(path, content);
    return path;
  };
  /** Answers only when so many requests are there: one that waits for another never comes. */
  const together = (count: number, answer: Handler): Handler => {
    const all = Promise.withResolvers<void>();
    let arrived = 0;
    return async (request) => {
      if (++arrived === count) all.resolve();
      await all.promise;
      return answer(request);
    };
  };
  const jsonBody = (body: string | Uint8Array, headers: Record<string, string> = {}) => ({
    headers: { "Content-Type": "application/json", ...headers },
    body,
  });

  describe("environment", () => {
    const pair = { AWS_ACCESS_KEY_ID: "AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY: "secretEXAMPLE" };

    test("a pair is enough, and a session token joins it", async () => {
      const keys = await load(pair);
      const expected = { accessKeyId: "AKIDEXAMPLE", secretAccessKey: "secretEXAMPLE" };
      assert.deepEqual(secretsOf(keys), { ...expected, sessionToken: undefined });
      assert.equal(keys.expiration, undefined);
      const temporary = await load({ ...pair, AWS_SESSION_TOKEN: "tokenEXAMPLE" });
      assert.deepEqual(secretsOf(temporary), { ...expected, sessionToken: "tokenEXAMPLE" });
      isSilent();
    });

    test("white space and line breaks around the values are trimmed", async () => {
      const keys = await load({
        AWS_ACCESS_KEY_ID: "AKIDEXAMPLE\r\n",
        AWS_SECRET_ACCESS_KEY: " secretEXAMPLE\n",
        AWS_SESSION_TOKEN: "\ttokenEXAMPLE ",
      });
      assert.deepEqual(secretsOf(keys), {
        accessKeyId: "AKIDEXAMPLE",
        secretAccessKey: "secretEXAMPLE",
        sessionToken: "tokenEXAMPLE",
      });
    });

    test("an empty session token counts as unset", async () => {
      assert.equal((await load({ ...pair, AWS_SESSION_TOKEN: " \n" })).sessionToken, undefined);
    });

    test("an empty pair counts as unset, and the next source is asked", async () => {
      const empty = { AWS_ACCESS_KEY_ID: "", AWS_SECRET_ACCESS_KEY: " " };
      const keys = await load({ ...cloud.env.ec2(), ...empty });
      assert.equal(keys.accessKeyId, cloud.accounts.ec2.accessKeyId);
    });

    for (const [name, half] of [
      ["AWS_SECRET_ACCESS_KEY", { AWS_ACCESS_KEY_ID: "AKIDEXAMPLE" }],
      ["AWS_ACCESS_KEY_ID", { AWS_SECRET_ACCESS_KEY: "secretEXAMPLE" }],
      ["AWS_SECRET_ACCESS_KEY", { ...pair, AWS_SECRET_ACCESS_KEY: " \n" }],
      ["AWS_ACCESS_KEY_ID", { ...pair, AWS_ACCESS_KEY_ID: "" }],
    ] as const) {
      test(`half a pair is a mistake, IMDS is not asked: ${JSON.stringify(half)}`, async () => {
        const { message } = await failure(load({ ...cloud.env.ec2(), ...half }), "invalid_config");
        assert.ok(message.includes(name), message);
        isSilent();
      });
    }

    for (const name of ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]) {
      test(`${name} with a line break inside is refused, and not shown`, async () => {
        const env = { ...pair, [name]: "hidden\nX-Evil: 1" };
        const { message } = await failure(load(env), "invalid_config");
        assert.doesNotMatch(message, /hidden|Evil/);
      });
    }

    test("it is read again for each exchange", async () => {
      const env = cloud.env.staticKeys();
      const client = new AembitAuth({ env, fetch: cloud.fetch });
      await client.getToken();
      Object.assign(env, cloud.env.lambda());
      await client.getToken({ forceRefresh: true });
      const [first, second] = cloud.edge.requests;
      assert.ok(first?.body.includes(`=${cloud.accounts.static.accessKeyId}/`));
      assert.ok(second?.body.includes(`=${cloud.accounts.lambda.accessKeyId}/`));
      assert.deepEqual(asked(cloud.imds), []);
    });
  });

  describe("container endpoint", () => {
    const path = (): string => new URL(cloud.env.ecs()[FULL_URI] ?? "").pathname;

    test("a relative URI leads to the ECS agent, without an Authorization header", async () => {
      const keys = await load({ [RELATIVE_URI]: path() });
      assert.deepEqual(secretsOf(keys), cloud.accounts.ecs);
      assert.ok(keys.expiration && keys.expiration.getTime() > Date.now());
      assert.deepEqual(cloud.fetched, [`http://169.254.170.2${path()}`]);
      assert.equal(cloud.ecs.requests[0]?.headers["authorization"], undefined);
    });

    test("the relative URI wins over the full one", async () => {
      await load({ ...cloud.env.eksPodIdentity(), [RELATIVE_URI]: path() });
      assert.deepEqual(cloud.fetched, [`http://169.254.170.2${path()}`]);
      assert.deepEqual(cloud.pod.requests, []);
    });

    test("an empty relative URI counts as unset", async () => {
      const keys = await load({ ...cloud.env.ecs(), [RELATIVE_URI]: " " });
      assert.equal(keys.accessKeyId, cloud.accounts.ecs.accessKeyId);
      assert.deepEqual(cloud.fetched, [`${cloud.ecs.url}${path()}`]);
    });

    const refused: readonly (readonly [variable: string, ...values: string[]])[] = [
      [RELATIVE_URI, "@evil.example/x", ".evil.example/x", "x", "//evil.example/x", ":8080/x",
        ":80/x", "?x", "#x", "http://evil.example/", "constructor", "__proto__"],
      [FULL_URI, "http://evil.example/x", "HTTP://evil.example/x", "http://169.254.169.254/x",
        "http://169.254.170.3/x", "http://169.254.170.24/x", "http://[fd00:ec2::24]/x",
        "http://[fd00:ec2::254]/x", "http://192.168.1.1/x", "http://0.0.0.0/x",
        "http://128.0.0.1/x",
        "http://localhost./x", "http://localhost.evil.example/x", "http://127.0.0.1.evil.example/x",
        "http://169.254.170.2.evil.example/x", "http://[::ffff:7f00:1]/x", "http://[::2]/x",
        "http://user:pass@127.0.0.1/x", "http://127.0.0.1@evil.example/x",
        "http://evil.example#@127.0.0.1/", "http://evil.example\\@127.0.0.1/", "ftp://127.0.0.1/x",
        "file:///etc/passwd", "127.0.0.1/x", "/v2/credentials/x", "http://", "constructor",
        "__proto__", "https://user:pass@example.com/x"],
    ];
    for (const [variable, ...values] of refused) {
      for (const value of values) {
        test(`${variable} is refused before any packet: ${value}`, async () => {
          // The token file does not exist: that the address is named shows what is judged first.
          const env = { ...cloud.env.ec2(), [variable]: value, [`${AUTH_TOKEN}_FILE`]: "/none" };
          const { message } = await failure(load(env), "invalid_config");
          assert.ok(message.includes(variable), message);
          isSilent();
        });
      }
    }

    const allowed: readonly string[] = [
      "https://credentials.example.com/x",
      "https://192.168.1.1:8443/x?y=z",
      "http://169.254.170.2/x",
      "http://169.254.170.23/v1/credentials",
      "http://[fd00:ec2::23]/v1/credentials",
      "http://[fd00:0ec2:0:0:0:0:0:23]/v1/credentials",
    ];
    for (const url of allowed) {
      test(`${url} is asked`, async () => {
        const work = load({ [FULL_URI]: url, [AUTH_TOKEN]: "a.b.c" }, { maxAttempts: 1 });
        await failure(work, "metadata_unavailable");
        assert.deepEqual(cloud.fetched, [new URL(url).href]);
      });
    }
    for (const host of ["127.0.0.1", "127.1", "localhost", "LOCALHOST"]) {
      test(`http to ${host} is asked`, async () => {
        const url = `http://${host}:${new URL(cloud.ecs.url).port}${path()}`;
        const keys = await load({ [FULL_URI]: url });
        assert.equal(keys.accessKeyId, cloud.accounts.ecs.accessKeyId);
      });
    }

    test("the token is sent as it is, without Bearer", async () => {
      await load({ ...cloud.env.ecs(), [AUTH_TOKEN]: "Basic dXNlcjpwYXNz and more" });
      const [request] = cloud.ecs.requests;
      assert.equal(request?.headers["authorization"], "Basic dXNlcjpwYXNz and more");
    });

    test("the token file wins over the token, and is read again for each call", async () => {
      const file = writeFile("first");
      const env = { ...cloud.env.ecs(), [AUTH_TOKEN]: "not this", [`${AUTH_TOKEN}_FILE`]: file };
      await load(env);
      writeFileSync(file, "second");
      await load(env);
      const sent = cloud.ecs.requests.map(({ headers }) => headers["authorization"]);
      assert.deepEqual(sent, ["first", "second"]);
    });

    test("an empty token file variable counts as unset", async () => {
      await load({ ...cloud.env.ecs(), [AUTH_TOKEN]: "this", [`${AUTH_TOKEN}_FILE`]: "" });
      assert.equal(cloud.ecs.requests[0]?.headers["authorization"], "this");
    });

    const badTokens: readonly (readonly [name: string, token: string])[] = [
      ["a line break at its end", "hidden\n"],
      ["CR and LF at its end", "hidden\r\n"],
      ["a carriage return at its end", "hidden\r"],
      ["a line break at its start", "\nhidden"],
      ["a line break and a header", "hidden\r\nX-Evil: 1"],
      ["a NUL", "hid\0den"],
      ["a letter beyond ASCII", "hiddén"],
    ];
    const isRefused = async (env: Env, variable: string): Promise<void> => {
      const all = { ...cloud.env.ecs(), ...env };
      const work = load(all, { timeoutMs: 2000 });
      const { message } = await failure(work, "invalid_aws_credentials");
      assert.ok(message.includes(variable), message);
      assert.doesNotMatch(message, /hid|Evil/);
      isSilent();
    };
    for (const [name, token] of badTokens) {
      test(`no request is made with a token with ${name}`, async () => {
        await isRefused({ [AUTH_TOKEN]: token }, AUTH_TOKEN);
        await isRefused({ [`${AUTH_TOKEN}_FILE`]: writeFile(token) }, `${AUTH_TOKEN}_FILE`);
      });
    }

    const badFiles: readonly (readonly [name: string, create: (path: string) => void])[] = [
      ["is missing", () => {}],
      ["is empty", (file) => writeFileSync(file, "")],
      ["is a directory", (file) => mkdirSync(file)],
    ];
    for (const [name, create] of badFiles) {
      test(`no request is made with a token file that ${name}`, async () => {
        const file = join(folder, `bad-${++files}`);
        create(file);
        await isRefused({ [`${AUTH_TOKEN}_FILE`]: file }, `${AUTH_TOKEN}_FILE`);
      });
    }

    test("EKS Pod Identity gets the content of its file", async () => {
      const keys = await load(cloud.env.eksPodIdentity());
      assert.deepEqual(secretsOf(keys), cloud.accounts.pod);
      const token = readFileSync(cloud.tokenFiles.pod, "utf8");
      assert.deepEqual(cloud.pod.requests.map(({ headers }) => headers["authorization"]), [token]);
    });

    const passing: readonly (readonly [name: string, fault: FaultKind])[] = [
      ["503 CredentialsUninitialized", documents.ecsUninitialized],
      ["429", documents.ecsThrottled],
      ["500", { status: 500 }],
      ["a reset connection", "reset"],
    ];
    for (const [name, fault] of passing) {
      test(`${name} is tried again`, async () => {
        cloud.ecs.fail(/credentials/, fault, 1);
        const keys = await load(cloud.env.ecs());
        assert.equal(keys.accessKeyId, cloud.accounts.ecs.accessKeyId);
        assert.equal(cloud.ecs.requests.length, 2);
      });
    }

    test("an agent that keeps failing is unavailable, and worth another call", async () => {
      cloud.ecs.fail(/credentials/, documents.ecsUninitialized);
      const work = load(cloud.env.ecs(), { maxAttempts: 2 });
      const error = await failure(work, "metadata_unavailable");
      assert.equal(error.status, 503);
      assert.equal(error.attempts, 2);
      assert.equal(error.retryable, true);
      assert.match(error.message, /CredentialsUninitialized/);
      assert.equal(cloud.ecs.requests.length, 2);
    });

    for (const [status, body, words] of [
      [400, documents.ecsInvalidId.body, /InvalidIdInRequest.*Credentials not found/],
      [403, "(AccessDeniedException): not yours\n", /AccessDeniedException.*not yours/],
      [404, "404 page not found\n", /404/],
    ] as const) {
      test(`${status} is not tried again, and the agent's words are told`, async () => {
        cloud.ecs.fail(/credentials/, { status, body });
        const error = await failure(load(cloud.env.ecs()), "metadata_unavailable");
        assert.equal(error.status, status);
        assert.equal(error.retryable, false);
        assert.match(error.message, words);
        assert.equal(cloud.ecs.requests.length, 1);
      });
    }
  });

  describe("web identity", () => {
    const form = (): Record<string, string> =>
      Object.fromEntries(new URLSearchParams(cloud.sts.requests.at(-1)?.body));

    test("the regional STS gets role, token and session name, and no signature", async () => {
      const env = cloud.env.irsa();
      const keys = await load(env);
      assert.deepEqual(secretsOf(keys), cloud.accounts.webIdentity);
      assert.ok(keys.expiration && keys.expiration.getTime() > Date.now());
      assert.deepEqual(cloud.fetched, ["https://sts.eu-west-1.amazonaws.com/"]);
      const { RoleSessionName = "", ...rest } = form();
      assert.match(RoleSessionName, /^[\w+=,.@-]{2,64}$/);
      assert.deepEqual(rest, {
        Action: "AssumeRoleWithWebIdentity",
        Version: "2011-06-15",
        RoleArn: env["AWS_ROLE_ARN"],
        WebIdentityToken: readFileSync(cloud.tokenFiles.webIdentity, "utf8"),
      });
      assert.deepEqual(asked(cloud.sts), ["POST /"]);
      assert.equal(cloud.sts.requests[0]?.headers["authorization"], undefined);
    });

    test("AWS_ROLE_SESSION_NAME names the session", async () => {
      await load({ ...cloud.env.irsa(), AWS_ROLE_SESSION_NAME: " app@pod-1 " });
      assert.equal(form()["RoleSessionName"], "app@pod-1");
    });

    test("white space around the token is trimmed, and the file read for each call", async () => {
      const token = readFileSync(cloud.tokenFiles.webIdentity, "utf8");
      const file = writeFile(`\n ${token} \r\n`);
      const env = { ...cloud.env.irsa(), AWS_WEB_IDENTITY_TOKEN_FILE: file };
      await load(env);
      assert.equal(form()["WebIdentityToken"], token);
      writeFileSync(file, "a.new.one");
      await failure(load(env), "invalid_aws_credentials");
      assert.equal(form()["WebIdentityToken"], "a.new.one");
    });

    const regions: readonly (readonly [name: string, region: string, suffix: string])[] = [
      ["the option wins", "ap-south-1", "amazonaws.com"],
      ["another partition", "cn-north-1", "amazonaws.com.cn"],
      ["the European partition", "eusc-de-east-1", "amazonaws.eu"],
    ];
    for (const [name, region, suffix] of regions) {
      test(`the region is that of the call: ${name}`, async () => {
        await load(cloud.env.irsa(), { region });
        assert.deepEqual(cloud.fetched, [`https://sts.${region}.${suffix}/`]);
      });
    }
    test("AWS_REGION wins over AWS_DEFAULT_REGION", async () => {
      await load({ ...cloud.env.irsa(), AWS_REGION: "us-east-1", AWS_DEFAULT_REGION: "us-east-2" });
      assert.deepEqual(cloud.fetched, ["https://sts.us-east-1.amazonaws.com/"]);
    });
    test("the region may come from IMDS, the credentials may not", async () => {
      const keys = await load({ ...cloud.env.irsa(), ...NO_REGION });
      assert.equal(keys.accessKeyId, cloud.accounts.webIdentity.accessKeyId);
      assert.deepEqual(asked(cloud.imds), [`PUT ${TOKEN_PATH}`, `GET ${REGION_PATH}`]);
      assert.equal(cloud.fetched.at(-1), "https://sts.eu-west-1.amazonaws.com/");
    });

    const mistakes: readonly (readonly [name: string, env: Env, mention: string])[] = [
      ["the file without the role", { AWS_ROLE_ARN: " " }, "AWS_ROLE_ARN"],
    ];
    for (const [name, env, mention] of mistakes) {
      test(`${name} is refused before any packet`, async () => {
        const work = load({ ...cloud.env.irsa(), ...env });
        const { message } = await failure(work, "invalid_config");
        assert.ok(message.includes(mention), message);
        isSilent();
      });
    }

    test("the role without the file counts as unset", async () => {
      const env = { ...cloud.env.irsa(), AWS_WEB_IDENTITY_TOKEN_FILE: "" };
      assert.equal((await load(env)).accessKeyId, cloud.accounts.ec2.accessKeyId);
      assert.deepEqual(cloud.sts.requests, []);
    });

    for (const [name, create] of [
      ["missing", () => join(folder, "none")],
      ["a directory", () => folder],
    ] as const) {
      test(`no request is made with a token file that is ${name}`, async () => {
        const env = { ...cloud.env.irsa(), AWS_WEB_IDENTITY_TOKEN_FILE: create() };
        const { message } = await failure(load(env), "invalid_aws_credentials");
        assert.match(message, /AWS_WEB_IDENTITY_TOKEN_FILE/);
        isSilent();
      });
    }

    test("4xx of STS is final, and its words are told", async () => {
      const role = "arn:aws:iam::111122223333:role/another";
      const work = load({ ...cloud.env.irsa(), AWS_ROLE_ARN: role });
      const error = await failure(work, "invalid_aws_credentials");
      assert.equal(error.status, 403);
      assert.equal(error.retryable, false);
      assert.match(error.message, /AccessDenied.*Not authorized/);
      assert.equal(cloud.sts.requests.length, 1);
    });

    for (const fault of [{ status: 503 }, { status: 500 }, { status: 429 }, "reset"] as const) {
      test(`${JSON.stringify(fault)} of STS is tried again`, async () => {
        cloud.sts.fail("/", fault, 1);
        await load(cloud.env.irsa());
        assert.equal(cloud.sts.requests.length, 2);
      });
    }

    test("an STS that keeps failing is unavailable, and worth another call", async () => {
      cloud.sts.fail("/", { status: 500 });
      const work = load(cloud.env.irsa(), { maxAttempts: 2 });
      const error = await failure(work, "metadata_unavailable");
      assert.deepEqual([error.status, error.attempts, error.retryable], [500, 2, true]);
    });

    const answer = (from: string | RegExp, to: string): string =>
      documents.assumeRoleWithWebIdentityXml({
        keys: cloud.accounts.webIdentity,
        roleArn: "arn:aws:iam::111122223333:role/web-identity-role",
        sessionName: "app",
        expiration: Date.now() + HOUR_MS,
        requestId: "1",
      }).replace(from, to);
    const bad: readonly (readonly [name: string, body: () => string])[] = [
      ["an empty body", () => ""],
      ["a page", () => "<html><body>sign in</body></html>"],
      ["no key id", () => answer(/<AccessKeyId>.*\n/, "")],
      ["an empty secret", () => answer(/<SecretAccessKey>.*</, "<SecretAccessKey><")],
      ["a line break in the token", () => answer("<SessionToken>", "<SessionToken>a\nb")],
      ["an expiration that is no date", () => answer(/(<Expiration>).*</, "$1soon<")],
      ["an expiration in the past", () => answer(/(<Expiration>).*</, "$12020-01-01T00:00:00Z<")],
    ];
    for (const [name, body] of bad) {
      test(`STS answers with ${name}`, async () => {
        cloud.sts.respond("/", () => ({ body: body() }));
        await failure(load(cloud.env.irsa()), "invalid_aws_credentials");
        assert.equal(cloud.sts.requests.length, 1);
      });
    }
  });

  describe("IMDS", () => {
    const pinned = (options: AembitAuthOptions = {}, env: Env = {}): Promise<AwsCredentials> =>
      load({ ...cloud.env.ec2(), ...env }, { source: "imds", ...options });
    const THREE = [`PUT ${TOKEN_PATH}`, `GET ${ROLES}`, `GET ${ROLES}app-role`];

    test("a token, the role's name and its credentials are asked for, each once", async () => {
      assert.deepEqual(secretsOf(await load(cloud.env.ec2())), cloud.accounts.ec2);
      assert.deepEqual(asked(cloud.imds), THREE);
      const [put, list, read] = cloud.imds.requests.map(({ headers }) => headers);
      assert.equal(put?.["x-aws-ec2-metadata-token-ttl-seconds"], "21600");
      assert.equal(put?.["x-aws-ec2-metadata-token"], undefined);
      assert.match(list?.["x-aws-ec2-metadata-token"] ?? "", /^AQAEAFakeImdsToken/);
      assert.equal(read?.["x-aws-ec2-metadata-token"], list?.["x-aws-ec2-metadata-token"]);
    });

    const endpoints: readonly (readonly [name: string, env: Env, origin: string])[] = [
      ["IPv4 by default", {}, "http://169.254.169.254"],
      ["IPv4", { [`${IMDS}_MODE`]: "IPv4" }, "http://169.254.169.254"],
      ["IPv6", { [`${IMDS}_MODE`]: "IPv6" }, "http://[fd00:ec2::254]"],
      ["a mode that is blank", { [`${IMDS}_MODE`]: " " }, "http://169.254.169.254"],
      [
        "an endpoint that wins over the mode",
        { [IMDS]: "http://169.254.169.254/", [`${IMDS}_MODE`]: "IPv6" },
        "http://169.254.169.254",
      ],
    ];
    for (const [name, env, origin] of endpoints) {
      test(`address: ${name}`, async () => {
        await load(env);
        const paths = [TOKEN_PATH, ROLES, `${ROLES}app-role`];
        assert.deepEqual(cloud.fetched, paths.map((path) => `${origin}${path}`));
      });
    }

    for (const value of ["true", "TRUE", "True", " true\n"]) {
      test(`${DISABLED}=${JSON.stringify(value)} keeps it from being asked`, async () => {
        const env = { ...cloud.env.ec2(), [DISABLED]: value };
        const { message } = await failure(load(env), "no_aws_credentials");
        assert.ok(message.includes(DISABLED), message);
        const error = await failure(resolveRegion({ env, fetch: cloud.fetch }), "no_region");
        assert.equal(error.retryable, false);
        isSilent();
      });
    }
    for (const value of ["false", "1", "yes", ""]) {
      test(`${DISABLED}=${JSON.stringify(value)} does not`, async () => {
        await load({ ...cloud.env.ec2(), [DISABLED]: value });
        assert.deepEqual(asked(cloud.imds), THREE);
      });
    }

    const roles: readonly (readonly [list: string, role: string])[] = [
      ["app-role\n", "app-role"],
      ["app-role\r\n", "app-role"],
      ["  app-role  ", "app-role"],
      ["first\nsecond", "first"],
      ["first\r\nsecond\r\n", "first"],
      ["a+=,.@-_1", "a+=,.@-_1"],
      ["a..b", "a..b"],
      ["r".repeat(64), "r".repeat(64)],
      ["constructor", "constructor"],
      ["__proto__", "__proto__"],
    ];
    for (const [list, role] of roles) {
      test(`the role list ${JSON.stringify(list)} names ${role}`, async () => {
        cloud.roleName = role;
        cloud.imds.respond(ROLES, () => ({ body: list }));
        await load(cloud.env.ec2());
        assert.equal(asked(cloud.imds).at(-1), `GET ${ROLES}${role}`);
      });
    }

    const badRoles: readonly string[] = [
      "../x", "..", ".", "...", "a b", "a/b", "a?b", "a#b", "a%2fb", "a\\b", "é", "a\0b",
      "r".repeat(65), "<html><body>sign in</body></html>", "{\"role\":1}",
    ];
    for (const list of badRoles) {
      test(`the role list ${JSON.stringify(list)} names no role`, async () => {
        cloud.imds.respond(ROLES, () => ({ body: list }));
        await failure(load(cloud.env.ec2()), "invalid_aws_credentials");
        assert.deepEqual(asked(cloud.imds), THREE.slice(0, 2));
      });
    }

    for (const [name, prepare] of [
      ["no role", () => (cloud.roleName = "")],
      ["an empty role list", () => cloud.imds.respond(ROLES, () => ({ body: "" }))],
    ] as const) {
      test(`${name} is no source under auto, and unavailable when pinned`, async () => {
        prepare();
        const { message } = await failure(load(cloud.env.ec2()), "no_aws_credentials");
        assert.match(message, /role/);
        assert.deepEqual(asked(cloud.imds), THREE.slice(0, 2));
        await failure(pinned(), "metadata_unavailable");
      });
    }

    test("a redirect of the role list is not followed", async () => {
      const headers = { Location: `${cloud.imds.url}${ROLES}app-role` };
      cloud.imds.fail(ROLES, { status: 301, headers });
      await failure(pinned(), "metadata_unavailable");
      assert.deepEqual(asked(cloud.imds), THREE.slice(0, 2));
    });

    for (const [name, path] of [["list", ROLES], ["credentials", `${ROLES}app-role`]] as const) {
      test(`a 401 on the ${name} renews the token once`, async () => {
        cloud.imds.fail(path, { status: 401 }, 1);
        await load(cloud.env.ec2());
        const again = name === "list" ? THREE.slice(1, 2) : THREE.slice(2);
        const start = name === "list" ? THREE.slice(0, 2) : THREE;
        const rest = THREE.slice(start.length);
        assert.deepEqual(asked(cloud.imds), [...start, THREE[0], ...again, ...rest]);
        const tokens = cloud.imds.requests.map((request) =>
          request.headers["x-aws-ec2-metadata-token"]);
        assert.notEqual(tokens.at(-1), tokens[1]);
      });
      test(`a second 401 on the ${name} is final`, async () => {
        cloud.imds.fail(path, { status: 401 });
        const error = await failure(pinned(), "metadata_unavailable");
        assert.equal(error.status, 401);
        assert.equal(asked(cloud.imds).filter((line) => line === THREE[0]).length, 2);
        assert.equal(asked(cloud.imds).filter((line) => line === `GET ${path}`).length, 2);
      });
    }

    const paths: readonly (readonly [name: string, path: string, before: number])[] = [
      ["token", TOKEN_PATH, 0],
      ["role list", ROLES, 1],
      ["credentials", `${ROLES}app-role`, 2],
    ];
    for (const [name, path, before] of paths) {
      for (const status of [400, 403, 404]) {
        test(`${status} on the ${name} is final`, async () => {
          cloud.imds.fail(path, { status });
          const error = await failure(pinned(), "metadata_unavailable");
          assert.equal(error.status, status);
          assert.equal(error.retryable, false);
          assert.deepEqual(asked(cloud.imds), THREE.slice(0, before + 1));
        });
      }
      for (const status of [500, 503]) {
        test(`${status} on the ${name} is tried again`, async () => {
          cloud.imds.fail(path, { status }, 1);
          await pinned();
          assert.equal(cloud.imds.requests.length, 4);
        });
      }
      test(`503 on the ${name} again and again is unavailable`, async () => {
        cloud.imds.fail(path, { status: 503 });
        const error = await failure(pinned({ maxAttempts: 2 }), "metadata_unavailable");
        assert.deepEqual([error.status, error.attempts, error.retryable], [503, 2, true]);
        assert.equal(cloud.imds.requests.length, before + 2);
      });
    }

    for (const [name, token] of [["two lines", "a\nb"], ["a page", "<html> sign in </html>"]]) {
      test(`a session token of ${name} is not used`, async () => {
        cloud.imds.respond(TOKEN_PATH, () => ({ body: token ?? "" }));
        await failure(pinned(), "invalid_aws_credentials");
        assert.deepEqual(asked(cloud.imds), THREE.slice(0, 1));
      });
    }

    test("the service says why the role cannot be assumed", async () => {
      cloud.imds.respond(`${ROLES}app-role`, () => jsonBody(documents.imdsAssumeRoleFailed));
      const { message } = await failure(load(cloud.env.ec2()), "invalid_aws_credentials");
      assert.match(message, /AssumeRoleUnauthorizedAccess.*EC2 cannot assume the role app-role/);
    });

    test("token and role name are kept for later calls of a client", async () => {
      // Credentials that end soon are read for each exchange.
      cloud.credentialLifetimeMs = 4 * 60_000;
      const env = { ...cloud.env.ec2(), AWS_REGION: "eu-west-1" };
      const client = new AembitAuth({ env, fetch: cloud.fetch });
      await client.getToken();
      await client.getToken({ forceRefresh: true });
      assert.deepEqual(asked(cloud.imds), [...THREE, THREE[2]]);
    });
  });

  describe("documents", () => {
    interface Place {
      readonly name: string;
      readonly service: () => Service;
      readonly env: () => Env;
      readonly path: RegExp;
    }
    const places: readonly Place[] = [
      {
        name: "IMDS", service: () => cloud.imds, env: () => cloud.env.ec2(), path: /app-role$/,
      },
      {
        name: "ECS", service: () => cloud.ecs, env: () => cloud.env.ecs(), path: /credentials/,
      },
    ];
    const good = (): Record<string, unknown> => ({
      AccessKeyId: "ASIAEXAMPLE",
      SecretAccessKey: "secretEXAMPLE",
      Token: "tokenEXAMPLE",
      Expiration: new Date(Date.now() + HOUR_MS).toISOString(),
    });
    const changed = (changes: Record<string, unknown>) => (): string =>
      JSON.stringify({ ...good(), ...changes });
    const past = new Date(Date.now() - 60_000).toISOString();

    const bad: readonly (readonly [name: string, body: () => string])[] = [
      ["no AccessKeyId", changed({ AccessKeyId: undefined })],
      ["no SecretAccessKey", changed({ SecretAccessKey: undefined })],
      ["an empty AccessKeyId", changed({ AccessKeyId: "" })],
      ["an empty SecretAccessKey", changed({ SecretAccessKey: "" })],
      ["an AccessKeyId that is a number", changed({ AccessKeyId: 5 })],
      ["a SecretAccessKey that is null", changed({ SecretAccessKey: null })],
      ["a SecretAccessKey that is an array", changed({ SecretAccessKey: ["x"] })],
      ["a Token that is a number", changed({ Token: 5 })],
      ["a line break in the AccessKeyId", changed({ AccessKeyId: "AS\r\nX-Evil: 1" })],
      ["a line break in the SecretAccessKey", changed({ SecretAccessKey: "hidden\n" })],
      ["a line break in the Token", changed({ Token: "hid\nden" })],
      ["a letter beyond ASCII in the Token", changed({ Token: "hiddén" })],
      ["an Expiration in the past", changed({ Expiration: past })],
      ["an Expiration that is no date", changed({ Expiration: "soon" })],
      ["an Expiration that is empty", changed({ Expiration: "" })],
      ["an Expiration that is NaN", changed({ Expiration: "NaN" })],
      ["an Expiration in seconds since 1970", changed({ Expiration: 4_102_444_800 })],
      ["an Expiration that is an object", changed({ Expiration: {} })],
      ["a Code other than Success", changed({ Code: "Failed", Message: "no such luck" })],
      ["a Code alone", () => JSON.stringify({ Code: "Failed", Message: "no such luck" })],
      ["an empty body", () => ""],
      ["half of a document", () => JSON.stringify(good()).slice(0, -20)],
      ["a page", () => "<html><body>sign in</body></html>"],
      ["null", () => "null"],
      ["an array", () => JSON.stringify([good()])],
      ["a text", () => JSON.stringify("hidden")],
      ["an object that lends its prototype", () => `{"__proto__":${JSON.stringify(good())}}`],
      ["more than a MiB", () => JSON.stringify({ ...good(), filler: "x".repeat(1 << 20) })],
    ];
    const fine: readonly (readonly [name: string, body: () => string])[] = [
      ["no Token", changed({ Token: undefined })],
      ["no Expiration", changed({ Expiration: undefined })],
      ["an Expiration in nanoseconds", changed({ Expiration: "2099-01-15T10:30:45.123456789Z" })],
      ["an Expiration with a zone", changed({ Expiration: "2099-01-15T12:30:45+02:00" })],
      ["a Code of Success", changed({ Code: "Success" })],
      ["further fields", changed({ AccountId: "111122223333", constructor: {}, New: [1] })],
    ];
    for (const { name: place, service, env, path } of places) {
      const read = (body: string): Promise<AwsCredentials> => {
        service().respond(path, () => jsonBody(body));
        return load(env());
      };
      for (const [name, body] of bad) {
        test(`${place} answers with ${name}`, async () => {
          const { message } = await failure(read(body()), "invalid_aws_credentials");
          assert.doesNotMatch(message, /hid|EXAMPLE/);
          if (name.includes("Code")) assert.match(message, /Failed.*no such luck/);
          // What is wrong in itself is not asked for again.
          const asked = service().requests.filter((request) => path.test(request.path));
          assert.equal(asked.length, 1);
        });
      }
      for (const [name, body] of fine) {
        test(`${place} may answer with ${name}`, async () => {
          const document = body();
          const keys = await read(document);
          const { Token, Expiration } = JSON.parse(document);
          assert.deepEqual(secretsOf(keys), {
            accessKeyId: "ASIAEXAMPLE", secretAccessKey: "secretEXAMPLE", sessionToken: Token,
          });
          const expected = Expiration === undefined ? undefined : Date.parse(Expiration);
          assert.equal(keys.expiration?.getTime(), expected);
        });
      }

      test(`${place}: a time without a zone is UTC, wherever this machine is`, async () => {
        const { TZ } = process.env;
        process.env["TZ"] = "Asia/Tokyo";
        try {
          const keys = await read(changed({ Expiration: "2099-01-15T10:30:45" })());
          assert.equal(keys.expiration?.toISOString(), "2099-01-15T10:30:45.000Z");
        } finally {
          if (TZ === undefined) delete process.env["TZ"];
          else process.env["TZ"] = TZ;
        }
      });

      test(`${place}: expired or not is judged by the answer's own Date`, async () => {
        // By our clock these have been over for an hour; the service's says they have one to go.
        service().clockOffsetMs = -2 * HOUR_MS;
        const behind = new Date(Date.now() - HOUR_MS).toISOString();
        const keys = await read(changed({ Expiration: behind })());
        assert.equal(keys.expiration?.toISOString(), behind);
        service().clockOffsetMs = 2 * HOUR_MS;
        await failure(read(changed({})()), "invalid_aws_credentials");
      });

      test(`${place}: without a Date it is judged by the clock that was given`, async () => {
        const body = changed({})();
        service().respond(path, () => jsonBody(body, { Date: "no date" }));
        await load(env());
        const late = { now: () => Date.now() + 2 * HOUR_MS };
        await failure(load(env(), late), "invalid_aws_credentials");
      });

      test(`${place}: a body without an end is given up`, async () => {
        service().fail(path, "endless");
        await failure(load(env()), "invalid_aws_credentials");
      });
    }
  });

  describe("identity never falls through", () => {
    const dead: readonly (readonly [name: string, env: () => Env, prepare: () => void])[] = [
      ["an ECS agent that refuses", () => cloud.env.ecs(), () => cloud.ecs.fail(/./, "refused")],
      ["an ECS agent that answers 400", () => ({
        ...cloud.env.ecs(), [FULL_URI]: `${cloud.ecs.url}/v2/credentials/none`,
      }), () => {}],
      ["an ECS agent without a clue", () => cloud.env.ecs(), () => cloud.ecs.fail(/./, "empty")],
      ["a Pod Identity agent that refuses", () => cloud.env.eksPodIdentity(), () => {
        cloud.pod.fail(/./, "refused");
      }],
      ["a Pod Identity token that is gone", () => ({
        ...cloud.env.eksPodIdentity(), [`${AUTH_TOKEN}_FILE`]: join(folder, "none"),
      }), () => {}],
      ["an STS that refuses", () => cloud.env.irsa(), () => cloud.sts.fail(/./, "refused")],
      ["an STS that answers 403", () => ({
        ...cloud.env.irsa(), AWS_ROLE_ARN: "arn:aws:iam::111122223333:role/another",
      }), () => {}],
      ["a web identity token that is gone", () => ({
        ...cloud.env.irsa(), AWS_WEB_IDENTITY_TOKEN_FILE: join(folder, "none"),
      }), () => {}],
      ["a web identity without its role, though ECS is there", () => ({
        ...cloud.env.ecs(), ...cloud.env.irsa(), AWS_ROLE_ARN: "",
      }), () => {}],
    ];
    for (const [name, env, prepare] of dead) {
      test(`${name}: IMDS sees nothing, and Edge neither`, async () => {
        prepare();
        const options = { env: env(), fetch: cloud.fetch, maxAttempts: 1 };
        const codes = ["metadata_unavailable", "invalid_aws_credentials", "invalid_config"];
        await assert.rejects(authenticate(options), ({ code }: { code?: unknown }) =>
          codes.includes(`${code}`));
        assert.deepEqual(cloud.imds.requests, []);
        assert.deepEqual(cloud.edge.requests, []);
      });
    }

    const all = (): Env => ({
      ...cloud.env.ecs(), ...cloud.env.irsa(), ...cloud.env.staticKeys(),
    });
    test("the order is env, web-identity, ecs, imds", async () => {
      const env = all();
      const found: string[] = [];
      for (const variables of [
        [],
        ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"],
        ["AWS_WEB_IDENTITY_TOKEN_FILE"],
        [FULL_URI],
      ]) {
        for (const variable of variables) delete env[variable];
        found.push((await load(env)).accessKeyId);
      }
      const { ec2, ecs, webIdentity, static: fixed } = cloud.accounts;
      const order = [fixed, webIdentity, ecs, ec2].map(({ accessKeyId }) => accessKeyId);
      assert.deepEqual(found, order);
    });

    for (const [source, account] of [
      ["env", "static"],
      ["web-identity", "webIdentity"],
      ["ecs", "ecs"],
    ] as const) {
      test(`source ${source} asks no other`, async () => {
        const { accessKeyId } = await load(all(), { source });
        assert.equal(accessKeyId, cloud.accounts[account].accessKeyId);
        assert.deepEqual(cloud.imds.requests, []);
      });
      test(`source ${source} that is not configured asks nobody`, async () => {
        const { message } = await failure(load(cloud.env.ec2(), { source }), "no_aws_credentials");
        assert.ok(message.includes(source), message);
        isSilent();
      });
    }
    test("source imds asks IMDS in spite of static keys", async () => {
      const { accessKeyId } = await load(cloud.env.staticKeys(), { source: "imds" });
      assert.equal(accessKeyId, cloud.accounts.ec2.accessKeyId);
    });

    test("the message names every source and its reason where none has any", async () => {
      cloud.imds.fail(/./, "refused");
      const { message } = await failure(load(cloud.env.ec2()), "no_aws_credentials");
      for (const part of [
        "env", "AWS_ACCESS_KEY_ID", "web-identity", "AWS_WEB_IDENTITY_TOKEN_FILE", "ecs",
        RELATIVE_URI, FULL_URI, "imds", cloud.imds.url,
      ]) {
        assert.ok(message.includes(part), `${part} is missing: ${message}`);
      }
    });
  });

  describe("a caller's own credentials", () => {
    const keys = { accessKeyId: "ASIAEXAMPLE", secretAccessKey: "s3cr3t", sessionToken: "t0ken" };
    const expiration = new Date(Date.now() + HOUR_MS);
    type Own = AembitAuthOptions["credentials"];
    const ways: readonly (readonly [name: string, credentials: Own])[] = [
      ["a value", { ...keys, expiration }],
      ["a function", () => ({ ...keys, expiration })],
      ["an async function", async () => ({ ...keys, expiration })],
    ];
    for (const [name, credentials] of ways) {
      test(`${name} skips discovery`, async () => {
        const env = { ...cloud.env.ecs(), ...cloud.env.irsa(), AWS_ACCESS_KEY_ID: "half" };
        const found = await load(env, { credentials });
        assert.deepEqual(secretsOf(found), keys);
        assert.equal(found.expiration?.getTime(), expiration.getTime());
        isSilent();
      });
    }

    test("a function is asked for each exchange, a session token or not", async () => {
      const queue = [cloud.accounts.static, cloud.accounts.ec2];
      const credentials = (): AwsCredentials => queue.shift() ?? assert.fail("asked too often");
      const options = { env: { ...cloud.env.ec2(), AWS_REGION: "eu-west-1" }, fetch: cloud.fetch };
      const client = new AembitAuth({ ...options, credentials });
      await client.getToken();
      await client.getToken({ forceRefresh: true });
      assert.equal(queue.length, 0);
      assert.equal(cloud.edge.issued.length, 2);
    });

    for (const [name, fail] of [
      ["throws", (error: Error): never => {
        throw error;
      }],
      ["rejects", (error: Error) => Promise.reject(error)],
    ] as const) {
      test(`a function that ${name} is unavailable, with its error as cause`, async () => {
        const cause = new Error("no SSO session");
        const work = load(cloud.env.ec2(), { credentials: () => fail(cause) });
        const error = await failure(work, "metadata_unavailable");
        assert.equal(error.cause, cause);
        isSilent();
      });
    }

    const malformed: readonly (readonly [name: string, value: unknown])[] = [
      ["null", null],
      ["a text", "AKIA:s3cr3t"],
      ["an empty object", {}],
      ["no secret", { accessKeyId: "ASIAEXAMPLE" }],
      ["an empty key id", { ...keys, accessKeyId: "" }],
      ["a secret that is a number", { ...keys, secretAccessKey: 5 }],
      ["a line break in the secret", { ...keys, secretAccessKey: "s3cr3t\n" }],
      ["a session token that is an object", { ...keys, sessionToken: {} }],
      ["an expiration that is a text", { ...keys, expiration: expiration.toISOString() }],
      ["an expiration that is a number", { ...keys, expiration: expiration.getTime() }],
      ["an expiration that is no date", { ...keys, expiration: new Date(NaN) }],
      ["an expiration that is empty", { ...keys, expiration: "" }],
      ["an expiration that is no number", { ...keys, expiration: NaN }],
    ];
    const expired = { ...keys, expiration: new Date(Date.now() - 1000) };
    type Code = "invalid_config" | "invalid_aws_credentials";
    const give = async (credentials: unknown, code: Code): Promise<void> => {
      const options = { env: cloud.env.ec2(), fetch: cloud.fetch, credentials };
      const work = (): unknown => Reflect.apply(loadAwsCredentials, undefined, [options]);
      const { message } = await failure(work, code);
      assert.doesNotMatch(message, /s3cr3t/);
      isSilent();
    };
    for (const [name, value] of [...malformed, ["nothing", undefined]] as const) {
      test(`a function may not return ${name}`, async () => {
        await give(() => value, "invalid_aws_credentials");
        await give(async () => value, "invalid_aws_credentials");
      });
    }
    for (const [name, value] of malformed) {
      test(`a value may not be ${name}`, () => give(value, "invalid_config"));
    }
    test("expired credentials are refused, whichever way they come", async () => {
      await give(expired, "invalid_aws_credentials");
      await give(() => expired, "invalid_aws_credentials");
    });
  });

  describe("region", () => {
    const find = (env: Env, options: AembitAuthOptions = {}): Promise<string> =>
      resolveRegion({ env, fetch: cloud.fetch, ...options });
    const onEcs = (): Env => ({ ...cloud.env.ecs(), ...NO_REGION });
    const task = (document: unknown): void =>
      cloud.tmds.respond(/\/task$/, () => jsonBody(JSON.stringify(document)));

    test("the order is option, AWS_REGION, AWS_DEFAULT_REGION", async () => {
      const env = { ...cloud.env.ecs(), AWS_REGION: "us-east-1", AWS_DEFAULT_REGION: "us-east-2" };
      assert.equal(await find(env, { region: "us-west-1" }), "us-west-1");
      assert.equal(await find(env), "us-east-1");
      assert.equal(await find({ ...env, AWS_REGION: " " }), "us-east-2");
      isSilent();
    });

    test("then the ARN of the ECS task, without asking IMDS", async () => {
      assert.equal(await find(onEcs()), "eu-west-1");
      assert.deepEqual(cloud.imds.requests, []);
      assert.equal(cloud.tmds.requests.length, 1);
      assert.match(cloud.tmds.requests[0]?.path ?? "", /\/task$/);
    });

    const arns: readonly (readonly [arn: string, region: string])[] = [
      ["arn:aws-cn:ecs:cn-north-1:111122223333:task/c/1", "cn-north-1"],
      ["arn:aws-us-gov:ecs:us-gov-west-1:111122223333:task/c/1", "us-gov-west-1"],
      ["arn:aws:ecs:us-east-2:111122223333:task/1", "us-east-2"],
    ];
    for (const [TaskARN, region] of arns) {
      test(`${TaskARN} is in ${region}`, async () => {
        task({ TaskARN });
        assert.equal(await find(onEcs()), region);
      });
    }
    for (const document of [{}, { TaskARN: 5 }, { TaskARN: "short" }]) {
      test(`then IMDS, if the task is ${JSON.stringify(document)}`, async () => {
        task(document);
        assert.equal(await find(onEcs()), "eu-west-1");
        assert.deepEqual(asked(cloud.imds), [`PUT ${TOKEN_PATH}`, `GET ${REGION_PATH}`]);
      });
    }
    test("then IMDS, if the task cannot be read", async () => {
      cloud.tmds.fail(/./, { status: 500 });
      assert.equal(await find(onEcs(), { maxAttempts: 1 }), "eu-west-1");
    });
    test("a task's ARN puts nothing but a region into a host name", async () => {
      task({ TaskARN: "arn:aws:ecs:x@evil.example/:111122223333:task/c/1" });
      await failure(find(onEcs()), "invalid_config");
      assert.deepEqual(cloud.imds.requests, []);
    });

    test("IMDS gives the region as text, trimmed", async () => {
      cloud.imds.respond(REGION_PATH, () => ({ body: " us-west-2\n" }));
      assert.equal(await find(cloud.env.ec2()), "us-west-2");
    });
    for (const body of ["us-west-2.evil.example#", "US-WEST-2", "us-west-2a", "<html></html>"]) {
      test(`IMDS puts nothing but a region into a host name: ${body}`, async () => {
        cloud.imds.respond(REGION_PATH, () => ({ body }));
        await failure(find(cloud.env.ec2()), "invalid_config");
      });
    }

    for (const [name, prepare] of [
      ["IMDS refuses", () => cloud.imds.fail(/./, "refused")],
      ["IMDS has none", () => cloud.imds.fail(REGION_PATH, { status: 404 })],
    ] as const) {
      test(`no region anywhere, because ${name}`, async () => {
        prepare();
        const work = find(cloud.env.ec2(), { maxAttempts: 1 });
        const { message } = await failure(work, "no_region");
        assert.match(message, /AWS_REGION/);
        assert.ok(message.includes(cloud.imds.url), message);
      });
    }
    test("there is no default region", async () => {
      const { message } = await failure(find({ [DISABLED]: "true" }), "no_region");
      assert.match(message, /AWS_REGION/);
      isSilent();
    });
  });

  describe("ECS metadata", () => {
    const read = (options: AembitAuthOptions = {}) =>
      readEcsMetadata({ env: cloud.env.ecs(), fetch: cloud.fetch, ...options });
    const base64 = (body: string | Uint8Array): string => Buffer.from(body).toString("base64");
    const request = (options: AembitAuthOptions = {}) =>
      createAuthRequest({ env: cloud.env.ecs(), fetch: cloud.fetch, ...options });
    /** JSON with a byte in it that is not UTF-8. */
    const latin1 = Uint8Array.from(Buffer.from(`{"Name":"caf\xe9"}`, "latin1"));

    const bodies: readonly (readonly [name: string, body: string | Uint8Array])[] = [
      ["odd white space", "  {\r\n\t\"A\" :1 ,\n \"B\":  [ ]}\n\n"],
      ["letters beyond ASCII", `{"motto":"naïve ☕ 決済 \u2028 \\u0026 \\u00e9"}`],
      ["numbers that JavaScript cannot hold", `{"Serial":9007199254740993,"x":1e2,"y":-0.0}`],
      ["fields given twice", `{"a":1,"a":2,"__proto__":{}}`],
      ["a byte order mark", `\ufeff{"Name":"app"}`],
      ["bytes that are not UTF-8", latin1],
    ];
    for (const [name, body] of bodies) {
      test(`every byte stays: ${name}`, async () => {
        cloud.tmds.respond(/./, () => jsonBody(body));
        const expected = base64(body);
        assert.deepEqual(await read(), { containerMetadata: expected, taskMetadata: expected });
      });
    }

    test("container and task come from their own paths", async () => {
      const { region, launchType } = cloud;
      const expected = {
        containerMetadata: base64(documents.containerMetadata(region, launchType)),
        taskMetadata: base64(documents.taskMetadata(region, launchType)),
      };
      assert.deepEqual(await read(), expected);
      assert.deepEqual((await request()).client.aws.ecs, expected);
    });

    test("omit asks for none", async () => {
      const body = await request({ ecsMetadata: "omit" });
      assert.equal(body.client.aws.ecs, undefined);
      assert.deepEqual(cloud.tmds.requests, []);
    });

    test("omit still reads the task for the region, if nothing else gives one", async () => {
      const env = { ...cloud.env.ecs(), ...NO_REGION };
      const { client } = await request({ env, ecsMetadata: "omit" });
      assert.equal(client.aws.stsGetCallerIdentity.region, "eu-west-1");
      assert.equal(client.aws.ecs, undefined);
      assert.equal(cloud.tmds.requests.length, 1);
      assert.match(cloud.tmds.requests[0]?.path ?? "", /\/task$/);
      assert.deepEqual(cloud.imds.requests, []);
    });

    test("auto without the variable sends none", async () => {
      assert.equal((await request({ env: cloud.env.staticKeys() })).client.aws.ecs, undefined);
      isSilent();
    });

    test("require without the variable is a mistake, before any packet", async () => {
      const env = cloud.env.staticKeys();
      for (const work of [() => request({ env, ecsMetadata: "require" }), () => read({ env })]) {
        const { message } = await failure(work, "invalid_config");
        assert.ok(message.includes(METADATA_URI), message);
      }
      isSilent();
    });

    for (const uri of [
      "http://evil.example/v4/x", "http://169.254.169.254/v4/x",
      "http://169.254.170.2@evil.example/", "http://user:pass@127.0.0.1/v4/x",
      "ftp://127.0.0.1/v4/x", "/v4/x", "constructor",
    ]) {
      test(`${uri} is refused before any packet`, async () => {
        const env = { ...cloud.env.staticKeys(), [METADATA_URI]: uri };
        for (const api of [read, request]) {
          const { message } = await failure(api({ env }), "invalid_config");
          assert.ok(message.includes(METADATA_URI), message);
        }
        isSilent();
      });
    }

    // From here on a read may still be on its way when its test is over.
    const passing: readonly (readonly [name: string, fault: FaultKind])[] = [
      ["404 of a container that is not registered yet", { status: 404 }],
      ["429", documents.ecsThrottled],
      ["500", { status: 500 }],
      ["503", { status: 503 }],
    ];
    for (const [name, fault] of passing) {
      for (const path of [/\/task$/, /\/v4\/[^/]*$/]) {
        test(`${name} is tried again: ${path}`, async () => {
          cloud.tmds.fail(path, fault, 1);
          await read();
          assert.equal(cloud.tmds.requests.length, 3);
        });
      }
    }

    for (const fault of [{ status: 404 }, { status: 400 }, "refused", "html", "empty"] as const) {
      test(`auto warns and goes on, require does not: ${JSON.stringify(fault)}`, async () => {
        cloud.tmds.fail(/./, fault);
        const warnings: string[] = [];
        const logger = { debug: () => {}, warn: (line: string) => void warnings.push(line) };
        const options = { logger, maxAttempts: 1 };
        assert.equal((await request(options)).client.aws.ecs, undefined);
        assert.equal(warnings.length, 1);
        assert.match(warnings[0] ?? "", /ECS/);
        const required: AembitAuthOptions = { ...options, ecsMetadata: "require" };
        await failure(request(required), "metadata_unavailable");
        await failure(read(options), "metadata_unavailable");
        assert.equal(warnings.length, 1);
      });
    }

    test("half of the metadata is none", async () => {
      cloud.tmds.fail(/\/task$/, { status: 400 });
      assert.equal((await request({ maxAttempts: 1 })).client.aws.ecs, undefined);
    });
  });

  describe("instance identity", () => {
    const options = (env: Env = {}): AembitAuthOptions =>
      ({ env: { ...cloud.env.ec2(), ...env }, fetch: cloud.fetch, instanceIdentity: true });
    const IDENTITY = "/latest/dynamic/instance-identity";

    test("the document stays as it is, and the signature becomes one line", async () => {
      const { aws } = (await createAuthRequest(options())).client;
      const document = documents.instanceIdentityDocument(cloud.region);
      const lines = documents.instanceIdentitySignature("signature", document);
      assert.match(lines, /\n/);
      assert.equal(aws.instanceIdentityDocument, Buffer.from(document).toString("base64"));
      assert.equal(aws.instanceIdentityDocumentSignature, lines.replaceAll("\n", ""));
    });

    test("Edge takes it", async () => {
      await authenticate(options());
      assert.equal(cloud.edge.issued.length, 1);
    });

    test("it is sent only when asked for", async () => {
      const { aws } = (await createAuthRequest({ ...options(), instanceIdentity: false })).client;
      assert.deepEqual(Object.keys(aws), ["stsGetCallerIdentity"]);
      assert.ok(asked(cloud.imds).every((line) => !line.includes(IDENTITY)));
    });

    test("it works beside keys of the environment", async () => {
      const { aws } = (await createAuthRequest(options(cloud.env.staticKeys()))).client;
      assert.equal(typeof aws.instanceIdentityDocument, "string");
      assert.deepEqual(asked(cloud.imds).sort(), [
        `GET ${IDENTITY}/document`, `GET ${IDENTITY}/signature`, `PUT ${TOKEN_PATH}`,
      ]);
    });

    test("with IMDS disabled it is a mistake, before any packet", async () => {
      const env = { ...cloud.env.staticKeys(), [DISABLED]: "true" };
      const { message } = await failure(authenticate(options(env)), "invalid_config");
      assert.ok(message.includes(DISABLED), message);
      isSilent();
    });

    for (const part of ["document", "signature"]) {
      for (const fault of [{ status: 404 }, "html", "empty"] as const) {
        test(`it is never sent by half: ${part} ${JSON.stringify(fault)}`, async () => {
          cloud.imds.fail(`${IDENTITY}/${part}`, fault);
          await failure(authenticate({ ...options(), maxAttempts: 1 }), "metadata_unavailable");
          assert.deepEqual(cloud.edge.requests, []);
        });
      }
    }
  });

  describe("number of requests", () => {
    test("EC2 takes exactly four metadata requests, none of them twice", async () => {
      await authenticate({ env: cloud.env.ec2(), fetch: cloud.fetch });
      const expected = [
        `GET ${ROLES}`, `GET ${ROLES}app-role`, `GET ${REGION_PATH}`, `PUT ${TOKEN_PATH}`,
      ].sort();
      assert.deepEqual(asked(cloud.imds).sort(), expected);
      assert.equal(cloud.requests().length, 5);
    });

    test("EC2 with its identity takes six", async () => {
      await authenticate({ env: cloud.env.ec2(), fetch: cloud.fetch, instanceIdentity: true });
      assert.equal(new Set(asked(cloud.imds)).size, 6);
      assert.equal(cloud.imds.requests.length, 6);
    });

    test("EC2 reads role list, region, document and signature at once", async () => {
      const document = documents.instanceIdentityDocument(cloud.region);
      const bodies: Readonly<Record<string, string>> = {
        [ROLES]: "app-role",
        [REGION_PATH]: cloud.region,
        "/latest/dynamic/instance-identity/document": document,
        "/latest/dynamic/instance-identity/signature": "c2lnbmF0dXJl",
      };
      const handler = together(4, ({ path }) => ({ body: bodies[path] ?? "" }));
      for (const path of Object.keys(bodies)) cloud.imds.respond(path, handler);
      const options = { env: cloud.env.ec2(), fetch: cloud.fetch, maxAttempts: 1 };
      await authenticate({ ...options, instanceIdentity: true });
      assert.equal(cloud.imds.requests.length, 6);
    });

    for (const [name, env] of [
      ["with a region", () => cloud.env.ecs()],
      ["without a region", () => ({ ...cloud.env.ecs(), ...NO_REGION })],
    ] as const) {
      test(`ECS ${name} makes its three reads at once, and never asks IMDS`, async () => {
        const { region, launchType, accounts } = cloud;
        const handler = together(3, ({ service, path }) => jsonBody(
          service === "ecs" ? documents.ecsCredentials(accounts.ecs, Date.now() + HOUR_MS)
            : path.endsWith("/task") ? documents.taskMetadata(region, launchType)
            : documents.containerMetadata(region, launchType),
        ));
        cloud.ecs.respond(/./, handler);
        cloud.tmds.respond(/./, handler);
        await authenticate({ env: env(), fetch: cloud.fetch, maxAttempts: 1 });
        assert.equal(cloud.ecs.requests.length, 1);
        assert.equal(cloud.tmds.requests.length, 2);
        assert.deepEqual(cloud.imds.requests, []);
        assert.equal(cloud.edge.requests.length, 1);
      });
    }

    for (const [name, env] of [
      ["Lambda", () => cloud.env.lambda()],
      ["static keys", () => cloud.env.staticKeys()],
    ] as const) {
      test(`${name} takes one request`, async () => {
        await authenticate({ env: env(), fetch: cloud.fetch });
        assert.deepEqual(cloud.requests().map(({ service }) => service), ["edge"]);
      });
    }
  });
});

// Each of these waits for a real time-out, so they wait side by side, each in a cloud of its own.
describe("Metadata that does not answer", { concurrency: true }, () => {
  const inCloud = (work: (cloud: Cloud) => Promise<void>) => async (): Promise<void> => {
    const cloud = await startCloud();
    try {
      await work(cloud);
    } finally {
      await cloud.close();
    }
  };
  const secondsOf = async (work: Promise<unknown>): Promise<number> => {
    const startedMs = performance.now();
    await work;
    return (performance.now() - startedMs) / 1000;
  };

  test("off AWS, all is over within 3 s: IMDS hangs", inCloud(async (cloud) => {
    cloud.imds.fail(/./, "hang");
    const env = cloud.env.ec2();
    const seconds = await secondsOf(failure(authenticate({ env }), "no_aws_credentials"));
    assert.ok(seconds < 3, `${seconds} s`);
    assert.deepEqual(cloud.edge.requests, []);
  }));

  test("off AWS, all is over within 3 s: IMDS refuses", inCloud(async (cloud) => {
    await cloud.imds.stop();
    const env = cloud.env.ec2();
    const seconds = await secondsOf(failure(authenticate({ env }), "no_aws_credentials"));
    assert.ok(seconds < 3, `${seconds} s`);
  }));

  test("off AWS, the region is given up within 3 s", inCloud(async (cloud) => {
    cloud.imds.fail(/./, "hang");
    const seconds = await secondsOf(failure(resolveRegion({ env: cloud.env.ec2() }), "no_region"));
    assert.ok(seconds < 3, `${seconds} s`);
  }));

  test("a token that never comes is explained by the hop limit", inCloud(async (cloud) => {
    cloud.imds.fail("/latest/api/token", "hang");
    const options = { env: cloud.env.ec2(), source: "imds", maxAttempts: 1 } as const;
    let message = "";
    const work = failure(loadAwsCredentials(options), "metadata_unavailable").then((error) => {
      ({ message } = error);
      assert.equal(error.retryable, true);
    });
    const seconds = await secondsOf(work);
    assert.match(message, /hop limit/);
    assert.ok(seconds > 0.9 && seconds < 2, `${seconds} s`);
    assert.deepEqual(cloud.imds.requests.map(({ method }) => method), ["PUT"]);
  }));

  for (const fault of ["drip", "stall"] as const) {
    test(`an attempt has a second, not a second of idling: ${fault}`, inCloud(async (cloud) => {
      cloud.ecs.fail(/./, fault);
      const work = loadAwsCredentials({ env: cloud.env.ecs(), maxAttempts: 1 });
      const seconds = await secondsOf(failure(work, "metadata_unavailable"));
      assert.ok(seconds > 0.9 && seconds < 2, `${seconds} s`);
    }));
  }

  test("STS has five seconds for an attempt", inCloud(async (cloud) => {
    cloud.sts.fail("/", "hang");
    const options = { env: cloud.env.irsa(), fetch: cloud.fetch, maxAttempts: 1 };
    const work = loadAwsCredentials(options);
    const seconds = await secondsOf(failure(work, "metadata_unavailable"));
    assert.ok(seconds > 4.5 && seconds < 7, `${seconds} s`);
    assert.deepEqual(cloud.imds.requests, []);
  }));
});

describe("the exchange", () => {
  const AUTH = "/edge/v1/auth";
  const CREDENTIALS = "/edge/v1/credentials";
  const API_KEY = { host: "api.example.com", port: 443, credentialType: "ApiKey" } as const;
  const XML = { "Content-Type": "text/xml" };

  /** A logger that keeps what it is told. */
  function keepLines(): AembitLogger & { lines: string[]; warnings: string[] } {
    const lines: string[] = [];
    const warnings: string[] = [];
    return {
      lines,
      warnings,
      debug: (line) => void lines.push(line),
      warn: (line) => {
        lines.push(line);
        warnings.push(line);
      },
    };
  }

  const asked = (cloud: Cloud, path: string): Recorded[] =>
    cloud.requests().filter((request) => request.path === path);

  function bodyOf(request: Recorded | undefined): AuthRequest {
    assert.ok(request, "there is no such request");
    const body: AuthRequest = JSON.parse(request.body);
    return body;
  }

  const signedAt = (request: Recorded | undefined): string =>
    bodyOf(request).client.aws.stsGetCallerIdentity.headers["X-Amz-Date"];

  const amzDate = (ms: number): string =>
    new Date(ms).toISOString().replace(/[-:]|\.\d+/g, "");

  const staticKeys = (cloud: Cloud, more: AembitAuthOptions = {}): AembitAuthOptions =>
    ({ env: cloud.env.staticKeys(), fetch: cloud.fetch, ...more });

  /** How long work took, and what came of it. */
  async function timed<T>(work: Promise<T>): Promise<{ result: T; ms: number }> {
    const startedMs = performance.now();
    const result = await work;
    return { result, ms: performance.now() - startedMs };
  }

  describe("the request for a token", () => {
    let cloud: Cloud;
    before(async () => {
      cloud = await startCloud();
    });
    after(() => cloud.close());
    beforeEach(() => cloud.reset());

    const FUNCTION = "arn:aws:lambda:eu-west-1:111122223333:function:app:live";
    const WORKLOAD = "6f1c2c5e-8a3b-4f0e-9f44-0b8f6f0f9a11";
    const base64 = (document: string): string => Buffer.from(document).toString("base64");

    interface Case {
      readonly name: string;
      readonly account: AccountName;
      readonly env: () => Record<string, string>;
      readonly options?: AembitAuthOptions;
      /** What stands beside the signed request. */
      readonly aws?: () => object;
      readonly os?: object;
      readonly headers?: object;
    }
    const ecs = (): object => ({
      ecs: {
        containerMetadata: base64(documents.containerMetadata(cloud.region, cloud.launchType)),
        taskMetadata: base64(documents.taskMetadata(cloud.region, cloud.launchType)),
      },
    });
    const instance = (): object => {
      const document = documents.instanceIdentityDocument(cloud.region);
      const signature = documents.instanceIdentitySignature("signature", document);
      assert.match(signature, /\n/, "IMDS breaks it into lines");
      return {
        instanceIdentityDocument: base64(document),
        instanceIdentityDocumentSignature: signature.replaceAll("\n", ""),
      };
    };
    const workload = { environment: { CLIENT_WORKLOAD_ID: WORKLOAD } };
    const CASES: readonly Case[] = [
      { name: "EC2", account: "ec2", env: () => cloud.env.ec2() },
      { name: "ECS", account: "ecs", env: () => cloud.env.ecs(), aws: ecs },
      {
        name: "ECS without its metadata",
        account: "ecs",
        env: () => cloud.env.ecs(),
        options: { ecsMetadata: "omit" },
      },
      { name: "EKS Pod Identity", account: "pod", env: () => cloud.env.eksPodIdentity() },
      { name: "EKS IRSA", account: "webIdentity", env: () => cloud.env.irsa() },
      { name: "no session token", account: "static", env: () => cloud.env.staticKeys() },
      { name: "Lambda that gives no ARN", account: "lambda", env: () => cloud.env.lambda() },
      {
        name: "Lambda",
        account: "lambda",
        env: () => cloud.env.lambda(),
        options: { lambdaArn: FUNCTION },
        aws: () => ({ lambda: { arn: FUNCTION } }),
      },
      {
        name: "a Client Workload",
        account: "static",
        env: () => ({ ...cloud.env.staticKeys(), CLIENT_WORKLOAD_ID: WORKLOAD }),
        os: workload,
      },
      {
        name: "a Resource Set",
        account: "static",
        env: () => cloud.env.staticKeys(),
        options: { resourceSetId: "rs-1" },
        headers: { "x-aembit-resourceset": "rs-1" },
      },
      {
        name: "an instance identity",
        account: "ec2",
        env: () => cloud.env.ec2(),
        options: { instanceIdentity: true },
        aws: instance,
      },
      {
        name: "all of it at once",
        account: "ecs",
        env: () => ({ ...cloud.env.ecs(), AEMBIT_RESOURCE_SET_ID: "rs-2" }),
        options: { instanceIdentity: true, lambdaArn: FUNCTION, clientWorkloadId: WORKLOAD },
        aws: () => ({ ...ecs(), ...instance(), lambda: { arn: FUNCTION } }),
        os: workload,
        headers: { "x-aembit-resourceset": "rs-2" },
      },
    ];

    /** What fetch itself adds to every request. */
    const OF_FETCH =
      /^(host|connection|content-length|user-agent|accept-(encoding|language)|sec-fetch-mode)$/;

    /** The documented body around a signature, of which only the form is known beforehand. */
    function expectedBody(shape: Case, nowMs: number, authorization: string): object {
      const { accessKeyId, sessionToken } = cloud.accounts[shape.account];
      const scope = `${amzDate(nowMs).slice(0, 8)}/${cloud.region}/sts/aws4_request`;
      const names = `content-type;host;x-amz-date${sessionToken ? ";x-amz-security-token" : ""}`;
      assert.equal(
        authorization.replace(/[0-9a-f]{64}$/, "(64)"),
        `AWS4-HMAC-SHA256 Credential=${accessKeyId}/${scope}, SignedHeaders=${names}, `
          + "Signature=(64)",
      );
      const headers = {
        "Content-Type": "application/x-www-form-urlencoded; charset=utf-8",
        "X-Amz-Date": amzDate(nowMs),
        ...(sessionToken && { "X-Amz-Security-Token": sessionToken }),
        Authorization: authorization,
      };
      return {
        clientId: cloud.clientId,
        client: {
          aws: { stsGetCallerIdentity: { headers, region: cloud.region }, ...shape.aws?.() },
          ...(shape.os && { os: shape.os }),
        },
      };
    }

    for (const shape of CASES) {
      test(`${shape.name}: body and headers are the documented ones, absent parts are left out`,
        async () => {
          const nowMs = Date.now();
          const options = {
            env: shape.env(), fetch: cloud.fetch, now: () => nowMs, ...shape.options,
          };
          const built = await createAuthRequest(options);
          const { Authorization } = built.client.aws.stsGetCallerIdentity.headers;
          assert.deepEqual(built, expectedBody(shape, nowMs, Authorization));
          assert.equal(cloud.edge.requests.length, 0, "createAuthRequest sends nothing to Aembit");

          const { accessToken, tokenType } = await authenticate(options);
          assert.deepEqual([accessToken, tokenType], [cloud.edge.issued[0], "Bearer"]);
          assert.equal(cloud.edge.requests.length, 1);
          const request = cloud.edge.requests[0];
          assert.deepEqual(bodyOf(request), built, "the body that is sent is the one shown");
          assert.deepEqual([request?.method, request?.path], ["POST", AUTH]);
          const own = Object.entries(request?.headers ?? {})
            .filter(([name]) => !OF_FETCH.test(name));
          const json = { "content-type": "application/json", accept: "application/json" };
          assert.deepEqual(Object.fromEntries(own), { ...json, ...shape.headers });
          const actions = cloud.sts.requests.map(({ body }) => /Action=(\w+)/.exec(body)?.[1]);
          const expected = shape.account === "webIdentity" ? "AssumeRoleWithWebIdentity" : "";
          assert.ok(actions.every((action) => action === expected), "the signed call is not sent");
        });
    }

    const REGIONS = [
      "us-east-1", "ap-southeast-7", "us-gov-west-1", "cn-north-1", "eusc-de-east-1",
      "us-iso-east-1", "us-isob-east-1", "us-isof-south-1", "eu-isoe-west-1",
    ];
    for (const account of ["static", "ec2"] as const) {
      for (const region of REGIONS) {
        test(`${account} keys in ${region}: Aembit accepts it, and STS is not asked`, async () => {
          const options = { ...staticKeys(cloud), region, credentials: cloud.accounts[account] };
          assert.equal((await authenticate(options)).accessToken, cloud.edge.issued[0]);
          assert.deepEqual(cloud.fetched, [`${cloud.edge.url}${AUTH}`]);
        });
      }
    }

    test("the derived Edge URL is asked when none is given", async () => {
      const { AEMBIT_EDGE_BASE_URL: _, ...env } = cloud.env.staticKeys();
      await authenticate({ env, fetch: cloud.fetch });
      assert.deepEqual(cloud.fetched, [`https://a1b2c3.ec.useast2.aembit.io${AUTH}`]);
    });

    const ANSWERS: readonly (readonly [name: string, Answer, AembitAuthErrorCode?])[] = [
      ["201 and a token", json('{"accessToken":"t","expiresIn":5}', 201)],
      ["success:true beside a token", json('{"success":true,"accessToken":"t","expiresIn":5}')],
      ["a JSON body sent as text", text('{"accessToken":"t","expiresIn":5}')],
      ["success:false and 200", json(documents.edgeFailure("not you")), "invalid_edge_response"],
      [
        "success:false beside a token",
        json('{"success":false,"accessToken":"t","expiresIn":5}'),
        "invalid_edge_response",
      ],
      ["204", { status: 204 }, "invalid_edge_response"],
      ["200 and text", text("OK"), "invalid_edge_response"],
      ["tokenType 7", json('{"accessToken":"t","expiresIn":5,"tokenType":7}'),
        "invalid_edge_response"],
      ["304", { status: 304 }, "invalid_edge_response"],
    ];
    for (const [name, answer, code] of ANSWERS) {
      test(`${name} is ${code ?? "a token"}`, async () => {
        cloud.edge.respond(AUTH, () => answer);
        if (code === undefined) {
          const { accessToken, tokenType } = await authenticate(staticKeys(cloud));
          assert.deepEqual([accessToken, tokenType], ["t", "Bearer"]);
        } else {
          const error = await failure(authenticate(staticKeys(cloud)), code);
          assert.equal(error.status, answer.status ?? 200);
          if (name === "success:false and 200") assert.match(error.message, /not you/);
        }
        assert.equal(cloud.edge.requests.length, 1);
      });
    }
  });

  describe("errors", () => {
    let cloud: Cloud;
    before(async () => {
      cloud = await startCloud();
    });
    after(() => cloud.close());
    beforeEach(() => cloud.reset());

    const RETRYABLE: Readonly<Record<AembitAuthErrorCode, boolean>> = {
      invalid_config: false,
      no_aws_credentials: false,
      invalid_aws_credentials: false,
      metadata_unavailable: true,
      no_region: false,
      edge_rejected: false,
      no_matching_policy: false,
      edge_unavailable: true,
      invalid_edge_response: false,
      timeout: true,
    };
    const isCode = (code: string): code is AembitAuthErrorCode => code in RETRYABLE;
    for (const code of Object.keys(RETRYABLE).filter(isCode)) {
      test(`an error can be made with the code ${code}`, () => {
        const plain = new AembitAuthError(code, "why");
        assert.ok(plain instanceof Error);
        assert.deepEqual([plain.name, plain.code, plain.message], ["AembitAuthError", code, "why"]);
        assert.equal(plain.retryable, RETRYABLE[code]);
        assert.deepEqual([plain.status, plain.attempts, plain.cause], Array(3).fill(undefined));
        assert.doesNotMatch(JSON.stringify(plain), /status|attempts|cause/);
        assert.equal(Object.prototype.propertyIsEnumerable.call(plain, "name"), false);

        const cause = new Error("because");
        const retryable = !RETRYABLE[code];
        const full = new AembitAuthError(code, "why", {
          status: 418, attempts: 7, retryable, cause,
        });
        assert.deepEqual([full.status, full.attempts, full.retryable], [418, 7, retryable]);
        assert.equal(full.cause, cause);
        assert.match(String(full), /^AembitAuthError: why$/);
      });
    }

    type Row = readonly [statuses: readonly number[], AembitAuthErrorCode, attempts: number];
    const STATUSES: readonly Row[] = [
      [[400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 415, 418, 422, 423, 425, 426, 431, 451,
        499], "edge_rejected", 1],
      [[429, 500, 502, 503, 504], "edge_unavailable", 2],
      [[501, 505, 507, 508, 511, 520, 599], "edge_unavailable", 1],
      [[300, 301, 302, 303, 304, 305, 307, 308, 399], "invalid_edge_response", 1],
    ];
    for (const [statuses, code, attempts] of STATUSES) {
      for (const status of statuses) {
        test(`${status} of Aembit is ${code} after ${attempts} of 2 attempts`, async () => {
          // 304 has no body, and its reader must not wait for one.
          const body = status === 304 ? "" : documents.edgeFailure("the reason of Aembit");
          cloud.edge.fail(AUTH, { status, body });
          const options = staticKeys(cloud, { maxAttempts: 2 });
          const error = await failure(authenticate(options), code);
          assert.deepEqual([error.status, error.attempts], [status, attempts]);
          assert.equal(error.retryable, RETRYABLE[code]);
          assert.match(error.message, new RegExp(`\\b${status}\\b`));
          assert.ok(error.message.includes(`${cloud.edge.url}${AUTH}`), "where it was tried");
          if (status >= 400) assert.match(error.message, /the reason of Aembit/);
          assert.equal(cloud.edge.requests.length, attempts);
        });
      }
    }

    test("nobody there is edge_unavailable, without a status", async () => {
      cloud.edge.fail(AUTH, "refused");
      const error = await failure(authenticate(staticKeys(cloud)), "edge_unavailable");
      assert.deepEqual([error.status, error.attempts, error.retryable], [undefined, 3, true]);
      assert.match(error.message, /ECONNREFUSED/);
      assert.ok(error.cause instanceof Error);
      assert.equal("code" in error.cause && error.cause.code, "ECONNREFUSED");
    });

    const AGENT: readonly (readonly [status: number, retryable: boolean])[] = [
      [400, false], [401, false], [403, false], [404, false], [302, false],
      [429, true], [500, true], [503, true],
    ];
    for (const [status, retryable] of AGENT) {
      const worth = retryable ? "worth" : "not worth";
      test(`${status} of the ECS agent is ${worth} another call`, async () => {
        cloud.ecs.fail(/credentials/, { status });
        const call = authenticate({ env: cloud.env.ecs(), fetch: cloud.fetch, maxAttempts: 1 });
        const error = await failure(call, "metadata_unavailable");
        assert.deepEqual([error.status, error.retryable], [status, retryable]);
      });
    }

    // What a service says of its failure, told by each service in each of its ways.
    interface Teller {
      readonly name: string;
      readonly code: AembitAuthErrorCode;
      readonly tell: (words: string) => Promise<AembitAuthError>;
    }
    const teller = (
      name: string,
      code: AembitAuthErrorCode,
      { service, env, fault }: {
        service: ServiceName;
        env: () => Record<string, string>;
        fault: (words: string) => FaultKind;
      },
    ): Teller => ({
      name,
      code,
      tell: (words) => {
        cloud[service].fail(/./, fault(words));
        const options = { env: env(), fetch: cloud.fetch, maxAttempts: 1 };
        return failure(authenticate({ ...options, ecsMetadata: "omit" }), code);
      },
    });
    const TELLERS: readonly Teller[] = [
      teller("message of Aembit", "edge_rejected", {
        service: "edge",
        env: () => cloud.env.staticKeys(),
        fault: (message) => ({ status: 400, body: documents.edgeFailure(message) }),
      }),
      teller("plain text of Aembit's gateway", "edge_unavailable", {
        service: "edge",
        env: () => cloud.env.staticKeys(),
        fault: (body) => ({ status: 503, body: `plain ${body}` }),
      }),
      teller("Message of the ECS agent", "metadata_unavailable", {
        service: "ecs",
        env: () => cloud.env.ecs(),
        fault: (Message) => ({ status: 400, body: JSON.stringify({ Code: "Bad", Message }) }),
      }),
      teller("message of the ECS agent", "metadata_unavailable", {
        service: "ecs",
        env: () => cloud.env.ecs(),
        fault: (message) => ({ status: 400, body: JSON.stringify({ code: "bad", message }) }),
      }),
      teller("plain text of the EKS agent", "metadata_unavailable", {
        service: "pod",
        env: () => cloud.env.eksPodIdentity(),
        fault: (body) => ({ status: 400, body: `plain ${body}` }),
      }),
      teller("Message in a document of credentials", "invalid_aws_credentials", {
        service: "ecs",
        env: () => cloud.env.ecs(),
        fault: (Message) => ({ status: 200, body: JSON.stringify({ Code: "Failed", Message }) }),
      }),
      teller("XML of STS", "invalid_aws_credentials", {
        service: "sts",
        env: () => cloud.env.irsa(),
        fault: (words) =>
          ({ status: 400, headers: XML, body: documents.stsErrorXml("Code", words, "id") }),
      }),
    ];

    const FORBIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Cn}]/u;
    const ESCAPES = ["\u001b[31mred\u001b[0m", "\u009b1A", "a\r\nb\u0085c\u2028d\u2029e", "nul\0",
      "\u202Eevil\u2066x\u2069\u200E\u200F\u061C", "zero\u200Bwidth\uFEFF", "tab\tvertical\v"];
    for (const { name, tell } of TELLERS) {
      test(`${name}: at most 200 characters are shown`, async () => {
        // None of these stands anywhere else in a message.
        for (const filler of ["щ", "\u{1F600}"]) {
          const { message } = await tell(filler.repeat(5000));
          const count = message.split(filler).length - 1;
          assert.ok(count > 150 && count <= 200, `${count} of ${filler}`);
          assert.ok(message.isWellFormed(), "no character is cut in half");
          cloud.reset();
        }
      });

      test(`${name}: no control, bidirectional or line-separating character`, async () => {
        for (const words of ESCAPES) {
          const { message } = await tell(`start ${words} end`);
          assert.doesNotMatch(message, FORBIDDEN, JSON.stringify(words));
          assert.match(message, /start .* end/);
          cloud.reset();
        }
      });

      test(`${name}: a run of 40 characters is cut out, 39 stay`, async () => {
        for (const character of "aZ9_+/=.~%-") {
          const [short, long] = [character.repeat(39), character.repeat(40)];
          const { message } = await tell(`щ${short}щ${long}щ and more`);
          // A word with a percent sign may be an encoded secret, and goes whatever its length.
          const stays = character === "%" || message.includes(`щ${short}щ`);
          assert.ok(stays, `39 of ${character}`);
          assert.ok(!message.includes(long), `40 of ${character}`);
          assert.match(message, /and more/, "what stands around it stays");
          cloud.reset();
        }
      });
    }

    const ODD: readonly (readonly [name: string, body: string])[] = [
      ["a number", '{"message":7}'],
      ["an object", '{"message":{"deep":"object"}}'],
      ["null", '{"message":null}'],
      ["an empty text", '{"message":"  "}'],
      ["an array for a body", "[1,2]"],
      ["a page", "<!DOCTYPE html><html><body>Sign in</body></html>"],
      ["nothing", ""],
      ["half a JSON", '{"success":false,"mess'],
    ];
    for (const [name, body] of ODD) {
      test(`a message that is ${name} is left out`, async () => {
        cloud.edge.fail(AUTH, { status: 400, body });
        const { message } = await failure(authenticate(staticKeys(cloud)), "edge_rejected");
        assert.doesNotMatch(message, /object|null|undefined|Sign in|mess\b|""/);
        assert.match(message, /\b400\b/);
      });
    }
  });

  /** A server of our own, where only the server can tell what happened. */
  async function listenOn(server: Server): Promise<{ url: string; close: () => void }> {
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const address = server.address();
    assert.ok(address !== null && typeof address === "object");
    const close = (): void => {
      server.closeAllConnections();
      server.close();
    };
    return { url: `http://127.0.0.1:${address.port}`, close };
  }

  /** Clouds for tests that run side by side: each has one for itself, none is started twice. */
  function cloudPool(size: number): {
    readonly open: () => Promise<void>;
    readonly close: () => Promise<void>;
    readonly use: (work: (cloud: Cloud) => Promise<void>) => () => Promise<void>;
  } {
    const all: Cloud[] = [];
    const free: Cloud[] = [];
    return {
      open: async () => {
        // A spare one: a port that one cloud knows as closed may since be another cloud's.
        for (let index = 0; index <= size; index += 1) all.push(await startCloud());
        for (const cloud of all) {
          cloud.edge.fail("/probe", "refused");
          const probe = cloud.fetch(`${cloud.edge.url}/probe`);
          if (await probe.then(() => false, () => true)) free.push(cloud);
          cloud.reset();
        }
      },
      close: async () => {
        await Promise.all(all.map((cloud) => cloud.close()));
      },
      use: (work) => async () => {
        const cloud = free.shift();
        assert.ok(cloud, "more tests at a time than clouds");
        try {
          await work(cloud);
        } finally {
          cloud.reset();
          free.push(cloud);
        }
      },
    };
  }

  describe("HTTP rules", { concurrency: 6 }, () => {
    const pool = cloudPool(6);
    before(pool.open);
    after(pool.close);
    const rule = (name: string, work: (cloud: Cloud) => Promise<void>): void =>
      void test(name, pool.use(work));

    for (const maxAttempts of [1, 2, 5]) {
      rule(`maxAttempts ${maxAttempts}: as many requests, the first included`, async (cloud) => {
        cloud.edge.fail(AUTH, { status: 503, headers: { "Retry-After": "0" } });
        const call = authenticate(staticKeys(cloud, { maxAttempts }));
        assert.equal((await failure(call, "edge_unavailable")).attempts, maxAttempts);
        assert.equal(cloud.edge.requests.length, maxAttempts);
      });
    }

    rule("maxAttempts counts for metadata and for STS too", async (cloud) => {
      cloud.ecs.fail(/./, { status: 503 });
      cloud.sts.fail(/./, { status: 503 });
      for (const env of [cloud.env.ecs(), cloud.env.irsa()]) {
        const call = authenticate({ env, fetch: cloud.fetch, maxAttempts: 1, ecsMetadata: "omit" });
        await failure(call, "metadata_unavailable");
      }
      assert.deepEqual([cloud.ecs.requests.length, cloud.sts.requests.length], [1, 1]);
    });

    rule("without Retry-After the pauses grow from 200 ms and are random", async (cloud) => {
      cloud.edge.fail(AUTH, { status: 503 });
      const clients = Array.from({ length: 8 }, async () =>
        timed(failure(authenticate(staticKeys(cloud)), "edge_unavailable")));
      const times = (await Promise.all(clients)).map(({ ms }) => ms);
      // Two pauses of up to 200 and 400 ms; the rest is the machine's. That all eight draw next to
      // nothing, or next to the most, is one chance in many thousands.
      assert.ok(Math.max(...times) < 600 + 3000, String(times));
      assert.ok(Math.max(...times) > 200 && Math.min(...times) < 550, `not random: ${times}`);
    });

    const DATE = "Thu, 15 Jan 2026 10:30:45 GMT";
    const PAUSES: readonly (readonly [
      name: string, headers: Record<string, string>, atLeastMs: number, atMostMs: number,
    ])[] = [
      ["0 seconds", { "Retry-After": "0" }, 0, 1000],
      ["1 second", { "Retry-After": "1" }, 990, 3000],
      [
        "a date, two seconds after the server's own",
        { Date: DATE, "Retry-After": "Thu, 15 Jan 2026 10:30:47 GMT" }, 1990, 4000,
      ],
      [
        "a date that is past",
        { Date: DATE, "Retry-After": "Thu, 15 Jan 2026 10:30:44 GMT" }, 0, 1000,
      ],
      ["a negative number, which says nothing", { "Retry-After": "-5" }, 0, 1200],
      ["a word, which says nothing", { "Retry-After": "soon" }, 0, 1200],
      ["nothing at all", { "Retry-After": "" }, 0, 1200],
    ];
    for (const status of [429, 503]) {
      for (const [name, headers, atLeastMs, atMostMs] of PAUSES) {
        rule(`${status} and Retry-After with ${name}`, async (cloud) => {
          cloud.edge.respond(AUTH, () => ({ status, headers }), 1);
          const call = authenticate(staticKeys(cloud));
          const { ms } = await timed(call);
          assert.ok(ms >= atLeastMs && ms < atMostMs, `${ms} ms`);
          assert.equal(cloud.edge.requests.length, 2);
        });
      }
    }

    const LATE = ["60", "99999999999999999999", "Thu, 31 Dec 2099 23:59:59 GMT"];
    for (const after of LATE) {
      rule(`Retry-After ${after} is past the deadline: fails at once`, async (cloud) => {
        const fault = { status: 429, headers: { "Retry-After": after } };
        cloud.edge.fail(AUTH, fault);
        const call = authenticate(staticKeys(cloud, { timeoutMs: 20_000 }));
        const { result: error, ms } = await timed(failure(call, "edge_unavailable"));
        assert.deepEqual([error.status, error.attempts, error.retryable], [429, 1, true]);
        assert.ok(ms < 3000, `${ms} ms`);
        assert.equal(cloud.edge.requests.length, 1);

        cloud.ecs.fail(/./, fault);
        const ecs = { env: cloud.env.ecs(), fetch: cloud.fetch, timeoutMs: 20_000 };
        const agent = await timed(failure(authenticate(ecs), "metadata_unavailable"));
        assert.ok(agent.ms < 3000, `${agent.ms} ms`);
        assert.equal(cloud.ecs.requests.length, 1);
      });
    }

    for (const path of [AUTH, CREDENTIALS]) {
      rule(`each attempt at ${path} is signed afresh, when it is sent`, async (cloud) => {
        const startMs = Date.now();
        let nowMs = startMs;
        const minuteLater = (): Answer => {
          nowMs += 60_000;
          return { status: 503, headers: { "Retry-After": "0" } };
        };
        cloud.edge.respond(path, minuteLater, 2);
        await new AembitAuth(staticKeys(cloud, { now: () => nowMs })).getCredentials(API_KEY);
        const requests = asked(cloud, path);
        const dates = [0, 60_000, 120_000].map((ms) => amzDate(startMs + ms));
        assert.deepEqual(requests.map(signedAt), dates);
        const signatures = requests.map((request) =>
          bodyOf(request).client.aws.stsGetCallerIdentity.headers.Authorization);
        assert.equal(new Set(signatures).size, 3);
      });
    }

    for (const minutes of [20, -20]) {
      rule(`a clock ${minutes} minutes off: signed once more with Aembit's time`, async (cloud) => {
        cloud.edge.clockOffsetMs = minutes * 60_000;
        const { accessToken } = await authenticate(staticKeys(cloud));
        assert.equal(accessToken, cloud.edge.issued[0]);
        assert.equal(cloud.edge.requests.length, 2);
      });
    }

    const SKEWS: readonly (readonly [status: number, seconds: number, requests: number])[] = [
      [401, 300, 2], [401, -300, 2], [403, 300, 2], [400, 300, 2],
      [401, 230, 1], [401, -230, 1], [429, 300, 1], [500, 300, 1],
    ];
    for (const [status, seconds, requests] of SKEWS) {
      rule(`${status} from a clock ${seconds} s ahead: ${requests} requests`, async (cloud) => {
        const nowMs = Math.floor(Date.now() / 1000) * 1000;
        const date = new Date(nowMs + seconds * 1000).toUTCString();
        cloud.edge.fail(AUTH, { status, headers: { Date: date } });
        const call = authenticate(staticKeys(cloud, { now: () => nowMs, maxAttempts: 1 }));
        const code = status === 429 || status >= 500 ? "edge_unavailable" : "edge_rejected";
        const error = await failure(call, code);
        assert.deepEqual([error.status, error.attempts], [status, requests]);
        const dates = [amzDate(nowMs), amzDate(nowMs + seconds * 1000)];
        assert.deepEqual(cloud.edge.requests.map(signedAt), dates.slice(0, requests));
      });
    }

    rule("one attempt at Aembit has 10 s, and the next one may succeed", async (cloud) => {
      cloud.edge.fail(AUTH, "drip", 1);
      const { ms } = await timed(authenticate(staticKeys(cloud)));
      assert.ok(ms >= 9_900 && ms < 14_000, `${ms} ms`);
      assert.equal(cloud.edge.requests.length, 2);
    });

    for (const fault of ["hang", "drip", "stall"] as const) {
      rule(`an exchange that never ends is a timeout: ${fault}`, async (cloud) => {
        cloud.edge.fail(AUTH, fault);
        const call = authenticate(staticKeys(cloud, { timeoutMs: 500 }));
        const { result: error, ms } = await timed(failure(call, "timeout"));
        assert.ok(ms >= 490 && ms < 3000, `${ms} ms`);
        assert.equal(error.retryable, true);
        assert.ok(error.message.includes(AUTH), error.message);
      });
    }

    const MIB = 1 << 20;
    interface Flood {
      readonly url: string;
      readonly close: () => void;
      readonly sent: () => number;
      readonly closed: () => Promise<void>;
    }
    async function startFlood(status: number, length?: number): Promise<Flood> {
      let sent = 0;
      const closing = Promise.withResolvers<void>();
      const server = createServer((incoming, response) => {
        incoming.resume();
        const headers = length === undefined ? {} : { "Content-Length": String(length) };
        response.writeHead(status, { "Content-Type": "application/json", ...headers });
        const pour = (): void => {
          const chunk = Buffer.alloc(64 << 10, " ");
          while (!response.destroyed && sent < 64 * MIB) {
            sent += chunk.byteLength;
            if (!response.write(chunk)) return void response.once("drain", pour);
          }
        };
        incoming.socket.once("close", closing.resolve);
        pour();
      });
      // Not waited for without end: with the connection open there would be none.
      const tooLate = async (): Promise<void> => {
        await pause(5000, undefined, { ref: false });
        assert.fail("the connection stays open");
      };
      const closed = (): Promise<void> => Promise.race([closing.promise, tooLate()]);
      return { ...(await listenOn(server)), sent: () => sent, closed };
    }

    for (const [status, length] of [[200], [200, 1 << 30], [400], [503], [503, 1 << 30]] as const) {
      const how = length === undefined ? "of unknown length" : `of ${length} bytes`;
      rule(`a body ${how} with ${status} is not read to its end, and asked for once`,
        async (cloud) => {
          const flood = await startFlood(status, length);
          try {
            const edge = authenticate({ env: cloud.env.staticKeys(), edgeUrl: flood.url });
            const { result: error, ms } = await timed(failure(edge, "invalid_edge_response"));
            assert.deepEqual([error.status, error.attempts], [status, 1]);
            assert.ok(ms < 5000, `${ms} ms`);
            await flood.closed();
            // A MiB for the reader; what is more lies in buffers between the two.
            assert.ok(flood.sent() < 16 * MIB, `${flood.sent()} bytes`);
          } finally {
            flood.close();
          }
        });
    }

    rule("a container endpoint without end is not read to its end either", async (cloud) => {
      const flood = await startFlood(200);
      try {
        const AWS_CONTAINER_CREDENTIALS_FULL_URI = `${flood.url}/creds`;
        const env = { ...cloud.env.eksPodIdentity(), AWS_CONTAINER_CREDENTIALS_FULL_URI };
        await failure(authenticate({ env }), "invalid_aws_credentials");
        await flood.closed();
        assert.ok(flood.sent() < 16 * MIB, `${flood.sent()} bytes`);
      } finally {
        flood.close();
      }
    });

    const padded = (length: number): string =>
      '{"accessToken":"t","expiresIn":5}'.padEnd(length, " ");
    rule("a body of exactly 1 MiB is read", async (cloud) => {
      cloud.edge.respond(AUTH, () => json(padded(MIB)));
      assert.equal((await authenticate(staticKeys(cloud))).accessToken, "t");
    });
    rule("a body of one byte more is refused", async (cloud) => {
      cloud.edge.respond(AUTH, () => json(padded(MIB + 1)));
      await failure(authenticate(staticKeys(cloud)), "invalid_edge_response");
      assert.equal(cloud.edge.requests.length, 1);
    });
    rule("a body that is small only on its way is refused", async (cloud) => {
      const body = gzipSync(padded(MIB + 1));
      cloud.edge.respond(AUTH, () => ({ headers: { "Content-Encoding": "gzip" }, body }));
      await failure(authenticate(staticKeys(cloud)), "invalid_edge_response");
      assert.equal(cloud.edge.requests.length, 1);
    });
  });

  /** Everything that comes out of a value when people and programs print it. */
  function printed(value: unknown): string[] {
    const forms = [
      String(value),
      inspect(value),
      inspect(value, { showHidden: true, depth: 20 }),
      inspect({ nested: [value] }, { showHidden: true, depth: 20, compact: false }),
      JSON.stringify({ nested: [value] }),
    ];
    if (typeof value !== "object" || value === null) return forms;
    const names = Object.getOwnPropertyNames(value);
    const own = names.map((name) => `${name}: ${inspect(Reflect.get(value, name), { depth: 20 })}`);
    forms.push(...own, JSON.stringify(value, names), JSON.stringify({ ...value }));
    if (value instanceof Error) {
      forms.push(value.message, value.stack ?? "", ...(value.cause ? printed(value.cause) : []));
    }
    return forms;
  }

  const percent = (secret: string): string => encodeURIComponent(secret);
  const percentAll = (secret: string): string =>
    [...Buffer.from(secret)].map((byte) => `%${byte.toString(16).padStart(2, "0")}`).join("");
  const jsonEscaped = (secret: string): string => JSON.stringify(secret).slice(1, -1);
  /** How servers write what they have been sent, when they write it back. */
  const SPELLINGS: readonly (readonly [name: string, spell: (secret: string) => string])[] = [
    ["as it is", (secret) => secret],
    ["percent-encoded", percent],
    ["percent-encoded in lower case", (secret) =>
      percent(secret).replace(/%../g, (escape) => escape.toLowerCase())],
    ["percent-encoded as a whole", percentAll],
    ["as a form", (secret) => new URLSearchParams({ a: secret }).toString().slice(2)],
    ["JSON-escaped", jsonEscaped],
    ["JSON-escaped, slashes too", (secret) => jsonEscaped(secret).replaceAll("/", "\\/")],
    ["JSON-escaped twice", (secret) => jsonEscaped(jsonEscaped(secret))],
    ["JSON-escaped by number", (secret) =>
      secret.replace(/[^\w]/g, (character) =>
        `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`)],
    ["XML-escaped", (secret) =>
      secret.replace(/[&<>"]/g, (character) =>
        ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[character] ?? "&quot;")],
    ["XML-escaped by number", (secret) =>
      secret.replace(/[^\w]/g, (character) => `&#${character.charCodeAt(0)};`)],
  ];

  /** A piece of this length gives a secret away as much as the whole of it. */
  const PIECE = 12;

  function pieces(whole: string): string[] {
    const count = Math.max(1, whole.length - PIECE + 1);
    return Array.from({ length: count }, (_, start) => whole.slice(start, start + PIECE));
  }

  /** No secret, in no spelling, not even a piece of one. */
  /** Escapes of punctuation say nothing; three characters of the secret in a row do. */
  function tells(piece: string, secret: string): boolean {
    const plain = piece.replace(/\\u[\da-f]{4}|&#\d+;|%[\da-f]{2}/gi, " ");
    const rows = Array.from(plain, (_, index) => plain.slice(index, index + 3));
    return rows.some((row) => /^\w{3}$/.test(row) && secret.includes(row));
  }

  function assertNoSecret(
    outputs: readonly string[],
    secrets: ReadonlySet<string>,
    spellings = SPELLINGS,
  ): void {
    const lines = new Set(outputs.join("\n").split("\n"));
    const shown = new Set([...lines].flatMap(pieces));
    for (const secret of secrets) {
      for (const [name, spell] of spellings) {
        const found = pieces(spell(secret)).find((piece) =>
          shown.has(piece) && tells(piece, secret));
        if (found === undefined) continue;
        const line = [...lines].find((candidate) => candidate.includes(found));
        assert.fail(`${found} of ${secret} (${name}) is shown: ${line}`);
      }
    }
  }

  /** All secrets that a cloud has given out or has been sent. */
  function secretsOf(cloud: Cloud): Set<string> {
    const secrets = new Set<string>(cloud.edge.issued);
    for (const { secretAccessKey, sessionToken } of Object.values(cloud.accounts)) {
      secrets.add(secretAccessKey).add(sessionToken ?? "");
    }
    for (const { data } of cloud.edge.policies) {
      for (const value of Object.values(data ?? {})) secrets.add(String(value));
    }
    for (const { headers, body } of cloud.requests()) {
      secrets.add(headers["x-aws-ec2-metadata-token"] ?? "");
      secrets.add((headers["authorization"] ?? "").replace(/^Bearer /, ""));
      secrets.add(/Signature=([0-9a-f]{64})/.exec(body)?.[1] ?? "");
      secrets.add(new URLSearchParams(body).get("WebIdentityToken") ?? "");
    }
    secrets.delete("");
    return secrets;
  }

  /** Shorter than what is cut for its length alone; the characters are those that AWS uses. */
  const fakeKeys = (accessKeyId: string, name: string): KeyPair => ({
    accessKeyId,
    secretAccessKey: `${name}/fake+SecretKey/00=`,
    sessionToken: `${name}+fake/SessionToken/more=`,
  });

  function plantKeys(cloud: Cloud): void {
    for (const name of ["ec2", "ecs", "pod", "webIdentity", "lambda"] as const) {
      cloud.accounts[name] = fakeKeys(cloud.accounts[name].accessKeyId, name);
    }
  }

  describe("every fault at every endpoint", { concurrency: 12 }, () => {
    const pool = cloudPool(12);
    before(pool.open);
    after(pool.close);

    /**
     * What can go wrong, in groups that are alike for a client: nobody answers, nobody answers in
     * time, an answer that is moved, refused, or put off.
     */
    type Group =
      | "dead" | "late" | "endless" | "empty" | "html" | "truncated" | "wrong-types" | "gzip"
      | "moved" | "400" | "401" | "403" | "404" | "busy" | "wait";
    interface Fault {
      readonly name: string;
      readonly group: Group;
      readonly make: (cloud: Cloud) => FaultKind;
    }
    const plain = (group: Group, kinds: readonly FaultKind[]): Fault[] =>
      kinds.map((kind) => {
        const name = typeof kind === "string" ? kind : String(kind.status);
        const asks = typeof kind === "object" && kind.headers ? " with Retry-After" : "";
        return { name: name + asks, group, make: () => kind };
      });
    const FAULTS: readonly Fault[] = [
      ...plain("dead", ["refused", "reset", "reset-after-headers"]),
      ...plain("late", ["hang", "drip", "stall"]),
      ...(["endless", "empty", "html", "truncated", "wrong-types", "gzip"] as const)
        .flatMap((kind) => plain(kind, [kind])),
      ...[301, 302, 303, 307, 308].map((status): Fault => ({
        name: String(status),
        group: "moved",
        make: ({ pod }) => ({ status, headers: { Location: `${pod.url}/v1/credentials` } }),
      })),
      ...(["400", "401", "403", "404"] as const)
        .flatMap((status) => plain(status, [{ status: Number(status) }])),
      ...plain("busy", [429, 500, 502, 503, 504].map((status) => ({ status }))),
      ...plain("wait", [{ status: 429, headers: { "Retry-After": "1" } }]),
    ];

    /** `dropped`: the exchange goes on without the metadata. */
    type End = AembitAuthErrorCode | "dropped";
    /**
     * - fine: what the client makes of it is a token
     * - final: asked once, and that is the error
     * - again: asked once more for another reason than a retry; if that fails too, the error
     * - retried: asked as often as is allowed; if none succeeds, the error
     */
    type Rule = readonly [
      groups: readonly Group[], kind: "fine" | "final" | "again" | "retried", end?: End,
    ];
    type Rules = readonly Rule[];
    interface Endpoint {
      readonly name: string;
      readonly service: ServiceName;
      readonly path: RegExp;
      readonly rules: Rules;
      readonly env: (cloud: Cloud) => Record<string, string>;
      readonly options?: AembitAuthOptions;
      /** Where attempts that come late are not what a call is to wait for. */
      readonly lateOptions?: AembitAuthOptions;
      /** Requests at most, where that is not the default of three. */
      readonly most?: Partial<Record<Group, number>>;
      readonly attemptMs: number;
    }

    const PASSING: readonly Group[] = ["dead", "late", "busy", "wait"];
    const UNUSABLE: readonly Group[] = ["endless", "empty", "html", "truncated", "wrong-types"];
    const REFUSED: readonly Group[] = ["400", "401", "403", "404"];

    /** A source of credentials that is configured. Of two rules for one group the later counts. */
    const SOURCE: Rules = [
      [PASSING, "retried", "metadata_unavailable"],
      [UNUSABLE, "final", "invalid_aws_credentials"],
      [["moved", ...REFUSED], "final", "metadata_unavailable"],
      [["gzip"], "fine"],
    ];
    /** IMDS is asked without a sign that it exists. */
    const IMDS_TOKEN: Rules = [
      ...SOURCE,
      [["dead", "late"], "retried", "no_aws_credentials"],
      [REFUSED, "final", "no_aws_credentials"],
      // Any one word may be a token; IMDS refuses a wrong one, and it is renewed once.
      [["truncated", "wrong-types"], "again", "metadata_unavailable"],
    ];
    const IMDS_CREDENTIALS: Rules = [...SOURCE, [["401"], "again", "metadata_unavailable"]];
    const IMDS_ROLE: Rules = [
      ...IMDS_CREDENTIALS,
      [["empty", "404"], "final", "no_aws_credentials"],
      // Half a name is a name, but not that of a role here.
      [["truncated"], "final", "metadata_unavailable"],
    ];
    const IMDS_REGION: Rules = [
      [PASSING, "retried", "no_region"],
      [UNUSABLE, "final", "invalid_config"],
      [["endless", "moved", ...REFUSED], "final", "no_region"],
      [["401"], "again", "no_region"],
      [["gzip"], "fine"],
    ];
    /** Documents are Aembit's to judge; a proxy's page is all that is kept from it. */
    const DOCUMENT: Rules = [
      ...SOURCE,
      [UNUSABLE, "final", "metadata_unavailable"],
      [["wrong-types"], "fine"],
    ];
    const IDENTITY: Rules = [...DOCUMENT, [["401"], "again", "metadata_unavailable"]];
    /** A container may ask before it is registered. */
    const TASK: Rules = [...DOCUMENT, [["404"], "retried", "metadata_unavailable"]];
    const OPTIONAL: Rules = TASK.map(([groups, kind]) => [groups, kind, "dropped"]);
    const STS: Rules = [...SOURCE, [REFUSED, "final", "invalid_aws_credentials"]];
    const EDGE_AUTH: Rules = [
      [PASSING, "retried", "edge_unavailable"],
      [[...UNUSABLE, "moved"], "final", "invalid_edge_response"],
      [REFUSED, "final", "edge_rejected"],
      // Shortened for the test: an attempt has 10 s, the call has less.
      [["late"], "final", "timeout"],
      [["gzip"], "fine"],
    ];
    const EDGE_CREDENTIALS: Rules = [
      ...EDGE_AUTH,
      [["401"], "again", "edge_rejected"],
      [["404"], "final", "no_matching_policy"],
    ];

    const imds = (name: string, path: RegExp, rules: Rules, more?: object): Endpoint => ({
      name: `IMDS ${name}`,
      service: "imds",
      path,
      rules,
      env: (cloud) => ({ ...cloud.env.ec2(), AWS_REGION: cloud.region }),
      attemptMs: 1000,
      ...more,
    });
    const document = (ecsMetadata: "auto" | "require", name: string, path: RegExp): Endpoint => ({
      name: `${name} metadata, ${ecsMetadata}`,
      service: "tmds",
      path,
      rules: ecsMetadata === "auto" ? OPTIONAL : TASK,
      env: ({ env }) => env.ecs(),
      options: { ecsMetadata },
      attemptMs: 1000,
    });
    const edge = (path: string, rules: Rules): Endpoint => ({
      name: `Aembit ${path}`,
      service: "edge",
      path: new RegExp(`^${path}$`),
      rules,
      env: ({ env }) => env.lambda(),
      lateOptions: { timeoutMs: 1000 },
      attemptMs: 1000,
    });
    const ENDPOINTS: readonly Endpoint[] = [
      // Off AWS nobody answers, and `auto` has three seconds to find that out.
      imds("token", /token$/, IMDS_TOKEN, { most: { late: 2, wait: 2 } }),
      imds("role", /security-credentials\/$/, IMDS_ROLE),
      imds("credentials", /security-credentials\/.+$/, IMDS_CREDENTIALS),
      imds("region", /region$/, IMDS_REGION, {
        env: ({ env, accounts: { ec2 } }: Cloud) => ({
          ...env.ec2(),
          AWS_ACCESS_KEY_ID: ec2.accessKeyId,
          AWS_SECRET_ACCESS_KEY: ec2.secretAccessKey,
          AWS_SESSION_TOKEN: ec2.sessionToken,
        }),
      }),
      imds("identity", /identity\/document$/, IDENTITY, { options: { instanceIdentity: true } }),
      {
        name: "ECS credentials",
        service: "ecs",
        path: /credentials/,
        rules: SOURCE,
        env: ({ env }) => env.ecs(),
        attemptMs: 1000,
      },
      document("auto", "container", /^\/v4\/[^/]+$/),
      document("require", "container", /^\/v4\/[^/]+$/),
      document("auto", "task", /\/task$/),
      document("require", "task", /\/task$/),
      {
        name: "STS",
        service: "sts",
        path: /./,
        rules: STS,
        env: ({ env }) => env.irsa(),
        lateOptions: { maxAttempts: 2 },
        most: { late: 2 },
        attemptMs: 5000,
      },
      edge(AUTH, EDGE_AUTH),
      edge(CREDENTIALS, EDGE_CREDENTIALS),
    ];

    /** From the rules alone: how a call must end, and after how many requests. */
    function expectation(endpoint: Endpoint, group: Group, lasting: boolean): [End | "", number] {
      const [, kind, end] = endpoint.rules.findLast(([groups]) => groups.includes(group)) ?? [];
      assert.ok(kind, `no rule for ${group}`);
      if (kind === "fine" || end === undefined) return ["", 1];
      if (kind === "final") return [end, 1];
      if (!lasting) return ["", 2];
      return [end, kind === "again" ? 2 : endpoint.most?.[group] ?? 3];
    }

    const SLACK_MS = 4000;

    async function runCell(cloud: Cloud, endpoint: Endpoint, fault: Fault, lasting: boolean) {
      const { service, path, options, lateOptions, attemptMs } = endpoint;
      const { group } = fault;
      const [end, requests] = expectation(endpoint, group, lasting);
      plantKeys(cloud);
      const logger = keepLines();
      const { fetch } = cloud;
      const late = group === "late" ? lateOptions : {};
      const settings = { env: endpoint.env(cloud), fetch, logger, ...options, ...late };
      cloud[service].fail(path, fault.make(cloud), lasting ? Infinity : 1);

      const call: Promise<unknown> = endpoint.rules === EDGE_CREDENTIALS
        ? new AembitAuth(settings).getCredentials(API_KEY)
        : authenticate(settings);
      const { result, ms } = await timed(
        end === "" || end === "dropped" ? call : failure(call, end));

      const seen = cloud[service].requests.filter((request) => path.test(request.path));
      assert.equal(seen.length, requests, `requests: ${inspect(result)}`);
      const waitMs = group === "late" ? requests * attemptMs : 600;
      const askedMs = group === "wait" ? (requests - 1) * 1000 : 0;
      assert.ok(ms < waitMs + askedMs + 600 + SLACK_MS, `took ${ms} ms`);
      assert.ok(ms >= askedMs - 10, `Retry-After was not obeyed: ${ms} ms`);
      assert.equal(cloud.pod.requests.length, 0, "a redirect was followed");
      if (service !== "imds") assert.equal(cloud.imds.requests.length, 0, "another identity");
      const dropped = end === "dropped" ? 1 : 0;
      assert.equal(logger.warnings.length, dropped, logger.warnings.join("\n"));
      if (service === "tmds" && !(result instanceof Error)) {
        const sent = "ecs" in bodyOf(asked(cloud, AUTH)[0]).client.aws;
        assert.equal(sent, !dropped, "ECS metadata is sent, or left out as a whole");
      }
      if (result instanceof AembitAuthError) {
        if (end === "edge_unavailable") assert.equal(result.attempts, requests);
        assert.doesNotMatch(result.message, /undefined|\[object|NaN/);
      }
      const outputs = [...printed(result), ...logger.lines];
      assertNoSecret(outputs, secretsOf(cloud), SPELLINGS.slice(0, 1));
    }

    for (const endpoint of ENDPOINTS) {
      for (const fault of FAULTS) {
        for (const lasting of [false, true]) {
          const [end, requests] = expectation(endpoint, fault.group, lasting);
          const times = lasting ? "for ever" : "once";
          const outcome = end === "dropped" ? "a token without it" : end || "a token";
          test(`${endpoint.name}: ${fault.name} ${times} is ${outcome}, requests: ${requests}`,
            pool.use((cloud) => runCell(cloud, endpoint, fault, lasting)));
        }
      }
    }
  });

  describe("secrets", { concurrency: 4 }, () => {
    const pool = cloudPool(4);
    const folder = mkdtempSync(join(tmpdir(), "secrets-"));
    before(pool.open);
    after(pool.close);
    after(() => rmSync(folder, { recursive: true, force: true }));

    // Tokens of agents may hold any printable character, and these are what encoders change.
    const AGENT_TOKEN = `Agent"Token\\with <bits>and&others/not+all=kinds%41inside'them`;
    const IDENTITY_TOKEN = `Web"Identity\\with <bits>and&others/not+all=kinds%41inside'them`;
    const IMDS_TOKEN = "Imds/fake+Token~with%41more=";
    const ACCESS_TOKEN = "Access\"fake\\Token/with<bits+and%41more=";
    const API_KEY_VALUE = "Api\"Key\\fake value <&>";

    type EnvOf = (cloud: Cloud) => Record<string, string>;
    const envOf = {
      imds: (cloud: Cloud) => ({ ...cloud.env.ec2(), AWS_REGION: cloud.region }),
      ecs: ({ env }: Cloud) =>
        ({ ...env.ecs(), AWS_CONTAINER_AUTHORIZATION_TOKEN: AGENT_TOKEN }),
      sts: ({ env }: Cloud) => {
        const file = join(folder, "identity-token");
        writeFileSync(file, IDENTITY_TOKEN);
        return { ...env.irsa(), AWS_WEB_IDENTITY_TOKEN_FILE: file };
      },
      keys: ({ env }: Cloud) => env.lambda(),
      noRegion: ({ env }: Cloud) => {
        const { AWS_REGION: _, AWS_DEFAULT_REGION: __, ...rest } = env.lambda();
        return rest;
      },
    };

    interface Scene {
      readonly name: string;
      readonly service: ServiceName;
      readonly path: RegExp;
      readonly env: EnvOf;
      readonly options?: AembitAuthOptions;
      readonly credential?: true;
    }
    const SCENES: readonly Scene[] = [
      { name: "IMDS role", service: "imds", path: /credentials\/$/, env: envOf.imds },
      { name: "IMDS credentials", service: "imds", path: /credentials\/.+$/, env: envOf.imds },
      { name: "IMDS region", service: "imds", path: /region$/, env: envOf.noRegion },
      {
        name: "IMDS identity",
        service: "imds",
        path: /identity/,
        env: envOf.keys,
        options: { instanceIdentity: true },
      },
      { name: "ECS credentials", service: "ecs", path: /credentials/, env: envOf.ecs },
      { name: "STS", service: "sts", path: /./, env: envOf.sts },
      { name: "Aembit auth", service: "edge", path: /auth$/, env: envOf.keys },
      {
        name: "Aembit credentials",
        service: "edge",
        path: /credentials$/,
        env: envOf.keys,
        credential: true,
      },
    ];

    /** What a server can quote: what it was sent, and Aembit also what it would be a pity to. */
    function quotable(cloud: Cloud, request: Recorded): string[] {
      const { headers, body, service } = request;
      const found = [
        headers["x-aws-ec2-metadata-token"],
        headers["authorization"]?.replace(/^Bearer /, ""),
        new URLSearchParams(body).get("WebIdentityToken") ?? undefined,
      ];
      if (service === "edge") {
        const { headers: signed } = bodyOf(request).client.aws.stsGetCallerIdentity;
        const { secretAccessKey } = cloud.accounts.lambda;
        found.push(signed["X-Amz-Security-Token"], signed.Authorization, secretAccessKey);
      }
      return found.filter((secret) => secret !== undefined);
    }

    interface Played {
      readonly outputs: string[];
      readonly thrown: unknown;
      readonly secrets: Set<string>;
    }

    /** Plants the secrets, lets the scene's service answer, and gives back all that came out. */
    async function play(
      cloud: Cloud,
      { service, path, env, options, credential }: Scene,
      { answer, ...more }: AembitAuthOptions & { answer?: (request: Recorded) => Answer },
    ): Promise<Played> {
      plantKeys(cloud);
      // Short tokens, which IMDS and Aembit know as little of as they know of this test.
      cloud.imds.respond("/latest/api/token", () => text(IMDS_TOKEN));
      cloud.imds.respond(/credentials\/$/, () => text(cloud.roleName));
      cloud.edge.respond(AUTH, () => json(documents.edgeToken(ACCESS_TOKEN, 3600)));
      if (answer) cloud[service].respond(path, answer);
      const logger = keepLines();
      const settings: AembitAuthOptions = {
        env: env(cloud), fetch: cloud.fetch, maxAttempts: 1, logger, ...options, ...more,
      };
      const client = new AembitAuth(settings);
      const call: Promise<unknown> = credential
        ? client.getCredentials(API_KEY)
        : authenticate({ ...settings, ecsMetadata: "omit" });
      let thrown: unknown;
      const result = await call.catch((error: unknown) => {
        thrown = error;
      });
      const outputs = [...printed(thrown ?? result), ...printed(client), ...logger.lines];
      const secrets = secretsOf(cloud).add(ACCESS_TOKEN).add(API_KEY_VALUE);
      cloud.reset();
      return { outputs, thrown, secrets };
    }

    for (const scene of SCENES) {
      for (const [name, spell] of SPELLINGS) {
        test(`${scene.name}: a message that quotes a secret, ${name}`, pool.use(async (cloud) => {
          // Each secret alone, so that none hides behind the length of another.
          for (let turn = 0, count = 1; turn < count; turn += 1) {
            const quote = (request: Recorded): string => {
              const secrets = quotable(cloud, request);
              count = secrets.length;
              return `rejected: ${spell(secrets[turn] ?? "")} is wrong`;
            };
            const asMessage = (request: Recorded): Answer => scene.service === "sts"
              // Not escaped once more, so a tag in the secret may break the document.
              ? { status: 400, headers: XML, body: `<Message>${quote(request)}</Message>` }
              : json(documents.edgeFailure(quote(request)), 400);
            const asText = (request: Recorded): Answer => text(quote(request), {}, 403);
            for (const answer of [asMessage, asText]) {
              const { outputs, thrown, secrets } = await play(cloud, scene, { answer });
              assert.ok(thrown instanceof AembitAuthError);
              const cut = answer === asMessage && scene.service === "sts";
              if (!cut) assert.match(thrown.message, /rejected/);
              assertNoSecret(outputs, secrets, [["as it is", (secret) => secret], [name, spell]]);
            }
          }
        }));
      }

      const PLACES: readonly (readonly [name: string, place: (quote: string) => Answer])[] = [
        ["a 500", (quote) => text(quote, {}, 500)],
        ["the Code of a success", (quote) => json(JSON.stringify({ Code: quote }))],
        ["the code of a failure", (quote) => json(JSON.stringify({ code: quote }), 400)],
        ["the Message", (quote) => json(JSON.stringify({ Code: "No", Message: quote }), 400)],
        ["a JSON text", (quote) => json(JSON.stringify(quote), 404)],
        ["broken JSON", (quote) => json(`{"message":"${quote}`, 400)],
        ["the text of a success", (quote) => text(quote)],
        ["a page", (quote) => text(`<html>${quote}</html>`, {}, 403)],
        ["XML", (quote) => ({
          status: 400, headers: XML, body: `<Code>${quote}</Code><Message>${quote}</Message>`,
        })],
        ["a Location", (quote) => ({ status: 302, headers: { Location: `/?${percent(quote)}` } })],
        ["Retry-After and Date", (quote) => ({
          status: 503, headers: { "Retry-After": percent(quote), Date: percent(quote) },
        })],
        ["the end of a long text", (quote) => text(`${"щ".repeat(190)} ${quote}`, {}, 400)],
      ];
      test(`${scene.name}: secrets in every place of an answer`, pool.use(async (cloud) => {
        for (const [, place] of PLACES) {
          const answer = (request: Recorded): Answer =>
            place(quotable(cloud, request).join(" and "));
          const { outputs, secrets } = await play(cloud, scene, { answer });
          assertNoSecret(outputs, secrets, SPELLINGS.slice(0, 2));
        }
      }));

      test(`${scene.name}: a server that sends the whole request back`, pool.use(async (cloud) => {
        cloud[scene.service].fail(scene.path, "echo");
        const { outputs, thrown, secrets } = await play(cloud, scene, {});
        assert.ok(thrown instanceof AembitAuthError);
        assertNoSecret(outputs, secrets);
      }));

      type Throw = (url: string, init: RequestInit) => unknown;
      const all = (init: RequestInit): string =>
        [...new Headers(init.headers)].flat().concat(String(init.body)).join(" ");
      const THROWS: readonly (readonly [name: string, create: Throw])[] = [
        ["Bun's, with the URL in path", (url) => {
          const message = "Unable to connect. Is the computer able to access the url?";
          return Object.assign(new Error(message), { path: url, code: "ConnectionRefused" });
        }],
        ["a URL in its words", (url) => new TypeError(`cannot fetch ${url}, sorry`)],
        ["a URL of its own", (url) => Object.assign(new Error("no"), { url, errno: 7 })],
        ["a header in its words", (_, init) =>
          new TypeError(`Headers.append: "${all(init)}" is an invalid header value.`)],
        ["secrets in code and name", (_, init) =>
          Object.assign(new Error("no"), { code: all(init), name: all(init) })],
        ["secrets in a cause", (_, init) => {
          const cause = Object.assign(new Error(all(init)), { code: "ECONNRESET" });
          return new TypeError("fetch failed", { cause });
        }],
        ["many errors", (_, init) => new AggregateError([new Error(all(init))], all(init))],
        ["a string", (url, init) => `${url} ${all(init)}`],
        ["an object", (url, init) => ({ message: all(init), url })],
        ["nothing", () => undefined],
      ];
      test(`${scene.name}: fetch throws errors that quote what it got`, pool.use(async (cloud) => {
        const place = new URL(cloud[scene.service].url).port;
        for (const [name, create] of THROWS) {
          let given: unknown;
          let quoted: string[] = [];
          const fetch: typeof globalThis.fetch = async (input, init = {}) => {
            const url = new URL(String(input));
            const isSts = scene.service === "sts" && url.hostname.startsWith("sts.");
            const isHere = (url.port === place || isSts) && scene.path.test(url.pathname);
            if (!isHere) return cloud.fetch(input, init);
            const path = `${url.pathname}${url.search}`;
            const headers = Object.fromEntries(new Headers(init.headers));
            const { service } = scene;
            quoted = quotable(cloud, {
              service, path, headers, method: "", body: String(init.body), at: 0,
            });
            given = create(`${url.href}?secret=Query/fake+Secret%41`, init);
            throw given;
          };
          const { outputs, thrown, secrets } = await play(cloud, scene, { fetch });
          assert.ok(thrown instanceof AembitAuthError, name);
          assert.doesNotMatch(thrown.message, /failed: (undefined|\[object)/, name);
          assert.ok(quoted.length > 0);
          for (const secret of quoted) {
            secrets.add(secret.replace(/^.*Signature=/, ""));
          }
          assertNoSecret(outputs, secrets.add("Query/fake+Secret%41"), SPELLINGS.slice(0, 2));
          for (let inner: unknown = thrown; inner instanceof Error; inner = inner.cause) {
            assert.notEqual(inner, given, "cause is not the runtime's own error");
            for (const key of ["path", "url", "errno"]) assert.ok(!(key in inner), key);
          }
          if (name === "secrets in a cause" && scene.service !== "imds") {
            assert.match(thrown.message, /ECONNRESET/);
          }
        }
      }));
    }

    test("an error in the middle of a body quotes nothing either", pool.use(async (cloud) => {
      const { secretAccessKey } = cloud.accounts.lambda;
      const fetch: typeof globalThis.fetch = async () => new Response(new ReadableStream({
        start: (controller) => controller.error(new Error(`broken at ${secretAccessKey}`)),
      }));
      const scene = SCENES.find(({ name }) => name === "Aembit auth");
      assert.ok(scene);
      const { outputs, thrown, secrets } = await play(cloud, scene, { fetch });
      assert.ok(thrown instanceof AembitAuthError && thrown.code === "edge_unavailable");
      assertNoSecret(outputs, secrets);
    }));

    const SHORT = "An/answer's+own=Secret";
    const own = { message: `no ${SHORT}`, Message: `no ${SHORT}` };
    const OWN_SECRETS: readonly (readonly [name: string, document: object])[] = [
      ["Aembit auth", { success: false, accessToken: SHORT, expiresIn: 5, ...own }],
      ["Aembit credentials", { success: false, data: { apiKey: SHORT }, ...own }],
      ["ECS credentials", { Code: "Failed", SecretAccessKey: SHORT, ...own }],
      ["ECS credentials", { Code: "Failed", Token: SHORT, ...own }],
      ["IMDS credentials", { Code: "Failed", SecretAccessKey: SHORT, AccessKeyId: "A", ...own }],
    ];
    for (const [name, document] of OWN_SECRETS) {
      test(`${name}: an answer that quotes its own secret, ${Object.keys(document)[1]}`,
        pool.use(async (cloud) => {
          const scene = SCENES.find((candidate) => candidate.name === name);
          assert.ok(scene);
          const answer = (): Answer => json(JSON.stringify(document));
          const { outputs, thrown } = await play(cloud, scene, { answer });
          assert.ok(thrown instanceof AembitAuthError);
          assertNoSecret(outputs, new Set([SHORT]));
        }));
    }

    test("the query of a container endpoint is not shown", pool.use(async (cloud) => {
      const url = `${cloud.ecs.url}/v2/credentials/x?key=Query/fake+Secret%41`;
      for (const fault of ["refused", "hang", "html", "echo"] as const) {
        cloud.ecs.fail(/./, fault);
        const env = { ...cloud.env.eksPodIdentity(), AWS_CONTAINER_CREDENTIALS_FULL_URI: url };
        const logger = keepLines();
        const call = authenticate({ env, fetch: cloud.fetch, maxAttempts: 1, logger });
        const error: unknown = await call.catch((reason: unknown) => reason);
        assert.ok(error instanceof AembitAuthError);
        const secrets = new Set(fault === "echo" ? [] : ["Query/fake+Secret%41"]);
        assertNoSecret([...printed(error), ...logger.lines], secrets);
        assert.ok(error.message.includes(`${cloud.ecs.url}/v2/credentials/x`));
        cloud.reset();
      }
    }));

    for (const scene of SCENES) {
      test(`${scene.name}: success shows no secret, and its values can be read`,
        pool.use(async (cloud) => {
          plantKeys(cloud);
          cloud.edge.policies = [{ host: API_KEY.host, data: { apiKey: API_KEY_VALUE } }];
          const own = scene.service === "sts" ? cloud.env.irsa() : scene.env(cloud);
          const logger = keepLines();
          const client = new AembitAuth({
            env: own, fetch: cloud.fetch, logger, ...scene.options,
          });
          const token = await client.getToken();
          const credential = await client.getCredentials(API_KEY);
          assert.equal(token.accessToken, cloud.edge.issued[0]);
          assert.equal(credential.data["apiKey"], API_KEY_VALUE);
          assert.ok(logger.lines.length > 0);
          const outputs = [token, credential, client].flatMap(printed).concat(logger.lines);
          const secrets = secretsOf(cloud);
          assert.ok(secrets.has(API_KEY_VALUE) && secrets.size > 8, String(secrets.size));
          assertNoSecret(outputs, secrets);
        }));
    }

    const GET = [
      "credentials", "--server-workload-host", API_KEY.host,
      "--server-workload-port", "443", "--credential-type", "ApiKey",
    ];
    const SEND_BACK: readonly (readonly [
      name: string, args: readonly string[], service: ServiceName, path: RegExp, env: EnvOf,
    ])[] = [
      ["Aembit sends the request back", ["token"], "edge", /auth/, envOf.keys],
      ["the same with --json", ["token", "--json"], "edge", /auth/, envOf.keys],
      ["Aembit refuses a credential", GET, "edge", /credentials/, envOf.keys],
      ["the agent sends the request back", ["token"], "ecs", /./, envOf.ecs],
      ["IMDS sends the request back", ["token"], "imds", /credentials/, envOf.imds],
      ["the doctor is told it all", ["doctor"], "edge", /auth/, envOf.keys],
      ["the doctor hears it from the agent", ["doctor"], "ecs", /./, envOf.ecs],
    ];
    for (const [name, args, service, path, envFor] of SEND_BACK) {
      test(`the command shows no secret: ${name}`, pool.use(async (cloud) => {
        plantKeys(cloud);
        cloud[service].fail(path, "echo");
        const env = envFor(cloud);
        const { status, stdout, stderr } = await runCommand([...args, "--verbose"], { env });
        assert.notEqual(status, 0);
        if (args[0] !== "doctor") assert.equal(stdout, "");
        assert.match(stdout + stderr, /\b400\b/);
        assertNoSecret([stdout, stderr], secretsOf(cloud));
      }));
    }

    test("the command prints the token, and no other secret, anywhere", pool.use(async (cloud) => {
      plantKeys(cloud);
      const { stdout, stderr } = await runCommand(["--verbose"], { env: envOf.ecs(cloud) });
      assert.equal(stdout, `${cloud.edge.issued[0]}\n`);
      assert.ok(stderr.length > 0);
      assertNoSecret([stderr], secretsOf(cloud));
    }));
  });

  describe("proxies", { concurrency: 2 }, () => {
    interface Proxy {
      readonly url: string;
      readonly close: () => void;
      /** `host:port` of all that was to pass through. */
      readonly seen: string[];
    }

    /** Passes everything on, tunnels included, and keeps account of it. */
    async function startProxy(): Promise<Proxy> {
      const seen: string[] = [];
      const server = createServer((incoming, response) => {
        const target = new URL(incoming.url ?? "");
        seen.push(target.host);
        const { method, headers } = incoming;
        const onward = requestHttp(target, { method, headers }, (answer) => {
          response.writeHead(answer.statusCode ?? 502, answer.headers);
          answer.pipe(response);
        });
        onward.on("error", () => response.destroy());
        incoming.pipe(onward);
      });
      server.on("connect", (incoming, socket) => {
        seen.push(incoming.url ?? "");
        const { hostname, port } = new URL(`http://${incoming.url}`);
        const onward = connect(Number(port), hostname, () => {
          socket.write("HTTP/1.1 200 Connection established\r\n\r\n");
          onward.pipe(socket).pipe(onward);
        });
        for (const end of [onward, socket]) end.on("error", () => socket.destroy());
      });
      return { ...(await listenOn(server)), seen };
    }

    const pool = cloudPool(2);
    const supported = process.allowedNodeEnvironmentFlags.has("--use-env-proxy");
    const skip = supported ? false : "this runtime uses no proxy by itself";
    before(pool.open);
    after(pool.close);

    /** Metadata is on 127.0.0.1, and Aembit on another name of it: NO_PROXY can tell them apart. */
    function environment(cloud: Cloud, env: Record<string, string>): Record<string, string> {
      const AEMBIT_EDGE_BASE_URL = cloud.edge.url.replace("127.0.0.1", "localhost");
      return { ...env, AEMBIT_EDGE_BASE_URL, AWS_REGION: cloud.region };
    }

    function inProxy(
      name: string,
      work: (cloud: Cloud, proxy: Proxy) => Promise<void>,
    ): void {
      test(name, { skip }, pool.use(async (cloud) => {
        const proxy = await startProxy();
        try {
          await work(cloud, proxy);
        } finally {
          proxy.close();
        }
      }));
    }

    const hostOf = (url: string): string => new URL(url).host;
    const metadata = (cloud: Cloud): number =>
      cloud.requests().filter(({ service }) => service !== "edge").length;

    interface Way {
      readonly name: string;
      readonly args?: readonly string[];
      readonly env?: Record<string, string>;
      /** The name of the variable that holds the proxy. */
      readonly variable?: string;
    }
    const WAYS: readonly Way[] = [
      { name: "NODE_USE_ENV_PROXY=1", env: { NODE_USE_ENV_PROXY: "1" } },
      { name: "--use-env-proxy", args: ["--use-env-proxy"] },
      { name: "--use_env_proxy", args: ["--use_env_proxy"] },
      { name: "NODE_OPTIONS", env: { NODE_OPTIONS: "--use-env-proxy" } },
      { name: "http_proxy", env: { NODE_USE_ENV_PROXY: "1" }, variable: "http_proxy" },
    ];
    const run = (
      { args = [], env = {}, variable = "HTTP_PROXY" }: Way,
      proxy: Proxy,
      more: Record<string, string>,
    ): Promise<Ended> => runProgram(process.execPath, [...args, FILE, "token", "--timeout", "10"], {
      env: { ...more, ...env, [variable]: proxy.url },
    });

    for (const way of WAYS) {
      for (const place of ["ec2", "ecs"] as const) {
        inProxy(`${way.name} on ${place}: metadata is not asked through the proxy`,
          async (cloud, proxy) => {
            const env = environment(cloud, cloud.env[place]());
            const refused = await run(way, proxy, env);
            assert.equal(refused.status, 2, refused.stderr);
            assert.match(refused.stderr, /invalid_config.*NO_PROXY=\S*127\.0\.0\.1/);
            assert.equal(refused.stdout, "");
            assert.deepEqual([proxy.seen, cloud.requests()], [[], []]);

            const allowed = await run(way, proxy, { ...env, NO_PROXY: "127.0.0.1" });
            assert.equal(allowed.stdout, `${cloud.edge.issued[0]}\n`, allowed.stderr);
            const localhost = `localhost:${new URL(cloud.edge.url).port}`;
            assert.deepEqual([...new Set(proxy.seen)], [localhost], "Aembit goes as it is told");
            assert.ok(metadata(cloud) > 0);
          });
      }
    }

    // What is exempt is the runtime's decision: whatever we make of the list, it must hold there.
    const LISTS: readonly (readonly [list: string, exempt?: boolean])[] = [
      ["", false], ["*", true], ["127.0.0.1", true], ["example.com, 127.0.0.1", true],
      ["example.com 127.0.0.1"], ["127.0.0.2", false], ["27.0.0.1", false],
      ["127.0.0.1:1", false], ["127.0.0.0/8"], ["127.*"], ["0.0.1"], [".0.0.1"], ["*.0.0.1"],
      ["*0.0.1"], ["127.0.0.1,"], [",127.0.0.1"], ["127.0.0.1-127.0.0.9"], ["LOCALHOST"], ["127"],
    ];
    for (const [list, exempt] of LISTS) {
      const end = exempt === undefined ? "no way through it" : exempt ? "direct" : "refused";
      inProxy(`NO_PROXY=${JSON.stringify(list)}: ${end}`, async (cloud, proxy) => {
        const env = { ...environment(cloud, cloud.env.ec2()), NO_PROXY: list };
        const { status, stderr } = await run(WAYS[0] ?? { name: "" }, proxy, env);
        const viaProxy = proxy.seen.filter((host) => host === hostOf(cloud.imds.url));
        assert.deepEqual(viaProxy, [], "metadata went through the proxy");
        if (exempt !== undefined) assert.equal(status, exempt ? 0 : 2, stderr);
        if (status !== 0) assert.match(stderr, /invalid_config.*NO_PROXY/);
        assert.equal(metadata(cloud) > 0, status === 0);
      });
    }

    inProxy("keys of the environment need no metadata: the proxy is for Aembit alone",
      async (cloud, proxy) => {
        const env = environment(cloud, cloud.env.staticKeys());
        const { stdout, stderr } = await run(WAYS[0] ?? { name: "" }, proxy, env);
        assert.equal(stdout, `${cloud.edge.issued[0]}\n`, stderr);
        assert.ok(proxy.seen.length > 0);
      });

    inProxy("a proxy that the runtime does not use is no obstacle", async (cloud, proxy) => {
      const env = environment(cloud, cloud.env.ec2());
      const { stdout, stderr } = await run({ name: "none" }, proxy, env);
      assert.equal(stdout, `${cloud.edge.issued[0]}\n`, stderr);
      assert.deepEqual(proxy.seen, []);
    });

    /** Runs a call in a program, as `env` and `fetch` cannot be given on the command line. */
    const runScript = (
      cloud: Cloud,
      options: string,
      env: Record<string, string>,
    ): Promise<Ended> => {
      const given = JSON.stringify(environment(cloud, cloud.env.ec2()));
      const script = `
        import { authenticate } from ${JSON.stringify(pathToFileURL(FILE).href)};
        const given = ${given};
        try {
          console.log((await authenticate(${options})).accessToken);
        } catch (error) {
          console.log(error.code);
        }`;
      const args = ["--input-type=module", "--eval", script];
      return runProgram(process.execPath, args, { env: { ...env, NODE_USE_ENV_PROXY: "1" } });
    };

    inProxy("the env option hides no proxy of the process", async (cloud, proxy) => {
      const ended = await runScript(cloud, "{ env: given }", { HTTP_PROXY: proxy.url });
      assert.equal(ended.stdout, "invalid_config\n", ended.stderr);
      const exempt = "{ env: { ...given, NO_PROXY: '*' } }";
      const other = await runScript(cloud, exempt, { HTTP_PROXY: proxy.url });
      assert.equal(other.stdout, "invalid_config\n", other.stderr);
      assert.deepEqual([proxy.seen, cloud.requests()], [[], []]);
    });

    inProxy("a proxy of the env option alone is not used, and not judged", async (cloud, proxy) => {
      const options = `{ env: { ...given, HTTP_PROXY: "${proxy.url}" } }`;
      const ended = await runScript(cloud, options, {});
      assert.equal(ended.stdout, `${cloud.edge.issued[0]}\n`, ended.stderr);
      assert.deepEqual(proxy.seen, []);
    });

    inProxy("with a fetch of the caller's own, proxies are the caller's", async (cloud, proxy) => {
      const options = "{ env: given, fetch: (url, init) => fetch(url, init) }";
      const ended = await runScript(cloud, options, { HTTP_PROXY: proxy.url });
      assert.equal(ended.stdout, `${cloud.edge.issued[0]}\n`, ended.stderr);
      assert.ok(proxy.seen.includes(hostOf(cloud.imds.url)));
    });
  });
});

describe("a client that is left running", () => {
  const AUTH = "/edge/v1/auth";
  const CREDENTIALS = "/edge/v1/credentials";
  const SECOND = 1000;
  const MINUTE = 60 * SECOND;
  const HOUR = 60 * MINUTE;
  const API_KEY: AembitCredentialsRequest = {
    host: "api.example.com",
    port: 443,
    credentialType: "ApiKey",
  };

  let cloud: Cloud;
  /** The clients' clock. It stands still unless a test moves it, so that borders are exact. */
  let nowMs: number;

  before(async () => {
    cloud = await startCloud();
  });
  after(() => cloud.close());
  beforeEach(() => {
    cloud.reset();
    nowMs = Date.now();
  });

  const now = (): number => nowMs;

  /** Time passes for everybody: for the clients, for Aembit and for AWS. */
  function advance(ms: number): void {
    nowMs += ms;
    for (const service of [cloud.edge, cloud.imds, cloud.ecs, cloud.pod, cloud.sts]) {
      service.clockOffsetMs += ms;
    }
  }

  /** One attempt for each request: failures come at once, and are counted easily. */
  const options = (more: AembitAuthOptions = {}): AembitAuthOptions => ({
    env: cloud.env.staticKeys(),
    fetch: cloud.fetch,
    now,
    maxAttempts: 1,
    ...more,
  });
  const newClient = (more?: AembitAuthOptions): AembitAuth => new AembitAuth(options(more));

  const exchanges = (): number => cloud.fetched.filter((url) => url.endsWith(AUTH)).length;
  const asked = (path: string): Recorded[] =>
    cloud.edge.requests.filter((request) => request.path === path);
  const paths = (): string[] => cloud.requests().map(({ method, path }) => `${method} ${path}`);

  interface Body {
    readonly client: AuthRequest["client"];
    readonly [name: string]: unknown;
  }

  function bodyOf(request: Recorded | undefined): Body {
    assert.ok(request, "there is no such request");
    const body: Body = JSON.parse(request.body);
    return body;
  }
  const evidenceOf = (request: Recorded | undefined) => bodyOf(request).client.aws;

  /** Whose key signed a request. */
  const signerOf = (request: Recorded | undefined): string | undefined =>
    /Credential=([^/]+)/.exec(evidenceOf(request).stsGetCallerIdentity.headers.Authorization)?.[1];

  /** Waits for something that happens behind the caller's back. */
  async function eventually(holds: () => boolean | Promise<boolean>): Promise<void> {
    const limitMs = performance.now() + 5 * SECOND;
    while (!(await holds())) {
      assert.ok(performance.now() < limitMs, `never came true: ${holds}`);
      await pause(2);
    }
  }

  /**
   * With keys from the environment a request is made without any input or output before it, so
   * what has not been asked after a few turns of the event loop is not going to be.
   */
  async function settle(): Promise<void> {
    for (let turns = 0; turns < 5; turns += 1) await turn();
  }

  /** Holds Aembit's answers back until they are released. */
  function holdTokens(times?: number, expiresIn = 3600): () => void {
    const gate = Promise.withResolvers<void>();
    let count = 0;
    const answer = async () => {
      count += 1;
      const token = `held-back-${count}`;
      await gate.promise;
      return json(documents.edgeToken(token, expiresIn));
    };
    cloud.edge.respond(AUTH, answer, times);
    return gate.resolve;
  }

  /** Tells when an answer has been read, which no server can know. */
  function listenFor(status: number): {
    logger: AembitLogger;
    heard: (times: number) => Promise<void>;
  } {
    let count = 0;
    const debug = (line: string): void => {
      if (line.includes(String(status))) count += 1;
    };
    const heard = async (times: number): Promise<void> => {
      await eventually(() => count >= times);
      await settle();
    };
    return { logger: { debug, warn: () => {} }, heard };
  }

  async function rejection(work: Promise<unknown>): Promise<unknown> {
    try {
      await work;
    } catch (reason) {
      return reason;
    }
    return assert.fail("expected a rejection, but there was none");
  }

  const listeners = (signal: AbortSignal): number => getEventListeners(signal, "abort").length;

  /** All clients of a table that stands for "whatever is called". */
  type Entry = readonly [name: string, run: (signal: AbortSignal) => Promise<unknown>];
  const ENTRIES: readonly Entry[] = [
    ["authenticate", (signal) => authenticate(options({ signal }))],
    ["createAuthRequest", (signal) => createAuthRequest(options({ signal }))],
    ["loadAwsCredentials", (signal) => loadAwsCredentials(options({ signal }))],
    ["resolveRegion", (signal) => resolveRegion(options({ signal }))],
    ["readEcsMetadata", (signal) => readEcsMetadata(options({ signal, env: cloud.env.ecs() }))],
    ["getToken, signal of the call", (signal) => newClient().getToken({ signal })],
    ["getToken, signal of the client", (signal) => newClient({ signal }).getToken()],
    ["getCredentials, signal of the call", (signal) =>
      newClient().getCredentials(API_KEY, { signal })],
    ["getCredentials, signal of the client", (signal) =>
      newClient({ signal }).getCredentials(API_KEY)],
  ];

  describe("keeps its token", () => {
    test("a warm call makes no request and gives the same token", async () => {
      const client = newClient();
      const first = await client.getToken();
      advance(30 * MINUTE);
      for (let call = 0; call < 20; call += 1) assert.equal(await client.getToken(), first);
      await settle();
      assert.equal(exchanges(), 1);
    });

    test("authenticate keeps nothing: each call is an exchange", async () => {
      const first = await authenticate(options());
      const second = await authenticate(options());
      assert.notEqual(first.accessToken, second.accessToken);
      assert.equal(exchanges(), 2);
    });

    const BORDERS: readonly (readonly [name: string, lifeS: number, borderMs: number])[] = [
      ["an hour: a minute", 3600, MINUTE],
      ["just over ten minutes: a minute", 601, MINUTE],
      ["ten minutes: a minute, which is a tenth", 600, MINUTE],
      ["100 s: a tenth", 100, 10 * SECOND],
      ["one second: a tenth", 1, 100],
    ];
    for (const [name, lifeS, borderMs] of BORDERS) {
      test(`a token is served while more remains than the border, for ${name}`, async () => {
        cloud.edge.expiresIn = lifeS;
        const served = newClient();
        const first = await served.getToken();
        const replaced = newClient();
        const other = await replaced.getToken();
        advance(lifeS * SECOND - borderMs - 1);
        assert.equal(await served.getToken(), first);
        advance(1);
        const next = await replaced.getToken();
        assert.notEqual(next.accessToken, other.accessToken);
        assert.equal(next.accessToken, cloud.edge.issued.at(-1));
        await eventually(async () => (await served.getToken()) !== first);
      });
    }

    test("10,000 concurrent calls share one exchange and its token", async () => {
      const client = newClient();
      const calls = Array.from({ length: 10_000 }, () => client.getToken());
      const tokens = new Set((await Promise.all(calls)).map(({ accessToken }) => accessToken));
      assert.equal(tokens.size, 1);
      assert.equal(exchanges(), 1);
    });

    test("a failure reaches all who wait for it, and is not kept", async () => {
      const client = newClient();
      cloud.edge.fail(AUTH, { status: 503 }, 1);
      await Promise.all(Array.from({ length: 50 }, () =>
        failure(client.getToken(), "edge_unavailable")));
      assert.equal(exchanges(), 1);
      await client.getToken();
      assert.equal(exchanges(), 2);
    });

    test("a failure of the configuration is not kept either", async () => {
      const env = cloud.env.staticKeys();
      const { AEMBIT_CLIENT_ID = "" } = env;
      env["AEMBIT_CLIENT_ID"] = "";
      const client = newClient({ env });
      await failure(client.getToken(), "invalid_config");
      env["AEMBIT_CLIENT_ID"] = AEMBIT_CLIENT_ID;
      await client.getToken();
      assert.equal(exchanges(), 1);
    });

    test("two clients share nothing", async () => {
      const [one, other] = await Promise.all([newClient().getToken(), newClient().getToken()]);
      assert.notEqual(one.accessToken, other.accessToken);
    });

    test("changing the date of a token changes nothing for the client", async () => {
      const client = newClient();
      (await client.getToken()).expiresAt.setTime(0);
      await client.getToken();
      await settle();
      assert.equal(exchanges(), 1);
    });
  });

  describe("forceRefresh", () => {
    test("replaces a live token", async () => {
      const client = newClient();
      const first = await client.getToken();
      const second = await client.getToken({ forceRefresh: true });
      assert.notEqual(first.accessToken, second.accessToken);
      assert.equal(await client.getToken(), second);
      assert.equal(exchanges(), 2);
    });

    test("joins a forced exchange under way, and so does a call that is not forced", async () => {
      const client = newClient();
      const release = holdTokens();
      const calls = [
        client.getToken({ forceRefresh: true }),
        client.getToken({ forceRefresh: true }),
        client.getToken({ forceRefresh: false }),
      ];
      await eventually(() => asked(AUTH).length === 1);
      calls.push(client.getToken({ forceRefresh: true }), client.getToken());
      release();
      assert.equal(new Set(await Promise.all(calls)).size, 1);
      assert.equal(exchanges(), 1);
    });

    test("does not join an exchange that nobody forced", async () => {
      const client = newClient();
      const release = holdTokens();
      const plain = client.getToken();
      await eventually(() => asked(AUTH).length === 1);
      const forced = client.getToken({ forceRefresh: true });
      await eventually(() => asked(AUTH).length === 2);
      release();
      assert.notEqual((await plain).accessToken, (await forced).accessToken);
      assert.equal(exchanges(), 2);
    });

    test("that fails is reported, and the live token stays", async () => {
      const client = newClient();
      const first = await client.getToken();
      cloud.edge.fail(AUTH, { status: 503 }, 1);
      await failure(client.getToken({ forceRefresh: true }), "edge_unavailable");
      assert.equal(await client.getToken(), first);
    });
  });

  describe("renews behind its callers", () => {
    /** A token of 1000 s, so that a second is a tenth of a per cent of its life. */
    const LIFE_S = 1000;

    /** A client whose token has 150 s left: within the last fifth, whatever its share. */
    async function clientInWindow(more?: AembitAuthOptions): Promise<AembitAuth> {
      cloud.edge.expiresIn = LIFE_S;
      const client = newClient(more);
      await client.getToken();
      advance((LIFE_S - 150) * SECOND);
      return client;
    }

    test("a fleet renews between 30 % and 20 %, spread out, each at its own share", async () => {
      cloud.edge.expiresIn = LIFE_S;
      const calls: number[] = [];
      const fleet = Array.from({ length: 60 }, (_, index) =>
        newClient({
          fetch: (input, init) => {
            calls[index] = (calls[index] ?? 0) + 1;
            return cloud.fetch(input, init);
          },
        }));
      /** Who starts a renewal at this point of the token's life. */
      const renewAt = async (second: number): Promise<string> => {
        const tokens = await Promise.all(
          fleet.map((client) => client.getToken({ forceRefresh: true })),
        );
        calls.fill(0);
        advance(second * SECOND);
        const served = await Promise.all(fleet.map((client) => client.getToken()));
        assert.deepEqual(served, tokens, "the answer comes from the cache");
        await settle();
        const renewed = calls.map((count) => `${count}`).join("");
        await Promise.all(fleet.map((client, index) =>
          eventually(async () => calls[index] === 0 || (await client.getToken()) !== tokens[index])
        ));
        return renewed;
      };
      assert.equal(await renewAt(0.699 * LIFE_S), "0".repeat(60), "nobody before 30 %");
      const halfWay = await renewAt(0.75 * LIFE_S);
      const early = halfWay.replaceAll("0", "").length;
      assert.ok(early > 8 && early < 52, `${early} of 60 renewed at 25 %`);
      assert.equal(await renewAt(0.75 * LIFE_S), halfWay, "the share is drawn once");
      assert.equal(await renewAt(0.801 * LIFE_S), "1".repeat(60), "everybody from 20 %");
    });

    test("while Aembit hangs, callers are served at once, and one renewal waits", async () => {
      const client = await clientInWindow();
      const release = holdTokens();
      const token = await client.getToken();
      for (let call = 0; call < 20; call += 1) assert.equal(await client.getToken(), token);
      await settle();
      assert.equal(exchanges(), 2);
      release();
      await eventually(async () => (await client.getToken()).accessToken === "held-back-1");
      await settle();
      assert.equal(exchanges(), 2);
    });

    test("a renewal under way serves those for whom the old token has ended", async () => {
      const client = await clientInWindow();
      const release = holdTokens();
      await client.getToken();
      advance(100 * SECOND);
      const late = client.getToken();
      await settle();
      release();
      assert.equal((await late).accessToken, "held-back-1");
      assert.equal(exchanges(), 2);
    });

    test("a failed renewal is silent and tried again by later calls, once in 30 s", async () => {
      const { logger, heard } = listenFor(503);
      const client = await clientInWindow({ logger });
      cloud.edge.fail(AUTH, { status: 503 });
      const token = await client.getToken();
      await heard(1);
      assert.equal(exchanges(), 2);

      advance(29 * SECOND);
      for (let call = 0; call < 10; call += 1) assert.equal(await client.getToken(), token);
      await settle();
      assert.equal(exchanges(), 2, "not within 30 s");

      advance(2 * SECOND);
      assert.equal(await client.getToken(), token);
      await heard(2);
      assert.equal(exchanges(), 3, "by the first call after 30 s");

      // 150 s less 31 s were left: 60 s are the end of it, whether 30 s have passed or not.
      advance(59 * SECOND);
      await failure(client.getToken(), "edge_unavailable");
      await failure(client.getToken(), "edge_unavailable");
      assert.equal(exchanges(), 5, "without a usable token every call tries");
      cloud.edge.reset();
      assert.notEqual((await client.getToken()).accessToken, token.accessToken);
    });

    test("a clock that is set back does not put a failed renewal off for hours", async () => {
      cloud.edge.expiresIn = 10 * HOUR / SECOND;
      const { logger, heard } = listenFor(503);
      const client = newClient({ logger });
      await client.getToken();
      advance(9.5 * HOUR);
      cloud.edge.fail(AUTH, { status: 503 }, 1);
      await client.getToken();
      await heard(1);
      advance(-HOUR);
      await client.getToken();
      advance(MINUTE);
      await client.getToken();
      await settle();
      assert.equal(exchanges(), 3);
    });

    test("the caller that set a renewal off may leave without ending it", async () => {
      const client = await clientInWindow();
      const release = holdTokens();
      const caller = new AbortController();
      await client.getToken({ signal: caller.signal });
      await eventually(() => asked(AUTH).length === 2);
      caller.abort();
      release();
      await eventually(async () => (await client.getToken()).accessToken === "held-back-1");
      assert.equal(exchanges(), 2);
    });

    test("a caller that waited for a renewal may leave without ending it", async () => {
      const client = await clientInWindow();
      const release = holdTokens();
      await client.getToken();
      advance(100 * SECOND);
      const caller = new AbortController();
      const waiting = rejection(client.getToken({ signal: caller.signal }));
      await eventually(() => asked(AUTH).length === 2);
      caller.abort("gone");
      assert.equal(await waiting, "gone");
      release();
      await eventually(async () => (await client.getToken()).accessToken === "held-back-1");
      assert.equal(exchanges(), 2);
    });

    test("a renewal ends with the client's own signal, and leaves no listener on it", async () => {
      const { signal, abort } = abortable();
      const client = await clientInWindow({ signal });
      cloud.edge.fail(AUTH, "hang");
      await client.getToken();
      await eventually(() => asked(AUTH).length === 2);
      assert.equal(listeners(signal), 1);
      abort("closing down");
      await settle();
      assert.equal(listeners(signal), 0);
      assert.equal(await rejection(client.getToken()), "closing down");
    });
  });

  function abortable(): { signal: AbortSignal; abort: (reason?: unknown) => void } {
    const controller = new AbortController();
    return { signal: controller.signal, abort: (reason) => controller.abort(reason) };
  }

  describe("clocks", () => {
    const JUMPS: readonly (readonly [name: string, ms: number, requests: number])[] = [
      ["an hour forward: the token has ended", HOUR, 2],
      ["half a day of sleep: the token has ended", 12 * HOUR, 2],
      ["an hour back: a token from the future is not trusted", -HOUR, 2],
      ["ten seconds back: as before", -10 * SECOND, 1],
    ];
    for (const [name, ms, requests] of JUMPS) {
      test(`the clock jumps ${name}`, async () => {
        const client = newClient();
        const first = await client.getToken();
        advance(ms);
        const second = await client.getToken();
        assert.equal(exchanges(), requests);
        assert.equal(second !== first, requests === 2);
        assert.equal(second.expiresAt.getTime() - nowMs - (requests === 2 ? 0 : -ms), HOUR);
        assert.equal(await client.getToken(), second);
      });
    }

    test("after sleep AWS credentials, IMDS token and token are all made anew", async () => {
      const client = newClient({ env: cloud.env.ec2() });
      await client.getToken();
      const cold = paths();
      advance(24 * HOUR);
      await client.getToken();
      const woken = paths().slice(cold.length);
      assert.ok(woken.includes("PUT /latest/api/token"), woken.join());
      assert.ok(woken.some((path) => path.endsWith("/security-credentials/app-role")));
      assert.equal(asked(AUTH).length, 2);
    });

    test("only the local clock is set back: signing again with Aembit's time helps", async () => {
      const client = newClient();
      const first = await client.getToken();
      nowMs -= HOUR;
      const second = await client.getToken();
      assert.notEqual(first.accessToken, second.accessToken);
      assert.equal(exchanges(), 3);
      assert.equal(await client.getToken(), second);
    });

    const SKEWS: readonly (readonly [name: string, ms: number])[] = [
      ["behind", HOUR],
      ["ahead", -HOUR],
      ["a day behind", 24 * HOUR],
    ];
    for (const [name, ms] of SKEWS) {
      test(`a clock that is ${name} is corrected once, for all later calls`, async () => {
        cloud.edge.clockOffsetMs = ms;
        const warnings: string[] = [];
        const logger = { debug: () => {}, warn: (line: string) => void warnings.push(line) };
        const client = newClient({ logger });
        const token = await client.getToken();
        assert.equal(exchanges(), 2, "one refusal, one signature more");
        assert.equal(await client.getToken(), token, "by its own clock, the token is fresh");
        await client.getToken({ forceRefresh: true });
        assert.equal(exchanges(), 3);
        await client.getCredentials(API_KEY);
        assert.equal(asked(CREDENTIALS).length, 1);
        assert.equal(warnings.length, 1);
        assert.match(warnings[0] ?? "", /clock/);
      });
    }

    test("a correction follows the clock: when it is put right, all is right", async () => {
      cloud.edge.clockOffsetMs = HOUR;
      const client = newClient();
      await client.getToken();
      nowMs += HOUR;
      await client.getToken({ forceRefresh: true });
      assert.equal(exchanges(), 4, "the correction itself is corrected");
      await client.getToken({ forceRefresh: true });
      assert.equal(exchanges(), 5);
    });

    const REFUSALS: readonly (readonly [name: string, status: number])[] = [
      ["400", 400],
      ["401", 401],
      ["403", 403],
    ];
    for (const [name, status] of REFUSALS) {
      test(`a ${name} after signing again names the clock, and keeps no correction`, async () => {
        cloud.edge.clockOffsetMs = HOUR + MINUTE;
        cloud.edge.fail(AUTH, { status });
        const client = newClient({ maxAttempts: 3 });
        for (const requests of [2, 4]) {
          const error = await failure(client.getToken(), "edge_rejected");
          assert.equal(error.status, status);
          assert.equal(error.attempts, 2);
          assert.match(error.message, /clock.*36\d\d s|36\d\d s.*clock/);
          assert.equal(asked(AUTH).length, requests);
        }
        const dates = asked(AUTH).map((request) =>
          evidenceOf(request).stsGetCallerIdentity.headers["X-Amz-Date"]);
        assert.equal(dates[0], dates[2], "the second call begins with its own time again");
        assert.notEqual(dates[0], dates[1]);
      });
    }

    test("a correction is kept when the second answer was a 5xx", async () => {
      cloud.edge.clockOffsetMs = HOUR;
      cloud.edge.fail(AUTH, { status: 401 }, 1);
      cloud.edge.fail(AUTH, { status: 503 }, 1);
      const client = newClient();
      await failure(client.getToken(), "edge_unavailable");
      assert.equal(exchanges(), 2);
      await client.getToken();
      assert.equal(exchanges(), 3);
    });

    test("a 4xx from a clock within 4 minutes is a plain rejection", async () => {
      cloud.edge.fail(AUTH, { status: 401 });
      for (const offset of [0, 3.9 * MINUTE, -3.9 * MINUTE]) {
        cloud.edge.clockOffsetMs = offset;
        const error = await failure(newClient().getToken(), "edge_rejected");
        assert.doesNotMatch(error.message, /clock/);
      }
      assert.equal(exchanges(), 3);
    });

    test("a 4xx without a Date header is a plain rejection", async () => {
      cloud.edge.fail(AUTH, { status: 401, headers: { Date: "once upon a time" } });
      await failure(newClient().getToken(), "edge_rejected");
      assert.equal(exchanges(), 1);
    });

    for (const [name, value] of [["NaN", NaN], ["beyond all dates", 9e15]] as const) {
      test(`a clock that says ${name} is invalid_config before any packet`, async () => {
        await failure(newClient({ now: () => value }).getToken(), "invalid_config");
        assert.equal(cloud.fetched.length, 0);
      });
    }
  });

  describe("expiresIn", () => {
    const VALID: readonly (readonly [name: string, seconds: string, endsMs: number])[] = [
      ["fractional", "1.5", 1500],
      ["tiny", "0.001", 1],
      ["next to nothing", "1e-300", 0],
      ["a century", "3153600000", 3_153_600_000_000],
      ["huge", "1e300", Infinity],
      ["the largest number", "1.7976931348623157e308", Infinity],
    ];
    for (const [name, seconds, lifeMs] of VALID) {
      test(`${name} gives a valid date, and expiresIn as it came`, async () => {
        const body = `{"accessToken":"fake-token","tokenType":"Bearer","expiresIn":${seconds}}`;
        cloud.edge.respond(AUTH, () => json(body));
        const { expiresIn, expiresAt } = await newClient().getToken();
        assert.equal(expiresIn, Number(seconds));
        assert.equal(expiresAt.getTime(), Math.min(nowMs + lifeMs, 8.64e15));
        assert.doesNotThrow(() => expiresAt.toISOString());
      });
    }

    for (const seconds of ["3153600000", "1e14", "1e300", "1e307"]) {
      test(`a token of ${seconds} s is served without renewal`, async () => {
        const body = `{"accessToken":"fake-token","expiresIn":${seconds}}`;
        cloud.edge.respond(AUTH, () => json(body));
        const client = newClient();
        await client.getToken();
        for (let call = 0; call < 3; call += 1) {
          await client.getToken();
          await settle();
        }
        assert.equal(exchanges(), 1);
      });
    }

    test("an absent tokenType is Bearer, and unknown fields are ignored", async () => {
      cloud.edge.respond(AUTH, () => json('{"accessToken":"t","expiresIn":5,"scope":"x"}'));
      const { tokenType, accessToken, expiresIn } = await newClient().getToken();
      assert.deepEqual({ tokenType, accessToken, expiresIn },
        { tokenType: "Bearer", accessToken: "t", expiresIn: 5 });
    });

    const INVALID: readonly (readonly [name: string, body: string])[] = [
      ["expiresIn 0", '{"accessToken":"t","expiresIn":0}'],
      ["expiresIn -1", '{"accessToken":"t","expiresIn":-1}'],
      ["expiresIn in quotes", '{"accessToken":"t","expiresIn":"3600"}'],
      ["expiresIn null", '{"accessToken":"t","expiresIn":null}'],
      ["expiresIn true", '{"accessToken":"t","expiresIn":true}'],
      ["expiresIn NaN, which is no JSON", '{"accessToken":"t","expiresIn":NaN}'],
      ["expiresIn 1e999, which is read as Infinity", '{"accessToken":"t","expiresIn":1e999}'],
      ["no expiresIn", '{"accessToken":"t"}'],
      ["no accessToken", '{"expiresIn":3600}'],
      ["an empty accessToken", '{"accessToken":"","expiresIn":3600}'],
      ["a number for accessToken", '{"accessToken":7,"expiresIn":3600}'],
      ["a line break in accessToken", '{"accessToken":"a\\nb","expiresIn":3600}'],
      ["a space in accessToken", '{"accessToken":"a b","expiresIn":3600}'],
      ["a letter that is not ASCII", '{"accessToken":"é","expiresIn":3600}'],
      ["an array", '["t",3600]'],
      ["null", "null"],
    ];
    for (const [name, body] of INVALID) {
      test(`${name} is an invalid_edge_response, and is not tried again`, async () => {
        cloud.edge.respond(AUTH, () => json(body));
        await failure(newClient({ maxAttempts: 3 }).getToken(), "invalid_edge_response");
        assert.equal(exchanges(), 1);
      });
    }

  });

  describe("aborts", () => {
    const REASONS: readonly (readonly [name: string, reason: unknown])[] = [
      ["an Error", new Error("my own reason")],
      ["a string", "a reason"],
      ["null", null],
      ["zero", 0],
      ["a frozen object", Object.freeze({ why: "closing" })],
      ["nothing, which is an AbortError", undefined],
    ];

    for (const [name, run] of ENTRIES) {
      test(`${name}: an aborted signal rejects with its reason before any packet`, async () => {
        for (const [what, reason] of REASONS) {
          const { signal, abort } = abortable();
          abort(reason);
          assert.equal(await rejection(run(signal)), signal.reason, what);
          assert.equal(listeners(signal), 0, what);
        }
        assert.equal(cloud.fetched.length, 0);
      });

      test(`${name}: no listener is left on the signal after success`, async () => {
        const { signal } = abortable();
        for (let call = 0; call < 3; call += 1) await run(signal);
        await settle();
        assert.equal(listeners(signal), 0);
      });
    }

    const NETWORK = ENTRIES.filter(([name]) => /authenticate|getToken|getCred|Ecs/.test(name));
    for (const [name, run] of NETWORK) {
      test(`${name}: an abort under way rejects with its reason and leaves nothing`, async () => {
        cloud.edge.fail(/./, "hang");
        cloud.tmds.fail(/./, "hang");
        for (const [what, reason] of REASONS) {
          const { signal, abort } = abortable();
          const count = cloud.requests().length;
          const work = rejection(run(signal));
          await eventually(() => cloud.requests().length > count);
          abort(reason);
          assert.equal(await work, signal.reason, what);
          assert.equal(listeners(signal), 0, what);
        }
      });

      test(`${name}: no listener is left on the signal after a failure`, async () => {
        cloud.edge.fail(/./, { status: 400 });
        cloud.tmds.fail(/./, { status: 400 });
        const { signal } = abortable();
        await rejection(run(signal));
        assert.equal(listeners(signal), 0);
      });
    }

    test("a call aborted between /auth and /credentials rejects with the reason", async () => {
      cloud.edge.fail(CREDENTIALS, "hang");
      const { signal, abort } = abortable();
      const reason = new Error("no longer wanted");
      const work = rejection(newClient().getCredentials(API_KEY, { signal }));
      await eventually(() => asked(CREDENTIALS).length === 1);
      abort(reason);
      assert.equal(await work, reason);
      assert.equal(listeners(signal), 0);
    });

    test("an abort ends the pause before the next attempt", async () => {
      cloud.edge.fail(AUTH, { status: 503, headers: { "Retry-After": "20" } });
      const { signal, abort } = abortable();
      const { logger, heard } = listenFor(503);
      const work = rejection(newClient({ maxAttempts: 3, logger }).getToken({ signal }));
      await heard(1);
      abort("no time");
      assert.equal(await work, "no time");
    });

    test("an abort ends the wait for a credentials function", async () => {
      const { signal, abort } = abortable();
      const called = Promise.withResolvers<void>();
      const credentials = (): Promise<AwsCredentials> => {
        called.resolve();
        return new Promise(() => {});
      };
      const work = rejection(newClient({ credentials }).getToken({ signal }));
      await called.promise;
      abort("enough");
      assert.equal(await work, "enough");
    });

    test("an aborted signal rejects even where a token is at hand", async () => {
      const client = newClient();
      await client.getToken();
      const signal = AbortSignal.abort("too late");
      assert.equal(await rejection(client.getToken({ signal })), "too late");
      assert.equal(await rejection(client.getCredentials(API_KEY, { signal })), "too late");
      assert.equal(exchanges(), 1);
    });

    test("a client whose signal has been aborted gives out nothing more", async () => {
      const { signal, abort } = abortable();
      const client = newClient({ signal });
      await client.getToken();
      abort("closed");
      assert.equal(await rejection(client.getToken()), "closed");
      assert.equal(await rejection(client.getCredentials(API_KEY)), "closed");
      assert.equal(exchanges(), 1);
    });

    test("one caller's abort touches nobody else, and frees its signal at once", async () => {
      const client = newClient();
      const release = holdTokens();
      const leaving = abortable();
      const staying = abortable();
      const gone = rejection(client.getToken({ signal: leaving.signal }));
      const others = [client.getToken(), client.getToken({ signal: staying.signal })];
      await eventually(() => asked(AUTH).length === 1);
      leaving.abort("bye");
      assert.equal(await gone, "bye");
      assert.equal(listeners(leaving.signal), 0, "while the others still wait");
      release();
      for (const other of others) assert.equal((await other).accessToken, "held-back-1");
      await settle();
      assert.equal(listeners(staying.signal), 0);
      assert.equal(exchanges(), 1);
    });

    test("a signal with an exchange of its own behind it may be shared by many calls", async () => {
      const client = newClient();
      const { signal } = abortable();
      await Promise.all(Array.from({ length: 200 }, () => client.getToken({ signal })));
      await Promise.all(
        Array.from({ length: 20 }, () => client.getCredentials(API_KEY, { signal })),
      );
      await settle();
      assert.equal(listeners(signal), 0);
    });

    for (const forceRefresh of [false, true]) {
      const kind = forceRefresh ? "a forced" : "an";
      test(`when the last waiting caller leaves, ${kind} exchange is abandoned`, async () => {
        const arrived = Promise.withResolvers<void>();
        const closed = Promise.withResolvers<void>();
        let open = 0;
        const server = createServer((_request, response) => {
          open += 1;
          arrived.resolve();
          response.on("close", () => {
            open -= 1;
            closed.resolve();
          });
        });
        await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
        try {
          const address = server.address();
          assert.ok(typeof address === "object" && address);
          const env = cloud.env.staticKeys();
          env["AEMBIT_EDGE_BASE_URL"] = `http://127.0.0.1:${address.port}`;
          const client = newClient({ env });
          const callers = [abortable(), abortable()];
          const gone = callers.map(({ signal }) =>
            rejection(client.getToken({ signal, forceRefresh })));
          await arrived.promise;
          callers[0]?.abort("first");
          assert.equal(await gone[0], "first");
          assert.equal(open, 1, "the second caller still waits");
          callers[1]?.abort("second");
          assert.equal(await gone[1], "second");
          await closed.promise;
          // What was abandoned is not joined: the next call is served by an exchange of its own.
          env["AEMBIT_EDGE_BASE_URL"] = cloud.edge.url;
          await client.getToken({ forceRefresh });
          assert.equal(asked(AUTH).length, 1);
        } finally {
          server.closeAllConnections();
          server.close();
        }
      });
    }

    test("a call that comes as the last one leaves is not refused with its reason", async () => {
      const client = newClient();
      const release = holdTokens();
      const { signal, abort } = abortable();
      const gone = rejection(client.getToken({ signal }));
      await eventually(() => asked(AUTH).length === 1);
      const before = abortable();
      signal.addEventListener("abort", () => joined.push(client.getToken()), { once: true });
      const joined: Promise<AembitToken>[] = [client.getToken({ signal: before.signal })];
      before.abort("first");
      abort("left");
      joined.push(client.getToken());
      assert.equal(await gone, "left");
      assert.equal(await rejection(joined[0] ?? assert.fail()), "first");
      joined.push(client.getToken());
      release();
      for (const next of joined.slice(1)) assert.match((await next).accessToken, /^held-back-/);
    });

    test("an abort while AWS is read does not spoil the reading for others", async () => {
      const client = newClient({ env: cloud.env.ecs() });
      const gate = Promise.withResolvers<void>();
      const document = documents.ecsCredentials(cloud.accounts.ecs, nowMs + HOUR);
      cloud.ecs.respond(/./, async () => {
        await gate.promise;
        return json(document);
      });
      const { signal, abort } = abortable();
      const gone = rejection(client.getToken({ signal, forceRefresh: true }));
      const stays = client.getToken();
      const alone = client.getToken({ forceRefresh: true });
      await eventually(() => cloud.ecs.requests.length === 1);
      abort("gone");
      assert.equal(await gone, "gone");
      gate.resolve();
      await Promise.all([stays, alone]);
      assert.equal(cloud.ecs.requests.length, 1);
    });
  });

  describe("deadlines", { concurrency: true }, () => {
    let slow: Cloud;
    before(async () => {
      slow = await startCloud();
      // Every way to keep a caller waiting, on paths of their own.
      slow.edge.fail(/./, "hang");
    });
    after(() => slow.close());

    const waiting = (more: AembitAuthOptions = {}): AembitAuthOptions => ({
      env: slow.env.staticKeys(),
      fetch: slow.fetch,
      timeoutMs: 200,
      ...more,
    });

    async function timesOut(work: Promise<unknown>, step: RegExp): Promise<void> {
      const startedMs = performance.now();
      const error = await failure(work, "timeout");
      const tookMs = performance.now() - startedMs;
      assert.ok(tookMs > 150 && tookMs < 2000, `${tookMs} ms`);
      assert.equal(error.retryable, true);
      assert.match(error.message, /200 ms|0\.2 s/);
      assert.match(error.message, step);
    }

    /** A token in hand, and a server that answers nothing but /auth. */
    const never = (): Promise<never> => new Promise(() => {});
    const onlyAuth: typeof fetch = (input) =>
      String(input).endsWith(AUTH)
        ? Promise.resolve(new Response(documents.edgeToken("fake-token", 3600)))
        : never();
    const start = (body: ReadableStreamDefaultController): void => body.enqueue(Buffer.from("{"));
    const stalled: typeof fetch = () =>
      Promise.resolve(new Response(new ReadableStream({ start })));
    const always503: typeof fetch = () => Promise.resolve(new Response("", { status: 503 }));

    test("authenticate says that it was waiting for /auth", () =>
      timesOut(authenticate(waiting()), /\/edge\/v1\/auth/));
    test("getToken says that it was waiting for /auth", () =>
      timesOut(new AembitAuth(waiting()).getToken(), /\/edge\/v1\/auth/));
    test("each of the callers of one exchange is told", async () => {
      const client = new AembitAuth(waiting());
      const step = /\/edge\/v1\/auth/;
      await Promise.all([timesOut(client.getToken(), step), timesOut(client.getToken(), step)]);
    });
    test("getCredentials says that it was waiting for /auth", () =>
      timesOut(new AembitAuth(waiting()).getCredentials(API_KEY), /\/edge\/v1\/auth/));
    test("getCredentials says that it was waiting for /credentials", () =>
      timesOut(
        new AembitAuth(waiting({ fetch: onlyAuth })).getCredentials(API_KEY),
        /\/edge\/v1\/credentials/,
      ));
    test("a fetch that ignores its signal does not hold the call", () =>
      timesOut(authenticate(waiting({ fetch: never })), /\/edge\/v1\/auth/));
    test("a body that never ends does not hold the call, nor does an ignored signal", () =>
      timesOut(authenticate(waiting({ fetch: stalled })), /\/edge\/v1\/auth/));
    test("a hanging metadata service is named", () =>
      timesOut(
        loadAwsCredentials(waiting({
          env: { AWS_CONTAINER_CREDENTIALS_FULL_URI: `${slow.edge.url}/keys` },
        })),
        /\/keys/,
      ));
    const hangingKeys = (): Record<string, string> => ({
      ...slow.env.ec2(),
      AWS_CONTAINER_CREDENTIALS_FULL_URI: `${slow.edge.url}/keys`,
    });
    test("the step is what is waited for, not what was answered meanwhile", () =>
      timesOut(authenticate(waiting({ env: hangingKeys() })), /\/keys/));
    test("a hanging IMDS is named by the request for its token", () => {
      const env = { ...slow.env.ec2(), AWS_EC2_METADATA_SERVICE_ENDPOINT: slow.edge.url };
      return timesOut(authenticate(waiting({ env })), /\/latest\/api\/token/);
    });
    test("each of two exchanges that wait for one reading says so", async () => {
      const env = { ...hangingKeys(), AWS_REGION: slow.region };
      const client = new AembitAuth(waiting({ env }));
      await Promise.all([
        timesOut(client.getToken(), /credentials/),
        timesOut(client.getToken({ forceRefresh: true }), /credentials/),
      ]);
    });
    test("an attempt ends at its own deadline, though fetch ignores its signal", async () => {
      let calls = 0;
      const document = documents.podCredentials(slow.accounts.pod, Date.now() + HOUR);
      const once: typeof fetch = () => {
        calls += 1;
        return calls === 1 ? never() : Promise.resolve(new Response(document));
      };
      const env = slow.env.eksPodIdentity();
      const { accessKeyId } = await loadAwsCredentials({ env, fetch: once, timeoutMs: 9000 });
      assert.equal(accessKeyId, slow.accounts.pod.accessKeyId);
      assert.equal(calls, 2);
    });
    test("a credentials function that never answers is named", () =>
      timesOut(authenticate(waiting({ credentials: never })), /credentials/));
    test("attempts without end stop at the deadline", () =>
      timesOut(authenticate(waiting({ fetch: always503, maxAttempts: 100 })), /503/));
    test("a request to wait past the deadline fails at once", async () => {
      const headers = { "Retry-After": "60" };
      const busy: typeof fetch = () =>
        Promise.resolve(new Response("", { status: 429, headers }));
      const startedMs = performance.now();
      const error = await failure(authenticate(waiting({ fetch: busy })), "edge_unavailable");
      assert.equal(error.status, 429);
      assert.equal(error.attempts, 1);
      assert.equal(error.retryable, true);
      assert.ok(performance.now() - startedMs < 190);
    });
    test("after a time-out the client starts again", async () => {
      let calls = 0;
      const once: typeof fetch = (input, init) => {
        calls += 1;
        return calls === 1 ? never() : onlyAuth(input, init);
      };
      const client = new AembitAuth(waiting({ fetch: once }));
      await failure(client.getToken(), "timeout");
      assert.equal((await client.getToken()).accessToken, "fake-token");
    });
  });

  describe("AWS credentials", () => {
    const LIFE_MS = 6 * HOUR;
    const REREAD_MS = LIFE_MS - 5 * MINUTE;
    /** The documents give times without milliseconds, so an end lies up to a second earlier. */
    const ROUNDING_MS = SECOND;
    const roles = "/latest/meta-data/iam/security-credentials";

    async function refresh(client: AembitAuth): Promise<string[]> {
      const count = paths().length;
      await client.getToken({ forceRefresh: true });
      return paths().slice(count).sort();
    }

    const KEPT: readonly (readonly [
      name: string,
      options: () => AembitAuthOptions,
      reread: readonly string[],
    ])[] = [
      [
        "of an instance, with region and instance identity",
        () => ({ env: cloud.env.ec2(), instanceIdentity: true }),
        [
          "GET /latest/dynamic/instance-identity/document",
          "GET /latest/dynamic/instance-identity/signature",
          `GET ${roles}/app-role`,
          "GET /latest/meta-data/placement/region",
        ],
      ],
      [
        "of a task, with its metadata",
        () => ({ env: cloud.env.ecs() }),
        ["GET /v2/credentials/", "GET /v4/", "GET /v4/ task"],
      ],
      ["of a pod", () => ({ env: cloud.env.eksPodIdentity() }), ["GET /v1/credentials"]],
    ];
    for (const [name, given, reread] of KEPT) {
      test(`${name} are kept until 5 minutes before their end, then read with it all`, async () => {
        const short = (path: string): string =>
          path.replace(/(v2\/credentials\/).*/, "$1").replace(/(v4\/)[^/]*(?:\/(task))?$/, "$1 $2")
            .trim();
        const client = newClient(given());
        await client.getToken();
        const keyId = signerOf(asked(AUTH).at(-1));
        assert.deepEqual(await refresh(client), [`POST ${AUTH}`], "one HTTP request");
        advance(REREAD_MS - ROUNDING_MS - MINUTE);
        assert.deepEqual(await refresh(client), [`POST ${AUTH}`], "more than 5 minutes left");
        assert.equal(signerOf(asked(AUTH).at(-1)), keyId);

        for (const account of ["ec2", "ecs", "pod"] as const) {
          cloud.accounts[account] = documents.fakeKeyPair("ASIANEWFAKE00EXAMPLE", "new");
        }
        cloud.imds.respond("/latest/meta-data/placement/region", () => text("us-west-2"));
        advance(MINUTE + ROUNDING_MS + SECOND);
        const again = (await refresh(client)).map(short);
        assert.deepEqual(again, [...reread, `POST ${AUTH}`].sort(), "5 minutes left");
        assert.equal(signerOf(asked(AUTH).at(-1)), "ASIANEWFAKE00EXAMPLE");
        const { region } = evidenceOf(asked(AUTH).at(-1)).stsGetCallerIdentity;
        assert.equal(region, name.includes("instance") ? "us-west-2" : cloud.region);
        assert.deepEqual(await refresh(client), [`POST ${AUTH}`], "and kept again");
      });
    }

    test("from STS are kept likewise", async () => {
      const client = newClient({ env: cloud.env.irsa() });
      await client.getToken();
      advance(54 * MINUTE);
      assert.deepEqual(await refresh(client), [`POST ${AUTH}`]);
      advance(MINUTE);
      assert.deepEqual(await refresh(client), ["POST /", `POST ${AUTH}`]);
    });

    test("that live under 5 minutes are read for each exchange", async () => {
      cloud.credentialLifetimeMs = 4 * MINUTE;
      const client = newClient({ env: cloud.env.eksPodIdentity() });
      await client.getToken();
      assert.deepEqual(await refresh(client), ["GET /v1/credentials", `POST ${AUTH}`]);
    });

    test("of the environment are read again for each exchange", async () => {
      const env = cloud.env.lambda();
      const client = newClient({ env });
      await client.getToken();
      const { accessKeyId, secretAccessKey } = cloud.accounts.static;
      env["AWS_ACCESS_KEY_ID"] = accessKeyId;
      env["AWS_SECRET_ACCESS_KEY"] = secretAccessKey;
      delete env["AWS_SESSION_TOKEN"];
      assert.deepEqual(await refresh(client), [`POST ${AUTH}`], "one HTTP request");
      assert.equal(signerOf(asked(AUTH)[0]), cloud.accounts.lambda.accessKeyId);
      assert.equal(signerOf(asked(AUTH)[1]), accessKeyId);
      const { headers } = evidenceOf(asked(AUTH)[1]).stsGetCallerIdentity;
      assert.ok(!("X-Amz-Security-Token" in headers));
    });

    const FUNCTIONS: readonly (readonly [string, number | undefined, number])[] = [
      ["without an expiration is called for each exchange", undefined, 3],
      ["with an expiration is called when that is near", HOUR, 1],
      ["whose credentials end in 5 minutes is called for each exchange", 5 * MINUTE, 3],
    ];
    for (const [name, lifeMs, count] of FUNCTIONS) {
      test(`a credentials function ${name}`, async () => {
        let calls = 0;
        const credentials = (): AwsCredentials => {
          calls += 1;
          const ends = lifeMs === undefined ? {} : { expiration: new Date(nowMs + lifeMs) };
          return { ...cloud.accounts.static, ...ends };
        };
        const client = newClient({ credentials });
        await client.getToken();
        await refresh(client);
        await refresh(client);
        assert.equal(calls, count);
      });
    }

    test("that are still good are used when they cannot be read again", async () => {
      const warnings: string[] = [];
      const logger = { debug: () => {}, warn: (line: string) => void warnings.push(line) };
      const client = newClient({ env: cloud.env.ecs(), logger });
      await client.getToken();
      advance(REREAD_MS + SECOND);
      cloud.ecs.fail(/./, documents.ecsInvalidId);
      cloud.tmds.fail(/./, { status: 400 });
      await client.getToken({ forceRefresh: true });
      assert.equal(signerOf(asked(AUTH).at(-1)), cloud.accounts.ecs.accessKeyId);
      assert.ok(evidenceOf(asked(AUTH).at(-1)).ecs, "with the metadata that belongs to them");
      assert.ok(warnings.length > 0);
      advance(5 * MINUTE);
      await failure(client.getToken({ forceRefresh: true }), "metadata_unavailable");
      cloud.ecs.reset();
      await client.getToken({ forceRefresh: true });
    });

    test("a re-reading that hangs does not cost a caller more than its deadline", async () => {
      const client = newClient({ env: cloud.env.eksPodIdentity(), timeoutMs: 5000 });
      await client.getToken();
      advance(REREAD_MS + SECOND);
      cloud.pod.fail(/./, "hang");
      await client.getToken({ forceRefresh: true });
      assert.equal(asked(AUTH).length, 2);
    });

    test("are read once for all who ask at the same time", async () => {
      const client = newClient({ env: cloud.env.ec2() });
      await Promise.all([
        client.getToken(),
        client.getToken({ forceRefresh: true }),
        ...Array.from({ length: 20 }, () => client.getCredentials(API_KEY)),
      ]);
      const reads = paths().filter((path) => path.includes("/latest/")).sort();
      assert.deepEqual(reads, [
        `GET ${roles}/`,
        `GET ${roles}/app-role`,
        "GET /latest/meta-data/placement/region",
        "PUT /latest/api/token",
      ]);
      assert.equal(asked(CREDENTIALS).length, 20);
    });

    test("a replaced instance profile is noticed by a 404 while the old one serves", async () => {
      const client = newClient({ env: cloud.env.ec2() });
      await client.getToken();
      advance(REREAD_MS + SECOND);
      cloud.roleName = "another-role";
      const region = "GET /latest/meta-data/placement/region";
      assert.deepEqual(await refresh(client),
        [`GET ${roles}/app-role`, region, `POST ${AUTH}`].sort());
      assert.deepEqual(await refresh(client),
        [`GET ${roles}/`, `GET ${roles}/another-role`, region, `POST ${AUTH}`].sort());
      advance(REREAD_MS + SECOND);
      const again = await refresh(client);
      assert.ok(again.includes(`GET ${roles}/another-role`), "the new role is kept in turn");
      assert.ok(!again.includes(`GET ${roles}/app-role`));
      assert.ok(!again.includes(`GET ${roles}/`));
    });

    test("a role that is taken away is an error only when its credentials have ended", async () => {
      const client = newClient({ env: cloud.env.ec2() });
      await client.getToken();
      advance(REREAD_MS + SECOND);
      cloud.roleName = "";
      await client.getToken({ forceRefresh: true });
      advance(5 * MINUTE);
      await failure(client.getToken({ forceRefresh: true }), "no_aws_credentials");
    });

    test("an IMDS token that the service has forgotten is renewed once", async () => {
      const client = newClient({ env: cloud.env.ec2() });
      await client.getToken();
      advance(REREAD_MS + SECOND);
      cloud.imds.fail(/security-credentials/, { status: 401 }, 1);
      const again = await refresh(client);
      assert.equal(again.filter((path) => path.startsWith("PUT")).length, 1);
    });

    test("an IMDS token is renewed when its six hours are over", async () => {
      cloud.credentialLifetimeMs = 12 * HOUR;
      const client = newClient({ env: cloud.env.ec2() });
      await client.getToken();
      advance(11.95 * HOUR);
      const again = await refresh(client);
      assert.equal(again.filter((path) => path.startsWith("PUT")).length, 1);
      const roleReads = again.filter((path) => path.includes("/security-credentials/"));
      assert.deepEqual(roleReads, [`GET ${roles}/app-role`]);
    });
  });

  describe("getCredentials", () => {
    for (const [credentialType, data] of Object.entries(documents.edgeCredentialData)) {
      test(`${credentialType}: every field can be read, and the date is a Date`, async () => {
        const answer = await newClient().getCredentials({ ...API_KEY, credentialType });
        assert.equal(answer.credentialType, credentialType);
        assert.ok(answer.expiresAt instanceof Date);
        for (const [name, value] of Object.entries(data)) assert.equal(answer.data[name], value);
        const names: string[] = [];
        for (const name in answer.data) if (Object.hasOwn(data, name)) names.push(name);
        assert.deepEqual(names.sort(), Object.keys(data).sort());
      });
    }

    test("fields that are null are null", async () => {
      const data = documents.withNulls({ apiKey: "fake-key" });
      cloud.edge.policies = [{ host: API_KEY.host, data }];
      const answer = await newClient().getCredentials(API_KEY);
      for (const [name, value] of Object.entries(data)) assert.equal(answer.data[name], value);
    });

    test("sends the bearer token, the same client as /auth signed afresh, the server", async () => {
      const ids = { AEMBIT_RESOURCE_SET_ID: "set-1", CLIENT_WORKLOAD_ID: "workload-1" };
      const env = { ...cloud.env.ecs(), ...ids };
      const client = newClient({ env });
      const { accessToken } = await client.getToken();
      advance(10 * SECOND);
      const connectionMetadata = { database: "orders" };
      await client.getCredentials({ ...API_KEY, connectionMetadata });
      const [first] = asked(AUTH);
      const [request] = asked(CREDENTIALS);
      assert.ok(first && request);
      assert.equal(request.headers["authorization"], `Bearer ${accessToken}`);
      for (const name of ["content-type", "accept", "x-aembit-resourceset"]) {
        assert.ok(request.headers[name], name);
        assert.equal(request.headers[name], first.headers[name], name);
      }
      const { client: evidence, ...rest } = bodyOf(request);
      assert.deepEqual(rest, {
        server: { transportProtocol: "TCP", host: "api.example.com", port: 443 },
        credentialType: "ApiKey",
        connectionMetadata,
      });
      const { client: before } = bodyOf(first);
      const { stsGetCallerIdentity: fresh, ...others } = evidence.aws;
      const { stsGetCallerIdentity: stale, ...same } = before.aws;
      assert.deepEqual(others, same);
      assert.deepEqual(evidence.os, before.os);
      assert.notEqual(fresh.headers["X-Amz-Date"], stale.headers["X-Amz-Date"]);
    });

    test("is one request with a warm token, and without connectionMetadata if none", async () => {
      const client = newClient();
      await client.getToken();
      await client.getCredentials(API_KEY);
      assert.equal(cloud.fetched.length, 2);
      const names = Object.keys(bodyOf(asked(CREDENTIALS)[0])).sort();
      assert.deepEqual(names, ["client", "credentialType", "server"]);
    });

    test("concurrent calls on a cold client authenticate once", async () => {
      const client = newClient();
      await Promise.all(Array.from({ length: 30 }, () => client.getCredentials(API_KEY)));
      assert.equal(asked(AUTH).length, 1);
      assert.equal(asked(CREDENTIALS).length, 30);
    });

    test("a 401 drops the token and authenticates once more", async () => {
      const client = newClient();
      const first = await client.getToken();
      cloud.edge.revoke();
      await client.getCredentials(API_KEY);
      assert.equal(asked(AUTH).length, 2);
      assert.equal(asked(CREDENTIALS).length, 2);
      assert.notEqual((await client.getToken()).accessToken, first.accessToken);
      assert.equal(asked(AUTH).length, 2);
    });

    test("a 401 for many concurrent callers authenticates once more for all of them", async () => {
      const client = newClient();
      await client.getToken();
      cloud.edge.revoke();
      await Promise.all(Array.from({ length: 40 }, () => client.getCredentials(API_KEY)));
      assert.equal(asked(AUTH).length, 2);
      assert.equal(asked(CREDENTIALS).length, 80);
    });

    test("a 401 that comes late does not drop the token that took the place", async () => {
      const client = newClient();
      await client.getToken();
      const gate = Promise.withResolvers<void>();
      const refusal = json(documents.edgeFailure("The access token is not valid"), 401);
      cloud.edge.respond(CREDENTIALS, async () => {
        await gate.promise;
        return refusal;
      }, 1);
      const late = client.getCredentials(API_KEY);
      await eventually(() => asked(CREDENTIALS).length === 1);
      const next = await client.getToken({ forceRefresh: true });
      gate.resolve();
      await late;
      assert.equal(await client.getToken(), next);
      assert.equal(asked(AUTH).length, 2);
    });

    test("a second 401 is edge_rejected, and there is no third attempt", async () => {
      const client = newClient({ maxAttempts: 3 });
      cloud.edge.fail(CREDENTIALS, { status: 401 });
      const error = await failure(client.getCredentials(API_KEY), "edge_rejected");
      assert.equal(error.status, 401);
      assert.equal(error.retryable, false);
      assert.equal(asked(AUTH).length, 2);
      assert.equal(asked(CREDENTIALS).length, 2);
    });

    test("a 401 and a failure to authenticate again is that failure", async () => {
      const client = newClient();
      await client.getToken();
      cloud.edge.revoke();
      cloud.edge.fail(AUTH, { status: 403 });
      const error = await failure(client.getCredentials(API_KEY), "edge_rejected");
      assert.equal(error.status, 403);
    });

    for (const answer of [404, "Unknown"] as const) {
      test(`${answer} is no_matching_policy, and the token stays`, async () => {
        cloud.edge.noPolicy = answer;
        cloud.edge.policies = [];
        const client = newClient({ maxAttempts: 3 });
        const error = await failure(client.getCredentials(API_KEY), "no_matching_policy");
        assert.equal(error.retryable, false);
        assert.equal(error.status, answer === 404 ? 404 : error.status);
        await failure(client.getCredentials(API_KEY), "no_matching_policy");
        assert.equal(asked(AUTH).length, 1);
        assert.equal(asked(CREDENTIALS).length, 2);
      });
    }

    const STATUSES: readonly (readonly [number, AembitAuthErrorCode, boolean])[] = [
      [400, "edge_rejected", false],
      [403, "edge_rejected", false],
      [429, "edge_unavailable", true],
      [500, "edge_unavailable", true],
      [503, "edge_unavailable", true],
      [302, "invalid_edge_response", false],
    ];
    for (const [status, code, retryable] of STATUSES) {
      test(`${status} is ${code}`, async () => {
        const headers = { Location: `${cloud.edge.url}/elsewhere` };
        cloud.edge.fail(CREDENTIALS, { status, headers });
        const error = await failure(newClient().getCredentials(API_KEY), code);
        assert.equal(error.status, status);
        assert.equal(error.retryable, retryable);
        assert.equal(asked(CREDENTIALS).length, 1);
        assert.equal(asked("/elsewhere").length, 0);
      });
    }

    const without = (name: keyof AembitCredentialsRequest): object => {
      const rest: Record<string, unknown> = { ...API_KEY };
      delete rest[name];
      return rest;
    };
    const BAD: readonly (readonly [name: string, request: unknown])[] = [
      ["undefined", undefined],
      ["null", null],
      ["a string", "api.example.com"],
      ["an array", []],
      ["no host", without("host")],
      ["no port", without("port")],
      ["no type", without("credentialType")],
      ["an empty host", { ...API_KEY, host: "" }],
      ["a host with a space", { ...API_KEY, host: "api example" }],
      ["a URL for a host", { ...API_KEY, host: "https://api.example.com/" }],
      ["a number for a host", { ...API_KEY, host: 127 }],
      ["a host with a line break", { ...API_KEY, host: "api.example\n.com" }],
      ["port 0", { ...API_KEY, port: 0 }],
      ["port 65536", { ...API_KEY, port: 65_536 }],
      ["port -1", { ...API_KEY, port: -1 }],
      ["port 1.5", { ...API_KEY, port: 1.5 }],
      ["port NaN", { ...API_KEY, port: NaN }],
      ["a port in quotes", { ...API_KEY, port: "443" }],
      ["an empty type", { ...API_KEY, credentialType: "" }],
      ["a number for a type", { ...API_KEY, credentialType: 1 }],
      ["metadata with a number", { ...API_KEY, connectionMetadata: { a: 1 } }],
      ["metadata with null", { ...API_KEY, connectionMetadata: { a: null } }],
      ["an array of metadata", { ...API_KEY, connectionMetadata: ["a"] }],
      ["a string of metadata", { ...API_KEY, connectionMetadata: "a=b" }],
    ];
    for (const [name, request] of BAD) {
      test(`a bad request is invalid_config before any packet: ${name}`, async () => {
        const client = newClient();
        await failure(client.getCredentials(request as never), "invalid_config");
        assert.equal(cloud.fetched.length, 0);
      });
    }

    const GOOD_HOSTS = ["db", "10.0.0.1", "::1", "a-b.c_d.example.com"];
    for (const host of GOOD_HOSTS) {
      test(`the host ${host} is sent as it is`, async () => {
        cloud.edge.policies = [{ host }];
        await newClient().getCredentials({ ...API_KEY, host, port: 65_535 });
      });
    }

    const BAD_OPTIONS: readonly (readonly [name: string, options: unknown])[] = [
      ["a string", "x"],
      ["a signal that is none", { signal: {} }],
    ];
    for (const [name, callOptions] of BAD_OPTIONS) {
      test(`bad options of a call are invalid_config before any packet: ${name}`, async () => {
        const client = newClient();
        const bad = callOptions as never;
        await failure(client.getCredentials(API_KEY, bad), "invalid_config");
        await failure(client.getToken(bad), "invalid_config");
        assert.equal(cloud.fetched.length, 0);
      });
    }

    test("a forceRefresh that is no boolean is invalid_config", async () => {
      const bad = { forceRefresh: "no" } as never;
      await failure(newClient().getToken(bad), "invalid_config");
    });

    const granted = (more: Record<string, unknown>): string =>
      JSON.stringify({ credentialType: "ApiKey", expiresAt: null, data: { apiKey: "k" }, ...more });
    const DATES: readonly (readonly [unknown, string | null])[] = [
      [null, null],
      ["2031-02-03T04:05:06Z", "2031-02-03T04:05:06.000Z"],
      ["2031-02-03T04:05:06.789Z", "2031-02-03T04:05:06.789Z"],
      ["2031-02-03T04:05:06+02:00", "2031-02-03T02:05:06.000Z"],
    ];
    for (const [expiresAt, expected] of DATES) {
      test(`expiresAt ${expiresAt} is read`, async () => {
        cloud.edge.respond(CREDENTIALS, () => json(granted({ expiresAt })));
        const answer = await newClient().getCredentials(API_KEY);
        assert.equal(answer.expiresAt?.toISOString() ?? null, expected);
      });
    }

    const UNUSABLE: readonly (readonly [name: string, body: string])[] = [
      ["a word for a date", granted({ expiresAt: "soon" })],
      ["an empty date", granted({ expiresAt: "" })],
      ["a number for a date", granted({ expiresAt: 12_345 })],
      ["true for a date", granted({ expiresAt: true })],
      ["no data", granted({ data: undefined })],
      ["null for data", granted({ data: null })],
      ["an array of data", granted({ data: ["k"] })],
      ["a string of data", granted({ data: "k" })],
      ["no type", granted({ credentialType: undefined })],
      ["a number for a type", granted({ credentialType: 5 })],
      ["half a document", granted({}).slice(0, 30)],
      ["null", "null"],
    ];
    for (const [name, body] of UNUSABLE) {
      test(`an answer with ${name} is an invalid_edge_response`, async () => {
        cloud.edge.respond(CREDENTIALS, () => json(body));
        await failure(newClient().getCredentials(API_KEY), "invalid_edge_response");
        assert.equal(asked(CREDENTIALS).length, 1);
      });
    }
  });

  describe("secrets are read by property only", () => {
    const INSPECTIONS: readonly InspectOptions[] = [
      {},
      { depth: null },
      { depth: null, showHidden: true },
      { depth: null, getters: true },
      { depth: null, showHidden: true, getters: true },
      { depth: null, customInspect: false },
      { depth: null, customInspect: false, showHidden: true },
      { depth: 0, compact: false, sorted: true },
    ];

    /** All that people and loggers do to an object without asking for the one property. */
    function shownForms(value: object): string[] {
      const all = [value, { nested: [value] }, new Map([["key", value]]), { ...value }];
      return [
        ...all.flatMap((shape) => INSPECTIONS.map((how) => inspect(shape, how))),
        ...all.map((shape) => JSON.stringify(shape) ?? ""),
        JSON.stringify(value, Object.getOwnPropertyNames(value)),
        JSON.stringify(Object.entries(value)),
        JSON.stringify(Object.getOwnPropertyDescriptors(value)),
        JSON.stringify(Object.assign({}, value)),
        JSON.stringify(structuredClone({ ...value })),
        `${String(value)} ${Object.prototype.toString.call(value)}`,
        Object.keys(value).join(),
        Reflect.ownKeys(value).map(String).join(),
      ];
    }

    function assertHidden(value: object, secrets: readonly string[]): void {
      for (const [index, form] of shownForms(value).entries()) {
        for (const secret of secrets) {
          assert.ok(!form.includes(secret), `form ${index} shows ${secret.slice(0, 12)}…`);
        }
      }
    }

    test("a token is frozen, hides accessToken, and shows the rest", async () => {
      for (const token of [await authenticate(options()), await newClient().getToken()]) {
        const { accessToken, tokenType, expiresIn, expiresAt } = token;
        assert.ok(cloud.edge.issued.includes(accessToken));
        assertHidden(token, [accessToken]);
        assert.deepEqual({ ...token }, { tokenType, expiresIn, expiresAt });
        assert.deepEqual(JSON.parse(JSON.stringify(token)),
          { tokenType, expiresIn, expiresAt: expiresAt.toISOString() });
        assert.match(inspect(token), /3600/);
        assert.ok(Object.isFrozen(token));
        assert.throws(() => Object.assign(token, { accessToken: "another" }), TypeError);
        assert.equal(token.accessToken, accessToken);
      }
    });

    test("a client shows neither its token nor its options", async () => {
      const { accessKeyId: _, ...secrets } = cloud.accounts.static;
      const credentials = { ...cloud.accounts.lambda };
      const client = newClient({ credentials });
      const { accessToken } = await client.getToken();
      await client.getCredentials(API_KEY);
      assertHidden(client, [
        accessToken,
        ...Object.values(secrets),
        credentials.secretAccessKey,
        credentials.sessionToken ?? "no token",
      ]);
    });

    for (const [credentialType, data] of Object.entries(documents.edgeCredentialData)) {
      test(`the values of ${credentialType} are hidden, deep in the answer too`, async () => {
        const answer = await newClient().getCredentials({ ...API_KEY, credentialType });
        assertHidden(answer, Object.values(data));
        assertHidden(answer.data, Object.values(data));
        assert.match(inspect(answer), new RegExp(credentialType));
        assert.equal(JSON.parse(JSON.stringify(answer)).credentialType, credentialType);
      });
    }

    test("fields with the names of methods are data like any other", async () => {
      const names = ["toJSON", "toString", "__proto__", "constructor", "then", "inspect"];
      const fields = names.map((name) => `"${name}":"hidden-${name}"`);
      const data = `{${fields},"deep":{"a":["low"]}}`;
      const body = `{"credentialType":"Odd","expiresAt":null,"data":${data}}`;
      cloud.edge.respond(CREDENTIALS, () => json(body));
      const answer = await newClient().getCredentials({ ...API_KEY, credentialType: "Odd" });
      for (const name of names) assert.equal(answer.data[name], `hidden-${name}`);
      assert.deepEqual(answer.data["deep"], { a: ["low"] });
      const forms = INSPECTIONS.map((how) => inspect(answer, how));
      for (const form of [...forms, JSON.stringify(answer), JSON.stringify(answer.data)]) {
        assert.doesNotMatch(form, /hidden-|low/);
      }
    });

    test("AWS credentials hide their key and their token", async () => {
      const { ec2 } = cloud.accounts;
      const credentials = await loadAwsCredentials(options({ env: cloud.env.ec2() }));
      assert.equal(credentials.secretAccessKey, ec2.secretAccessKey);
      assert.equal(credentials.sessionToken, ec2.sessionToken);
      assertHidden(credentials, [ec2.secretAccessKey, ec2.sessionToken ?? "no token"]);
      assert.ok(inspect(credentials).includes(ec2.accessKeyId));
    });
  });

  describe("the constructor", () => {
    const GIVEN: readonly (readonly [name: string, given: unknown])[] = [
      ["null", null],
      ["a number", 5],
      ["a string", "aembit:…"],
      ["an array", []],
      ["a bad time-out", { timeoutMs: -1 }],
      ["a bad signal", { signal: "none" }],
      ["a bad clock", { now: 5 }],
      ["a bad fetch", { fetch: null }],
      ["a bad logger", { logger: {} }],
      ["a bad environment", { env: "AWS_REGION=x" }],
      ["nothing to work with", { env: {} }],
    ];
    for (const [name, given] of GIVEN) {
      test(`never throws, and the first call rejects: ${name}`, async () => {
        const client = new AembitAuth(given as never);
        await failure(client.getToken(), "invalid_config");
        await failure(client.getCredentials(API_KEY), "invalid_config");
      });
    }

    test("reads nothing: the environment counts at the time of the call", async () => {
      const env: Record<string, string> = {};
      const client = newClient({ env });
      Object.assign(env, cloud.env.staticKeys());
      await client.getToken();
    });
  });

  describe("a process of its own", { concurrency: true }, () => {
    let folder: string;
    let local: Cloud;
    before(async () => {
      folder = mkdtempSync(join(tmpdir(), "client-process-"));
      local = await startCloud();
    });
    after(async () => {
      await local.close();
      rmSync(folder, { recursive: true, force: true });
    });

    let scripts = 0;
    /** Runs a program that uses the file, with what it logs as an unhandled rejection. */
    function runScript(
      lines: readonly string[],
      { env = {}, args = [] }: { env?: Record<string, string>; args?: readonly string[] } = {},
    ): Promise<Ended> {
      scripts += 1;
      const script = join(folder, `script-${scripts}.mjs`);
      const names = "AembitAuth, authenticate";
      writeFileSync(script, [
        `import { ${names} } from ${JSON.stringify(pathToFileURL(FILE).href)};`,
        'process.on("unhandledRejection", () => console.log("unhandledRejection"));',
        ...lines,
      ].join("\n"));
      return runProgram(process.execPath, [...args, script], { env, cwd: folder });
    }

    function assertQuietEnd(ended: Ended, stdout: string, withinMs: number): void {
      const { status, stderr, ms } = ended;
      assert.deepEqual({ status, stdout: ended.stdout, stderr }, { status: 0, stdout, stderr: "" });
      assert.ok(ms < withinMs, `took ${Math.round(ms)} ms`);
    }

    /** Prints how long the process lived on after its last line, which is what is at stake. */
    const LINGER = [
      "const doneMs = performance.now();",
      'process.on("exit", () => {',
      "  const ms = performance.now() - doneMs;",
      "  if (ms > Number(process.env.LINGER_MS)) console.log(`lived on for ${ms} ms`);",
      "});",
    ];
    const ownEnv = (more: Record<string, string> = {}): Record<string, string> => ({
      ...local.env.ec2(),
      LINGER_MS: "500",
      ...more,
    });
    test("exits by itself after success", async () => {
      const ended = await runScript([
        "const client = new AembitAuth({ timeoutMs: 20_000 });",
        "const { tokenType } = await client.getToken();",
        `await client.getCredentials(${JSON.stringify(API_KEY)});`,
        "await authenticate({ timeoutMs: 20_000 });",
        "console.log(tokenType);",
        ...LINGER,
      ], { env: ownEnv() });
      assertQuietEnd(ended, "Bearer\n", 10_000);
    });

    test("exits by itself after a failure, and when nobody looks at the second one", async () => {
      const gone = await startCloud();
      await gone.close();
      const ended = await runScript([
        "const client = new AembitAuth({ timeoutMs: 20_000, maxAttempts: 1 });",
        "const results = await Promise.allSettled([",
        "  client.getToken(), client.getToken({ forceRefresh: true }),",
        "  authenticate({ timeoutMs: 20_000, maxAttempts: 1, instanceIdentity: true }),",
        "]);",
        "for (const { reason } of results) console.log(reason.code);",
        ...LINGER,
      ], { env: ownEnv({ AEMBIT_EDGE_BASE_URL: gone.edge.url }) });
      assertQuietEnd(ended, "edge_unavailable\n".repeat(3), 10_000);
    });

    test("exits by itself when every source fails at the same time", async () => {
      const ended = await runScript([
        "const uri = `${process.env.AWS_EC2_METADATA_SERVICE_ENDPOINT}/nowhere`;",
        "const env = { ...process.env, ECS_CONTAINER_METADATA_URI_V4: uri,",
        "  AWS_CONTAINER_CREDENTIALS_FULL_URI: uri, AWS_REGION: '' };",
        "const call = { env, maxAttempts: 1, ecsMetadata: 'require', instanceIdentity: true };",
        "const { code } = await authenticate(call).catch((error) => error);",
        "console.log(code);",
        ...LINGER,
      ], { env: ownEnv() });
      assertQuietEnd(ended, "metadata_unavailable\n", 10_000);
    });

    test("a failure stops the reads that go on beside it", async () => {
      local.tmds.fail("/v4/hanging", "hang");
      const ended = await runScript([
        "const { code } = await authenticate().catch((error) => error);",
        "console.log(code);",
        ...LINGER,
      ], {
        env: ownEnv({
          AWS_CONTAINER_CREDENTIALS_FULL_URI: `${local.ecs.url}/nowhere`,
          ECS_CONTAINER_METADATA_URI_V4: `${local.tmds.url}/v4/hanging`,
        }),
      });
      assertQuietEnd(ended, "metadata_unavailable\n", 10_000);
    });

    test("exits by itself after an abort, however much was under way", async () => {
      const hanging = await startCloud();
      hanging.edge.fail(/./, "hang");
      try {
        const ended = await runScript([
          "const controller = new AbortController();",
          "const client = new AembitAuth({ timeoutMs: 20_000 });",
          "const { signal } = controller;",
          "const work = client.getToken({ signal }).catch((reason) => reason);",
          "setTimeout(() => controller.abort('left'), 300);",
          "console.log(await work);",
          ...LINGER,
        ], { env: { ...hanging.env.ec2(), LINGER_MS: "500" } });
        assertQuietEnd(ended, "left\n", 10_000);
      } finally {
        await hanging.close();
      }
    });

    test("outlives a renewal on a hanging server by no more than timeoutMs", async () => {
      const hanging = await startCloud();
      hanging.edge.expiresIn = 1000;
      hanging.edge.fail(AUTH, { status: 200, body: documents.edgeToken("first", 1000) }, 1);
      hanging.edge.fail(AUTH, "hang");
      try {
        const ended = await runScript([
          "let ms = Date.now();",
          "const client = new AembitAuth({ now: () => ms, timeoutMs: 1500 });",
          "const first = await client.getToken();",
          "ms += 900_000;",
          "console.log(await client.getToken() === first);",
          ...LINGER,
        ], { env: { ...hanging.env.staticKeys(), LINGER_MS: "2200" } });
        assertQuietEnd(ended, "true\n", 10_000);
        assert.equal(hanging.edge.requests.length, 2, "the renewal had begun");
      } finally {
        await hanging.close();
      }
    });

    test("a renewal that fails after everybody has left is no unhandled rejection", async () => {
      const ended = await runScript([
        "let ms = Date.now(); let calls = 0;",
        "const body = JSON.stringify({ accessToken: 't', expiresIn: 1000 });",
        "const down = async () => { throw new Error('no'); };",
        "const fetch = async () => (calls++ ? down() : new Response(body));",
        "const client = new AembitAuth({ now: () => ms, fetch, maxAttempts: 2, timeoutMs: 900 });",
        "await client.getToken();",
        "ms += 900_000;",
        "await client.getToken();",
        "ms += 31_000;",
        "setTimeout(async () => console.log((await client.getToken()).tokenType), 600);",
      ], { env: local.env.staticKeys() });
      assertQuietEnd(ended, "Bearer\n", 10_000);
    });

    test("new AembitAuth() alone never throws; its first call rejects", async () => {
      const ended = await runScript([
        "const clients = [new AembitAuth(), new AembitAuth(undefined), new AembitAuth(null)];",
        "for (const client of clients) {",
        "  const { code } = await client.getToken().catch((error) => error);",
        "  console.log(code);",
        "}",
        "new AembitAuth();",
      ]);
      assertQuietEnd(ended, "invalid_config\n".repeat(3), 10_000);
    });

    test("20,000 renewals leave the heap as it was, and no listener on the signal", async () => {
      const ended = await runScript([
        'import { getEventListeners } from "node:events";',
        "const body = JSON.stringify({ accessToken: 'x'.repeat(1000), expiresIn: 3600 });",
        "const fetch = async () => new Response(body);",
        "const { signal } = new AbortController();",
        "const client = new AembitAuth({ fetch, signal });",
        "const call = { forceRefresh: true, signal };",
        "const renew = async (times) => {",
        "  for (let left = times; left > 0; left -= 1) await client.getToken(call);",
        "};",
        "const heap = async () => {",
        "  for (let turn = 0; turn < 3; turn += 1) {",
        "    await new Promise((resolve) => setTimeout(resolve, 20));",
        "    gc();",
        "  }",
        "  return process.memoryUsage().heapUsed;",
        "};",
        "await renew(1000);",
        "const before = await heap();",
        "await renew(20_000);",
        "const grownKiB = Math.round((await heap() - before) / 1024);",
        "const left = getEventListeners(signal, 'abort').length;",
        "console.log(grownKiB < 1024 ? `flat, ${left}` : `grown by ${grownKiB} KiB`);",
      ], { env: local.env.staticKeys(), args: ["--expose-gc"] });
      assertQuietEnd(ended, "flat, 0\n", 25_000);
    });
  });
});

describe("The command line", () => {
  const COMMANDS = ["token", "request", "headers", "credentials", "doctor"];
  const FLAGS = [
    "client-id", "edge-url", "resource-set-id", "client-workload-id", "region", "source",
    "ecs-metadata", "lambda-arn", "instance-identity", "timeout", "json", "verbose", "help",
    "version", "server-workload-host", "server-workload-port", "credential-type", "output-format",
  ].map((name) => `--${name}`);
  const EXIT: Readonly<Record<AembitAuthErrorCode, number>> = {
    invalid_config: 2,
    no_aws_credentials: 3,
    invalid_aws_credentials: 3,
    metadata_unavailable: 3,
    no_region: 3,
    edge_rejected: 4,
    no_matching_policy: 4,
    edge_unavailable: 5,
    invalid_edge_response: 5,
    timeout: 5,
  };
  const AUTH = "/edge/v1/auth";
  const HOUR_MS = 3_600_000;

  /** The lines before the last are warnings; the last is the failure, and its message returned. */
  const failed = (ended: Ended, code: AembitAuthErrorCode): string => {
    const lines = ended.stderr.trimEnd().split("\n");
    const [, named, message = ""] = /^aembit-auth: (\w+): (.+)$/.exec(lines.pop() ?? "") ?? [];
    assert.equal(named, code, ended.stderr);
    assert.equal(ended.status, EXIT[code]);
    for (const line of lines) assert.match(line, /^aembit-auth: warning: ./);
    return message;
  };
  /** A failed command prints nothing on stdout. */
  const failedSilently = (ended: Ended, code: AembitAuthErrorCode): string => {
    assert.equal(ended.stdout, "");
    return failed(ended, code);
  };
  /** What is printed on success, with nothing beside it. */
  const printed = ({ status, stdout, stderr }: Ended): string => {
    assert.equal(stderr, "");
    assert.equal(status, 0);
    assert.ok(stdout.endsWith("\n") && !stdout.endsWith("\n\n"));
    return stdout.slice(0, -1);
  };
  /** A value from deep inside a document that is JSON, or undefined. */
  const dig = (json: string, ...path: readonly string[]): unknown =>
    path.reduce(
      (at: unknown, name) => Object.entries(at ?? {}).find(([key]) => key === name)?.[1],
      JSON.parse(json),
    );
  const verdictOf = (cloud: Cloud, identity: unknown) =>
    judge(identity, {
      lookup: (id) => Object.values(cloud.accounts).find(({ accessKeyId }) => accessKeyId === id),
      now: Date.now(),
    });
  const assertNoSecret = (cloud: Cloud, text: string): void => {
    const bodies = cloud.edge.requests.map(({ body }) => body);
    const secrets = [
      ...Object.values(cloud.accounts).flatMap((keys) => [keys.secretAccessKey, keys.sessionToken]),
      ...cloud.edge.issued,
      ...bodies.flatMap((body) => /Signature=([\da-f]{64})/.exec(body)?.[1]),
    ].filter((secret) => secret !== undefined);
    assert.ok(secrets.length > 10);
    for (const secret of secrets) assert.ok(!text.includes(secret), "a secret was printed");
  };
  /** For tests that run side by side, and so cannot share one. */
  const withCloud = async (work: (cloud: Cloud) => Promise<void>): Promise<void> => {
    const cloud = await startCloud();
    try {
      await work(cloud);
    } finally {
      await cloud.close();
    }
  };

  describe("what it prints", () => {
    let cloud: Cloud;
    before(async () => (cloud = await startCloud()));
    after(() => cloud.close());
    beforeEach(() => cloud.reset());

    for (const [name, args] of [["token", ["token"]], ["no command", []]] as const) {
      test(`${name}: the access token and a newline, nothing else`, async () => {
        const ended = await runCommand(args, { env: cloud.env.staticKeys() });
        assert.equal(printed(ended), cloud.edge.issued[0]);
        assert.equal(cloud.edge.requests.length, 1);
      });
    }

    test("token --json: the four fields of the token", async () => {
      const ended = await runCommand(["--json"], { env: cloud.env.ecs() });
      const answer = printed(ended);
      const names = ["accessToken", "tokenType", "expiresIn", "expiresAt"];
      assert.deepEqual(Object.keys(JSON.parse(answer)), names);
      assert.equal(dig(answer, "accessToken"), cloud.edge.issued[0]);
      assert.equal(dig(answer, "tokenType"), "Bearer");
      assert.equal(dig(answer, "expiresIn"), 3600);
      const endsAt = Date.parse(String(dig(answer, "expiresAt")));
      assert.ok(Math.abs(endsAt - Date.now() - HOUR_MS) < 30_000);
    });

    test("request: a body that Aembit takes as it is, without a call to Aembit", async () => {
      const body = printed(await runCommand(["request"], { env: cloud.env.ecs() }));
      assert.equal(cloud.edge.requests.length, 0);
      assert.equal(dig(body, "clientId"), cloud.clientId);
      assert.equal(typeof dig(body, "client", "aws", "ecs", "taskMetadata"), "string");
      const headers = { "Content-Type": "application/json", Accept: "application/json" };
      const answer = await fetch(`${cloud.edge.url}${AUTH}`, { method: "POST", headers, body });
      assert.equal(answer.status, 200, await answer.text());
    });

    test("headers: the signed headers and the region, without a call to Aembit", async () => {
      const identity = printed(await runCommand(["headers"], { env: cloud.env.lambda() }));
      assert.deepEqual(Object.keys(JSON.parse(identity)).sort(), ["headers", "region"]);
      assert.equal(dig(identity, "region"), cloud.region);
      const { accessKeyId } = cloud.accounts.lambda;
      assert.deepEqual(verdictOf(cloud, JSON.parse(identity)), { ok: true, accessKeyId });
      assert.deepEqual(cloud.requests(), []);
    });

    test("--verbose speaks on stderr, tells no secret, and leaves the result alone", async () => {
      const ended = await runCommand(["token", "--verbose"], { env: cloud.env.ecs() });
      assert.equal(ended.status, 0);
      assert.equal(ended.stdout, `${cloud.edge.issued[0]}\n`);
      assert.match(ended.stderr, /^(aembit-auth: .+\n)+$/);
      assert.ok(ended.stderr.includes(`${cloud.edge.url}${AUTH}`));
      assertNoSecret(cloud, ended.stderr);
    });

    test("a wrong clock is a warning on stderr, and the token still the result", async () => {
      cloud.edge.clockOffsetMs = HOUR_MS;
      const { status, stdout, stderr } = await runCommand([], { env: cloud.env.staticKeys() });
      assert.equal(status, 0);
      assert.equal(stdout, `${cloud.edge.issued[0]}\n`);
      assert.match(stderr, /^aembit-auth: warning: .+\n$/);
    });

    test("--version: the version, and no packet", async () => {
      assert.equal(printed(await runCommand(["--version"])), VERSION);
      assert.equal(printed(await runCommand(["doctor", "--version"])), VERSION);
    });

    test("--help: every command and every flag, and no packet", async () => {
      const help = printed(await runCommand(["--help"], { env: cloud.env.ec2() }));
      for (const name of [...COMMANDS, ...FLAGS]) assert.ok(help.includes(name), name);
      assert.deepEqual(cloud.requests(), []);
    });
  });

  describe("flags", { concurrency: 2 }, () => {
    /** Each flag against a variable that says something else, and what proves that it counted. */
    const values = (cloud: Cloud): readonly (readonly [flag: string, value: string])[] => [
      ["client-id", cloud.clientId.replace("89abcd", "111111")],
      ["edge-url", cloud.edge.url],
      ["resource-set-id", "the-resource-set"],
      ["client-workload-id", "the-workload"],
      ["region", "ap-south-1"],
      ["source", "ecs"],
      ["ecs-metadata", "require"],
      ["lambda-arn", "arn:aws:lambda:ap-south-1:111122223333:function:login"],
      ["timeout", "20.5"],
    ];
    const forms = [
      ["--flag value", (flag: string, value: string) => [`--${flag}`, value]],
      ["--flag=value", (flag: string, value: string) => [`--${flag}=${value}`]],
    ] as const;
    for (const [name, form] of forms) {
      test(`${name}: each flag wins over its variable`, () => withCloud(async (cloud) => {
        const flags = values(cloud);
        const env: Env = {
          ...cloud.env.ecs(),
          ...cloud.env.staticKeys(),
          AEMBIT_EDGE_BASE_URL: "https://edge.invalid",
          AEMBIT_RESOURCE_SET_ID: "another",
          CLIENT_WORKLOAD_ID: "another",
        };
        const args = flags.flatMap(([flag, value]) => form(flag, value));
        args.push("--instance-identity");
        assert.equal(printed(await runCommand(args, { env })), cloud.edge.issued[0]);
        const [request] = cloud.edge.requests;
        const body = request?.body ?? "";
        const wanted = new Map(flags);
        assert.equal(dig(body, "clientId"), wanted.get("client-id"));
        assert.equal(request?.headers["x-aembit-resourceset"], wanted.get("resource-set-id"));
        const workload = dig(body, "client", "os", "environment", "CLIENT_WORKLOAD_ID");
        assert.equal(workload, wanted.get("client-workload-id"));
        const identity = dig(body, "client", "aws", "stsGetCallerIdentity");
        assert.equal(dig(JSON.stringify(identity), "region"), wanted.get("region"));
        const { accessKeyId } = cloud.accounts.ecs;
        assert.deepEqual(verdictOf(cloud, identity), { ok: true, accessKeyId });
        assert.equal(typeof dig(body, "client", "aws", "ecs", "taskMetadata"), "string");
        assert.equal(dig(body, "client", "aws", "lambda", "arn"), wanted.get("lambda-arn"));
        assert.equal(typeof dig(body, "client", "aws", "instanceIdentityDocument"), "string");
      }));
    }

    test("--ecs-metadata omit leaves the metadata out", () => withCloud(async (cloud) => {
      const env = cloud.env.ecs();
      const body = printed(await runCommand(["request", "--ecs-metadata", "omit"], { env }));
      assert.equal(dig(body, "client", "aws", "ecs"), undefined);
      assert.equal(cloud.tmds.requests.length, 0);
    }));

    test("--timeout is the deadline of the whole command, in seconds", () =>
      withCloud(async (cloud) => {
        cloud.edge.fail(AUTH, "hang");
        const env = cloud.env.staticKeys();
        const ended = await runCommand(["--timeout", "0.4"], { env });
        assert.ok(failedSilently(ended, "timeout").includes(cloud.edge.url));
        assert.ok(ended.ms > 400 && ended.ms < 5000, `${ended.ms} ms`);
      }));
  });

  describe("mistakes of usage are exit 2, before any packet", { concurrency: 4 }, () => {
    let cloud: Cloud;
    before(async () => (cloud = await startCloud()));
    after(() => cloud.close());

    const SECRET = "hunter2-EXAMPLE";
    const target = ["--server-workload-host=api.example.com", "--server-workload-port=443"];
    const cases: readonly (readonly [string, args: string[], names: readonly string[]])[] = [
      ["an unknown command names the commands", ["login"], COMMANDS],
      ["a command that Object.prototype has", ["toString"], COMMANDS],
      ["the command constructor", ["constructor"], COMMANDS],
      ["the command __proto__", ["__proto__"], COMMANDS],
      ["an empty command", [""], COMMANDS],
      ["an unknown flag names the flags", ["token", `--client-secret=${SECRET}`], FLAGS],
      ["the flag --constructor", ["--constructor"], FLAGS],
      ["the flag --__proto__ with a value", ["--__proto__=1"], FLAGS],
      ["the flag --hasOwnProperty", ["token", "--hasOwnProperty"], FLAGS],
      ["an unknown flag is named", ["--clientid", SECRET], ["'--clientid'"]],
      ["a flag in another case", ["--JSON"], FLAGS],
      ["a flag by its option's name", ["--clientId", SECRET], FLAGS],
      ["a flag with one dash", ["token", "-h"], FLAGS],
      ["a flag behind two dashes", ["token", "--", "--help"], COMMANDS],
      ["a second command", ["token", "doctor"], COMMANDS],
      ["a flag at the end without its value", ["--region"], ["--region"]],
      ["a flag where the value belongs", ["--region", "--verbose"], ["--region"]],
      ["an empty value", ["--client-id="], ["--client-id"]],
      ["an empty value in a word of its own", ["--edge-url", ""], ["--edge-url"]],
      ["a switch with a value", ["--verbose=no"], ["--verbose"]],
      ["--json with a value", ["--verbose", "--instance-identity=1"], ["--instance-identity"]],
      ["an unknown source", ["--source", "sso"], ["--source", "web-identity", "imds"]],
      ["a source that Object.prototype has", ["--source", "constructor"], ["--source"]],
      ["an unknown mode", ["--ecs-metadata", "yes"], ["--ecs-metadata", "require", "omit"]],
      ["a region that is none", ["--region", `x.evil.test/${SECRET}`], ["--region"]],
      ["a client ID that is none", ["--client-id", SECRET], ["--client-id"]],
      ["an Edge URL over http", ["--edge-url", "http://edge.example.com"], ["--edge-url"]],
      ["a Lambda ARN that is none", ["--lambda-arn", SECRET], ["--lambda-arn"]],
      ...["0", "-1", "abc", "Infinity", " "].map((value) =>
        [`--timeout ${JSON.stringify(value)}`, [`--timeout=${value}`], ["--timeout"]] as const
      ).map(([name, args, names]): [string, string[], string[]] => [name, [...args], [...names]]),
      ["credentials without a host", ["credentials", ...target.slice(1),
        "--credential-type=ApiKey"], ["--server-workload-host"]],
      ["credentials without a port", ["credentials", ...target.slice(0, 1),
        "--credential-type=ApiKey"], ["--server-workload-port"]],
      ["credentials without a type", ["credentials", ...target], ["--credential-type"]],
      ...["65536", "https"].map((port): [string, string[], string[]] =>
        [`the port ${port}`, ["credentials", ...target.slice(0, 1), "--credential-type=ApiKey",
          `--server-workload-port=${port}`], ["--server-workload-port"]]),
      ...["toString"].map((format): [string, string[], string[]] =>
        [`the output format ${format}`, ["credentials", ...target, "--credential-type=ApiKey",
          `--output-format=${format}`], ["--output-format", "aws-credential-process"]]),
      ["aws-credential-process for another type", ["credentials", ...target,
        "--credential-type=ApiKey", "--output-format=aws-credential-process"],
        ["AwsStsFederation"]],
    ];
    for (const [name, args, names] of cases) {
      test(name, async () => {
        const env = cloud.env.ecs();
        const message = failedSilently(await runCommand(args, { env }), "invalid_config");
        for (const word of names) assert.ok(message.includes(word), `${word} is not in ${message}`);
        assert.ok(!message.includes(SECRET), "the value is shown");
        assert.deepEqual(cloud.requests(), []);
      });
    }
  });

  describe("failures", { concurrency: 2 }, () => {
    interface Failure {
      readonly when: string;
      readonly code: AembitAuthErrorCode;
      readonly status?: number;
      readonly args?: readonly string[];
      /** Breaks something, and says where the workload runs. */
      readonly arrange: (cloud: Cloud) => Env;
    }
    const refusal = (status: number, headers: Record<string, string> = {}) =>
      ({ status, headers, body: documents.edgeFailure("No, thank you") });
    const credentialsOf = (host: string): string[] => [
      "credentials", "--server-workload-host", host, "--server-workload-port", "443",
      "--credential-type", "ApiKey",
    ];
    const failures: readonly Failure[] = [
      {
        when: "the client ID is malformed",
        code: "invalid_config",
        arrange: (cloud) => ({ ...cloud.env.staticKeys(), AEMBIT_CLIENT_ID: "aembit:x" }),
      },
      {
        when: "the instance has no role",
        code: "no_aws_credentials",
        arrange: (cloud) => {
          cloud.imds.fail("/latest/meta-data/iam/security-credentials/", { status: 404 });
          return { ...cloud.env.ec2(), AWS_REGION: cloud.region };
        },
      },
      {
        when: "the ECS agent sends half a document",
        code: "invalid_aws_credentials",
        arrange: (cloud) => {
          cloud.ecs.fail(/credentials/, "truncated");
          return cloud.env.ecs();
        },
      },
      {
        when: "the ECS agent refuses",
        code: "metadata_unavailable",
        status: 400,
        arrange: (cloud) => {
          cloud.ecs.fail(/credentials/, { ...documents.ecsInvalidId, status: 400 });
          return cloud.env.ecs();
        },
      },
      {
        when: "no region is known",
        code: "no_region",
        arrange: (cloud) => {
          const { AWS_REGION, AWS_DEFAULT_REGION, ...rest } = cloud.env.staticKeys();
          assert.ok(AWS_REGION === AWS_DEFAULT_REGION);
          return { ...rest, AWS_EC2_METADATA_DISABLED: "TRUE" };
        },
      },
      {
        when: "Aembit refuses",
        code: "edge_rejected",
        status: 401,
        arrange: (cloud) => {
          cloud.edge.fail(AUTH, refusal(401));
          return cloud.env.staticKeys();
        },
      },
      {
        when: "no Access Policy matches",
        code: "no_matching_policy",
        status: 404,
        args: credentialsOf("other.example.com"),
        arrange: (cloud) => cloud.env.staticKeys(),
      },
      {
        when: "Aembit is down for longer than there is time",
        code: "edge_unavailable",
        status: 503,
        arrange: (cloud) => {
          cloud.edge.fail(AUTH, refusal(503, { "Retry-After": "3600" }));
          return cloud.env.staticKeys();
        },
      },
      {
        when: "a portal answers for Aembit",
        code: "invalid_edge_response",
        status: 200,
        arrange: (cloud) => {
          cloud.edge.fail(AUTH, "html");
          return cloud.env.staticKeys();
        },
      },
      {
        when: "Aembit says nothing in time",
        code: "timeout",
        args: ["token", "--timeout", "0.5"],
        arrange: (cloud) => {
          cloud.edge.fail(AUTH, "hang");
          return cloud.env.staticKeys();
        },
      },
    ];

    test("there is a case for every code", () =>
      assert.deepEqual(failures.map(({ code }) => code), Object.keys(EXIT)));

    for (const { when, code, status, args = ["token"], arrange } of failures) {
      test(`${code} when ${when}: one line, exit ${EXIT[code]}; with --json, JSON`, () =>
        withCloud(async (cloud) => {
          const env = arrange(cloud);
          const [plain, json] = await Promise.all([
            runCommand(args, { env }),
            runCommand([...args, "--json"], { env }),
          ]);
          const message = failedSilently(plain, code);
          if (code === "edge_rejected") assert.ok(message.includes("No, thank you"), message);
          assert.equal(json.stdout, "");
          assert.equal(json.status, EXIT[code]);
          assert.match(json.stderr, /^\{.+\}\n$/);
          const error = (name: string): unknown => dig(json.stderr, "error", name);
          const stray = Object.keys(dig(json.stderr, "error") ?? {}).filter((name) =>
            !["code", "message", "status"].includes(name));
          assert.deepEqual([error("code"), typeof error("message"), stray], [code, "string", []]);
          if (status !== undefined) assert.equal(error("status"), status);
          assertNoSecret(cloud, plain.stderr + json.stderr);
        }));
    }

    test("with --json a mistake of usage is JSON too", async () => {
      const { status, stdout, stderr } = await runCommand(["login", "--json"]);
      assert.equal(status, 2);
      assert.equal(stdout, "");
      assert.equal(dig(stderr, "error", "code"), "invalid_config");
    });

    for (const flags of [[], ["--json"]]) {
      test(`warnings are lines of their own before the error (${flags.join() || "plain"})`, () =>
        withCloud(async (cloud) => {
          cloud.tmds.fail(/./, { status: 403 });
          cloud.edge.fail(AUTH, refusal(401));
          const ended = await runCommand(flags, { env: cloud.env.ecs() });
          const lines = ended.stderr.trimEnd().split("\n");
          const error = lines.pop() ?? "";
          if (flags.length > 0) assert.equal(dig(error, "error", "code"), "edge_rejected");
          else failedSilently(ended, "edge_rejected");
          assert.ok(lines.length > 0);
          for (const line of lines) assert.match(line, /^aembit-auth: warning: ./);
        }));
    }

    test("nothing is said after the error, though another read was still trying", () =>
      withCloud(async (cloud) => {
        cloud.ecs.fail(/credentials/, { status: 400 });
        cloud.tmds.fail(/./, { status: 503 });
        const { status, stderr } = await runCommand(["--verbose"], { env: cloud.env.ecs() });
        assert.equal(status, EXIT.metadata_unavailable);
        assert.match(stderr, /\naembit-auth: metadata_unavailable: .+\n$/);
      }));

    for (const fault of ["hang", "refused"] as const) {
      test(`off AWS (IMDS: ${fault}): exit 3 within 3 s, with each source's reason`, () =>
        withCloud(async (cloud) => {
          cloud.imds.fail(/./, fault);
          const ended = await runCommand(["token"], { env: cloud.env.ec2() });
          const endedAt = Date.now();
          const message = failedSilently(ended, "no_aws_credentials");
          const reasons = [
            /env: \S*AWS_ACCESS_KEY_ID/,
            /web-identity: \S*AWS_WEB_IDENTITY_TOKEN_FILE/,
            /ecs: \S*AWS_CONTAINER_CREDENTIALS_RELATIVE_URI/,
            /imds: \S/,
          ];
          for (const reason of reasons) assert.match(message, reason);
          const firstAt = cloud.imds.requests[0]?.at ?? 0;
          assert.ok(endedAt - firstAt < 3000, `${endedAt - firstAt} ms`);
          assert.equal(cloud.edge.requests.length, 0);
        }));
    }
  });

  describe("streams and signals", () => {
    let cloud: Cloud;
    before(async () => (cloud = await startCloud()));
    after(() => cloud.close());
    beforeEach(() => cloud.reset());

    const start = (args: readonly string[], env: Env) =>
      spawn(process.execPath, [FILE, ...args], { env: { PATH: process.env["PATH"], ...env } });

    for (const args of [["token"], ["--help"], ["doctor"]]) {
      test(`${args[0]}: a reader that closes stdout at once is no crash`, async () => {
        const child = start(args, cloud.env.staticKeys());
        child.stdout.destroy();
        let stderr = "";
        child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
        const [status] = await once(child, "close");
        assert.deepEqual([status, stderr], [0, ""]);
      });
    }

    test("a reader that closes stderr at once leaves the exit code", async () => {
      const child = start(["login"], {});
      child.stderr.destroy();
      child.stdout.resume();
      const [status] = await once(child, "close");
      assert.equal(status, 2);
    });

    const target = [
      "--server-workload-host=api.example.com", "--server-workload-port=443",
      "--credential-type=ApiKey",
    ];
    const waits: readonly (readonly [args: string[], service: "edge" | "imds", path: string])[] = [
      [["token"], "edge", AUTH],
      [["token", "--json"], "imds", "/latest/api/token"],
      [["credentials", ...target], "edge", "/edge/v1/credentials"],
      [["doctor"], "edge", AUTH],
    ];
    for (const [args, service, path] of waits) {
      test(`SIGINT ends ${args.slice(0, 2).join(" ")} at once with 130 (${path})`, async () => {
        const env = service === "edge" ? cloud.env.staticKeys() : cloud.env.ec2();
        const child = start(args, env);
        let interruptedMs = 0;
        cloud[service].respond(path, () => {
          interruptedMs = performance.now();
          child.kill("SIGINT");
          return new Promise(() => {});
        });
        child.stdout.resume();
        child.stderr.resume();
        const [status, signal] = await once(child, "close");
        assert.deepEqual([status, signal], [130, null]);
        assert.ok(performance.now() - interruptedMs < 800, "it took its time");
      });
    }
  });

  describe("credentials", () => {
    let cloud: Cloud;
    before(async () => (cloud = await startCloud()));
    after(() => cloud.close());
    beforeEach(() => cloud.reset());

    const argsFor = (format?: string, type = "UsernamePassword"): string[] => [
      "credentials", "--server-workload-host", "api.example.com", "--server-workload-port", "5432",
      "--credential-type", type, ...(format === undefined ? [] : ["--output-format", format]),
    ];
    const run = (format?: string, type?: string) =>
      runCommand(argsFor(format, type), { env: cloud.env.staticKeys() });
    const grant = (data: Record<string, unknown>, expiresAt?: string | null): void => {
      const policy = { host: "api.example.com", data };
      cloud.edge.policies = [expiresAt === undefined ? policy : { ...policy, expiresAt }];
    };

    const ascii = String.fromCharCode(...Array.from({ length: 127 }, (_, index) => index + 1));
    const awkward: Readonly<Record<string, string>> = {
      apiKey: "plain",
      awsSecretAccessKey: "a/b+c=",
      empty: "",
      singleQuotes: "'it''s '\\'' '",
      onlyAQuote: "'",
      doubleQuotes: "\"$HOME\" \"",
      command: "$(touch /tmp/never) `id` ${PATH} $((1+1)) $$ $? $! !!",
      backslashes: "\\ \\n \\\\ \\' \\",
      newlines: "\nfirst\n\nlast\n",
      carriageReturns: "a\rb\r\n",
      tabsAndSpaces: "\t a  b \t",
      leadingDash: "-n -e --",
      operators: "; & | < > ( ) { } [ ] * ? ~ # ! = % ^ @ : ,",
      unicode: "pässwörd 密碼 🔑 e\u0301 \u00a0 \u2028 ЁЂЃЄЅІЇЈ",
      typographic: "‘a’ ‚b‛ “c” „d‟ '’'‘ ‛‛",
      ascii,
      asciiTwice: `${ascii}'${ascii}`,
      long: "x'y".repeat(20_000),
    };
    const nameOf = (key: string): string =>
      key.replaceAll(/[A-Z]/g, (capital) => `_${capital}`).toUpperCase();
    const expected: Env = Object.fromEntries(
      Object.entries(awkward).map(([key, value]) => [
        { onlyAQuote: "ONLY_AQUOTE" }[key] ?? nameOf(key),
        value,
      ]),
    );
    /** Dumps the environment that the shell hands down; `"$0"` is Node, `"$@"` its arguments. */
    const DUMP = `exec "$0" -e 'process.stdout.write(JSON.stringify(process.env))'`;
    const uses = [
      ["sh-export", "eval", `eval "$("$0" "$@")"; ${DUMP}`],
      ["sh-env", "an env file", `"$0" "$@" > "$OUT" && set -a && . "$OUT" && set +a; ${DUMP}`],
    ] as const;
    const shells = ["sh", "bash"].filter((shell) =>
      (process.env["PATH"] ?? "").split(delimiter).some((path) => existsSync(join(path, shell))));

    for (const [format, use, script] of uses) {
      for (const shell of shells) {
        test(`${format}: ${shell} reads every awkward character back (${use})`, async () => {
          const folder = mkdtempSync(join(tmpdir(), "shell-"));
          try {
            grant(awkward);
            const env = { ...cloud.env.staticKeys(), OUT: join(folder, "env") };
            const args = ["-c", script, process.execPath, FILE, ...argsFor(format)];
            const ended = await runProgram(shell, args, { env, cwd: folder });
            assert.deepEqual([ended.status, ended.stderr], [0, ""]);
            const seen = Object.entries(JSON.parse(ended.stdout));
            const values = seen.filter(([name]) => Object.hasOwn(expected, name));
            assert.deepEqual(Object.fromEntries(values), expected);
          } finally {
            rmSync(folder, { recursive: true });
          }
        });
      }
    }

    test("sh-export exports, sh-env only assigns", async () => {
      const [exports, assigns] = [await run("sh-export"), await run("sh-env")].map(printed);
      assert.match(exports ?? "", /^export USERNAME='app_user'\nexport PASSWORD='/);
      assert.match(assigns ?? "", /^USERNAME='app_user'\nPASSWORD='/);
    });

    /**
     * PowerShell's rule for single-quoted strings: any of five quotes opens and closes, and two in
     * a row, whichever they are, are the second of them.
     */
    function parsePowerShell(text: string): Env {
      const quotes = "'‘’‚‛";
      const found: [string, string][] = [];
      for (let rest = text; rest !== "";) {
        const [head = "", name = ""] = /^\$env:([A-Z_][A-Z\d_]*) = (?=['‘’‚‛])/.exec(rest) ?? [];
        assert.notEqual(head, "", `no assignment: ${rest.slice(0, 40)}`);
        let [at, value] = [head.length + 1, ""];
        for (; at < rest.length; at++) {
          if (quotes.includes(rest.charAt(at)) && !quotes.includes(rest.charAt(++at) || "-")) break;
          value += rest.charAt(at);
        }
        found.push([name, value]);
        assert.match(rest.slice(at), /^(\r?\n|$)/, "something follows the string");
        rest = rest.slice(at).replace(/^\r?\n/, "");
      }
      return Object.fromEntries(found);
    }

    test("powershell-env: PowerShell reads every awkward character back", async () => {
      assert.deepEqual(parsePowerShell("$env:A = 'x‘’y'"), { A: "x’y" });
      assert.throws(() => parsePowerShell("$env:A = 'x’; evil"));
      grant(awkward);
      assert.deepEqual(parsePowerShell(printed(await run("powershell-env"))), expected);
    });

    const types = Object.entries(documents.edgeCredentialData);
    test("json, the default: type, expiry and the data of every type", async () => {
      for (const [index, [type, data]] of types.entries()) {
        const answer = printed(await run(index === 0 ? "json" : undefined, type));
        assert.deepEqual(Object.keys(JSON.parse(answer)), ["credentialType", "expiresAt", "data"]);
        assert.equal(dig(answer, "credentialType"), type);
        assert.deepEqual(dig(answer, "data"), data);
        assert.ok(Date.parse(String(dig(answer, "expiresAt"))) > Date.now());
      }
    });

    test("fields that do not apply, sent as null, set no variable", async () => {
      grant(documents.withNulls({ apiKey: "the-key" }));
      assert.equal(printed(await run("sh-export", "ApiKey")), "export API_KEY='the-key'");
    });

    for (const [expiresAt, expiration] of [
      ["2031-02-03T04:05:06Z", "2031-02-03T04:05:06.000Z"],
      [null, undefined],
    ] as const) {
      test(`aws-credential-process: the document the AWS SDKs read (${expiresAt})`, async () => {
        const data = documents.edgeCredentialData["AwsStsFederation"] ?? {};
        grant(data, expiresAt);
        const answer: unknown = JSON.parse(
          printed(await run("aws-credential-process", "AwsStsFederation")),
        );
        assert.deepEqual(answer, {
          Version: 1,
          AccessKeyId: data["awsAccessKeyId"],
          SecretAccessKey: data["awsSecretAccessKey"],
          SessionToken: data["awsSessionToken"],
          ...(expiration === undefined ? {} : { Expiration: expiration }),
        });
      });
    }

    test("aws-credential-process: an answer without keys is no AWS credential", async () => {
      grant({ apiKey: "the-key" });
      const ended = await run("aws-credential-process", "AwsStsFederation");
      failedSilently(ended, "invalid_edge_response");
    });

    const keys = ["x;id", "$(id)", "1abc", "", "é", "a\nb", "a-b", "$env:x"];
    test("a key that is no name of a variable is refused by every format of a shell", async () => {
      const formats = ["sh-export", "sh-env", "powershell-env"];
      for (const [index, key] of keys.entries()) {
        grant({ apiKey: "the-key", [key]: "touch /tmp/never" });
        const ended = await run(formats[index % formats.length]);
        failedSilently(ended, "invalid_edge_response");
        assert.ok(!ended.stderr.includes("the-key"));
      }
      assert.deepEqual(dig(printed(await run("json")), "data", "$env:x"), "touch /tmp/never");
    });

    test("a value with a NUL, which no variable can hold, is refused", async () => {
      grant({ password: "a\0b" });
      for (const format of ["sh-export", "powershell-env"]) {
        failedSilently(await run(format), "invalid_edge_response");
      }
    });

    test("--verbose tells no secret of the credential either", async () => {
      grant({ password: "correct horse battery" });
      const args = [...argsFor("sh-env"), "--verbose"];
      const ended = await runCommand(args, { env: cloud.env.staticKeys() });
      assert.equal(ended.stdout, "PASSWORD='correct horse battery'\n");
      assert.ok(ended.stderr !== "" && !ended.stderr.includes("correct horse"));
      assertNoSecret(cloud, ended.stderr);
    });
  });

  describe("doctor", { concurrency: 2 }, () => {
    const ITEMS = {
      clientId: /client.?id/i,
      edgeUrl: /edge url/i,
      env: /\benv\b/,
      webIdentity: /web-identity/,
      ecs: /\becs\b/,
      imds: /\bimds\b/,
      region: /\bregion\b/i,
      ecsMetadata: /ecs metadata/i,
      clock: /\bclock\b/i,
      exchange: /\bexchange\b/i,
    } as const;
    type Item = keyof typeof ITEMS;
    /** The line of an item: its name is among the first words, before what was found. */
    const lineOf = ({ stdout }: Ended, item: Item): string => {
      const named = stdout.split("\n").filter((line) => ITEMS[item].test(line.slice(0, 20)));
      assert.equal(named.length, 1, `${item} in\n${stdout}`);
      return named[0] ?? "";
    };
    const examine = (env: Env, ...args: string[]): Promise<Ended> =>
      runCommand(["doctor", ...args], { env });

    test("every item has its line, and nothing is secret or asked twice", () =>
      withCloud(async (cloud) => {
        const ended = await examine(cloud.env.ecs());
        assert.deepEqual([ended.status, ended.stderr], [0, ""]);
        const lines = Object.keys(ITEMS).map((item) => lineOf(ended, item as Item));
        assert.equal(new Set(lines).size, lines.length);
        assert.ok(lineOf(ended, "clientId").includes(cloud.clientId));
        assert.ok(lineOf(ended, "edgeUrl").includes(cloud.edge.url));
        assert.ok(lineOf(ended, "env").includes("AWS_ACCESS_KEY_ID"));
        assert.ok(lineOf(ended, "webIdentity").includes("AWS_WEB_IDENTITY_TOKEN_FILE"));
        assert.ok(lineOf(ended, "ecs").includes(cloud.accounts.ecs.accessKeyId));
        assert.match(lineOf(ended, "imds"), /not asked/);
        assert.ok(lineOf(ended, "region").includes(cloud.region));
        assert.match(lineOf(ended, "clock"), /\b[01] s\b/);
        assert.ok(lineOf(ended, "exchange").includes("3600"));
        assertNoSecret(cloud, ended.stdout);
        assert.equal(cloud.edge.requests.length, 1);
        assert.equal(cloud.imds.requests.length, 0);
      }));

    test("on EC2 it says what IMDS answered", () => withCloud(async (cloud) => {
      const ended = await examine(cloud.env.ec2());
      assert.equal(ended.status, 0);
      assert.ok(lineOf(ended, "imds").includes(cloud.accounts.ec2.accessKeyId));
      assert.match(lineOf(ended, "ecsMetadata"), /none/);
      assertNoSecret(cloud, ended.stdout + ended.stderr);
    }));

    for (const offset of [HOUR_MS, -HOUR_MS]) {
      test(`the clock's distance from Aembit's is shown (${offset / 1000} s)`, () =>
        withCloud(async (cloud) => {
          cloud.edge.clockOffsetMs = offset;
          const ended = await examine(cloud.env.staticKeys());
          assert.equal(ended.status, 0, ended.stdout);
          assert.match(lineOf(ended, "clock"), /\b(3599|360[01]) s\b/);
        }));
    }

    test("a clock that could not be compared is not called right", () =>
      withCloud(async (cloud) => {
        cloud.edge.fail(AUTH, "reset");
        const ended = await examine(cloud.env.staticKeys());
        failed(ended, "edge_unavailable");
        assert.doesNotMatch(lineOf(ended, "clock"), /^ok|\d s /);
      }));

    test("with --source, other sources are not asked", () => withCloud(async (cloud) => {
      const env = { ...cloud.env.ecs(), ...cloud.env.staticKeys() };
      const ended = await examine(env, "--source", "ecs");
      assert.equal(ended.status, 0);
      assert.match(lineOf(ended, "env"), /not asked/);
      assert.ok(lineOf(ended, "ecs").includes(cloud.accounts.ecs.accessKeyId));
    }));

    interface Illness {
      readonly name: string;
      readonly code: AembitAuthErrorCode;
      /** The first item that fails, or what its line names; and what is therefore not asked. */
      readonly at?: Item;
      readonly names?: string;
      readonly unasked: readonly Item[];
      readonly env: (cloud: Cloud) => Env;
      readonly args?: readonly string[];
    }
    const illnesses: readonly Illness[] = [
      {
        name: "no client ID, so the Edge URL and the exchange are not asked",
        code: "invalid_config",
        at: "clientId",
        unasked: ["edgeUrl", "clock", "exchange"],
        env: (cloud) => ({ ...cloud.env.staticKeys(), AEMBIT_CLIENT_ID: "" }),
      },
      {
        name: "a bad Edge URL",
        code: "invalid_config",
        names: "AEMBIT_EDGE_BASE_URL",
        unasked: ["clock", "exchange"],
        env: (cloud) => ({ ...cloud.env.staticKeys(), AEMBIT_EDGE_BASE_URL: "http://a.test" }),
      },
      {
        name: "half a pair of keys, and no other source is asked",
        code: "invalid_config",
        at: "env",
        unasked: ["webIdentity", "ecs", "imds", "clock", "exchange"],
        env: (cloud) => ({ ...cloud.env.staticKeys(), AWS_SECRET_ACCESS_KEY: "" }),
      },
      {
        name: "the ECS agent refuses, and IMDS is not asked in its place",
        code: "metadata_unavailable",
        at: "ecs",
        unasked: ["imds", "clock", "exchange"],
        env: (cloud) => {
          cloud.ecs.fail(/credentials/, { status: 400 });
          return cloud.env.ecs();
        },
      },
      {
        name: "no credentials anywhere, so there is nothing to ask Aembit",
        code: "no_aws_credentials",
        unasked: ["clock"],
        env: ({ clientId, region }) => ({
          AEMBIT_CLIENT_ID: clientId, AWS_REGION: region, AWS_EC2_METADATA_DISABLED: "true",
        }),
      },
      {
        name: "no region",
        code: "no_region",
        at: "region",
        unasked: ["clock", "exchange"],
        env: (cloud) => ({
          ...cloud.env.staticKeys(),
          AWS_REGION: "", AWS_DEFAULT_REGION: "", AWS_EC2_METADATA_DISABLED: "true",
        }),
      },
      {
        name: "ECS metadata that is required and not there",
        code: "invalid_config",
        at: "ecsMetadata",
        unasked: ["clock", "exchange"],
        env: (cloud) => cloud.env.staticKeys(),
        args: ["--ecs-metadata", "require"],
      },
      {
        name: "Aembit refuses",
        code: "edge_rejected",
        at: "exchange",
        unasked: [],
        env: (cloud) => {
          cloud.edge.fail(AUTH, { status: 401, body: documents.edgeFailure("No") });
          return cloud.env.staticKeys();
        },
      },
      {
        name: "Aembit is down",
        code: "edge_unavailable",
        at: "exchange",
        unasked: [],
        env: (cloud) => {
          cloud.edge.fail(AUTH, { status: 503, headers: { "Retry-After": "3600" } });
          return cloud.env.staticKeys();
        },
      },
      {
        name: "the first of two failures gives the exit code",
        code: "invalid_config",
        names: "AEMBIT_CLIENT_ID",
        unasked: ["clock", "exchange"],
        env: (cloud) => {
          cloud.ecs.fail(/credentials/, { status: 400 });
          return { ...cloud.env.ecs(), AEMBIT_CLIENT_ID: "aembit:x" };
        },
      },
    ];
    for (const { name, code, at, names = "", unasked, env, args = [] } of illnesses) {
      test(`exit ${EXIT[code]}: ${name}`, () => withCloud(async (cloud) => {
        const ended = await examine(env(cloud), ...args);
        failed(ended, code);
        const [first = ""] = ended.stdout.split("\n").filter((line) => line.includes(code));
        assert.ok(first !== "" && first.includes(names), ended.stdout);
        if (at !== undefined) assert.equal(first, lineOf(ended, at));
        for (const item of unasked) assert.match(lineOf(ended, item), /not asked/);
        if (unasked.includes("clock")) assert.equal(cloud.edge.requests.length, 0);
        if (unasked.includes("imds")) assert.equal(cloud.imds.requests.length, 0);
        assertNoSecret(cloud, ended.stdout + ended.stderr);
      }));
    }
  });
});

describe("Being started, and being imported", { concurrency: 2 }, () => {
  let folder = "";
  before(() => {
    folder = realpathSync(mkdtempSync(join(tmpdir(), "entry-")));
    writeFileSync(join(folder, "package.json"), `{"type":"module"}`);
  });
  after(() => rmSync(folder, { recursive: true }));

  const url = pathToFileURL(FILE).href;
  const file = (name: string, content: string): string => {
    const path = join(folder, name);
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, content);
    return path;
  };
  const copy = (name: string): string => file(name, readFileSync(FILE, "utf8"));
  const link = (name: string, target = FILE): string => {
    const path = join(folder, name);
    mkdirSync(dirname(path), { recursive: true });
    symlinkSync(target, path);
    return path;
  };
  const node = (...args: string[]): Promise<Ended> =>
    runProgram(process.execPath, args, { cwd: folder });

  const linkedFolder = (): string => {
    copy("real/aembit-auth.ts");
    return join(link("linked", join(folder, "real")), "aembit-auth.ts");
  };
  const entries: readonly (readonly [name: string, path: () => string])[] = [
    ["by its path, from another folder", () => FILE],
    ["by a relative path", () => {
      copy("relative/aembit-auth.ts");
      return join("relative", "..", "relative", "aembit-auth.ts");
    }],
    ["under a path with spaces and other letters", () => copy("a b/ü 日本/aembit-auth.ts")],
    ["under a path with marks that URLs encode", () => copy("50% #1 [x]+&?/aembit-auth.ts")],
    ["under a name with a version", () => copy("aembit-auth-1.0.ts")],
    ["through a link of its own name, as in node_modules/.bin", () => link("bin/aembit-auth")],
    ["through a linked folder", linkedFolder],
  ];
  for (const [name, path] of entries) {
    test(`runs ${name}`, async () => {
      const script = path();
      const ended = await node(script, "--version");
      assert.deepEqual([ended.status, ended.stdout], [0, `${VERSION}\n`], ended.stderr);
      assert.equal((await node(script, "--no-such-flag")).status, 2);
    });
  }

  const OWN = `console.log("own", typeof authenticate);`;
  const imported = `import { authenticate } from ${JSON.stringify(url)};\n${OWN}`;
  /** A bundle is, after all, the text of the file inside another one. */
  const bundle = (): string =>
    `${nodeModule.stripTypeScriptTypes(readFileSync(FILE, "utf8")).replace(/^#!.*/, "")}\n${OWN}`;
  const others: readonly (readonly [name: string, args: () => string[], says?: string])[] = [
    ["imported by a program", () => [file("app.mjs", imported)]],
    ["imported by a program whose name begins like its own", () =>
      [file("aembit-auth-wrapper.mjs", imported)]],
    ["imported on demand", () =>
      ["-e", `import(${JSON.stringify(url)}).then(({ authenticate }) => { ${OWN} })`, "--"]],
    ["preloaded", () => ["--import", url, file("main.mjs", `console.log("own function")`)]],
    ["bundled into a program", () => [file("bundle.mjs", bundle())]],
    ["bundled into a program in a folder of its name", () =>
      [file("aembit-auth/index.mjs", bundle())]],
    ["copied under another name", () => [copy("login.ts")], ""],
    ["started through a link of another name", () => [link("bin/login")], ""],
  ];
  for (const [name, args, says = "own function\n"] of others) {
    test(`does nothing when ${name}`, async () => {
      const ended = await node(...args(), "--version", "--no-such-flag");
      assert.deepEqual([ended.status, ended.stdout, ended.stderr], [0, says, ""]);
    });
  }

  test("importing reads no variable, takes no fetch, opens no handle", async () => {
    const spy = file("spy.mjs", `
      Error.stackTraceLimit = 100;
      const seen = globalThis.seen = [];
      const note = (what) => (new Error().stack.includes("aembit-auth") ? seen.push(what) : 0);
      const watch = (target, name) => new Proxy(target, Object.fromEntries(
        ["get", "has", "ownKeys", "getOwnPropertyDescriptor"].map((trap) => [trap, (...args) => {
          note(name + " " + trap + " " + String(args[1]));
          return Reflect[trap](...args);
        }])));
      process.env = watch(process.env, "env");
      const { fetch } = globalThis;
      Object.defineProperty(globalThis, "fetch", { get: () => (note("fetch"), fetch) });
    `);
    const app = file("watched.mjs", `
      const count = () => [process.getActiveResourcesInfo().length, ...["SIGINT", "exit",
        "uncaughtException", "unhandledRejection"].map((name) => process.listenerCount(name))];
      const before = count();
      const module = await import(process.argv[2]);
      await new Promise((resolve) => setImmediate(resolve));
      const after = count();
      const onImport = seen.splice(0);
      await module.authenticate().catch(() => {});
      console.log(JSON.stringify({ before, after, onImport, onCall: seen }));
    `);
    const { stdout, stderr } = await node("--import", pathToFileURL(spy).href, app, url);
    assert.equal(stderr, "");
    const { before: first, after: second, onImport, onCall } = JSON.parse(stdout) as {
      readonly [name in "before" | "after" | "onImport" | "onCall"]: readonly unknown[];
    };
    assert.deepEqual(onImport, []);
    assert.deepEqual(second, first);
    // The spy does see what a call reads.
    assert.ok(onCall.some((what) => String(what).endsWith("AEMBIT_CLIENT_ID")));
  });
});

describe("The package", () => {
  const CONTENT = [
    "LICENSE", "README.md", "aembit-auth.d.ts", "aembit-auth.js", "aembit-auth.ts", "package.json",
  ];
  const TSC = [
    "--noEmit", "--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess",
    "--erasableSyntaxOnly", "--verbatimModuleSyntax", "--allowImportingTsExtensions",
    "--ignoreConfig", "--skipLibCheck", "false", "--target", "es2022", "--lib", "es2024",
    "--types", "node", "--typeRoots", join(ROOT, "node_modules/@types"),
  ];
  const metadata = (): Record<string, unknown> =>
    JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as Record<string, unknown>;
  /** npm and node of this project first, and no talk but of errors. */
  const env: Env = {
    PATH: [join(ROOT, "node_modules/.bin"), process.env["PATH"]].join(delimiter),
    npm_config_loglevel: "error",
    npm_config_update_notifier: "false",
  };
  let folder = "";
  let app = "";
  let packed: string[] = [];

  before(async () => {
    folder = realpathSync(mkdtempSync(join(tmpdir(), "package-")));
    const source = join(folder, "source");
    app = join(folder, "app");
    for (const path of [source, app]) mkdirSync(path);
    // A copy, so that building it leaves nothing here; and with more than it may hold.
    for (const name of readdirSync(ROOT, { withFileTypes: true })) {
      const isBuilt = /^aembit-auth\.(js|d\.ts)$|\.tgz$/.test(name.name);
      if (name.isFile() && !isBuilt) copyFileSync(join(ROOT, name.name), join(source, name.name));
    }
    symlinkSync(join(ROOT, "node_modules"), join(source, "node_modules"));
    const pack = ["pack", "--ignore-scripts=false", "--pack-destination", folder];
    const made = await runProgram("npm", pack, { cwd: source, env });
    assert.equal(made.status, 0, made.stderr);
    const archive = join(folder, readdirSync(folder).find((name) => name.endsWith(".tgz")) ?? "");
    const listed = await runProgram("tar", ["-tzf", archive]);
    packed = listed.stdout.trim().split("\n").map((path) => path.replace(/^package\//, "")).sort();
    writeFileSync(join(app, "package.json"), `{"private":true,"type":"module"}`);
    const install = ["install", "--offline", "--no-audit", "--no-fund", archive];
    const installed = await runProgram("npm", install, { cwd: app, env });
    assert.equal(installed.status, 0, installed.stderr);
  });
  after(() => rmSync(folder, { recursive: true }));

  test("holds six files and nothing else", () => assert.deepEqual(packed, CONTENT));

  test("depends on nothing", () => {
    const names = ["dependencies", "peerDependencies", "optionalDependencies"];
    for (const name of names) assert.equal(metadata()[name], undefined);
    const installed = readdirSync(join(app, "node_modules")).filter((name) => !/^\./.test(name));
    assert.deepEqual(installed, ["aembit-auth"]);
  });

  test("the version is the same in the file, the package and the command", async () => {
    assert.equal(metadata()["version"], VERSION);
    assert.equal((await runCommand(["--version"])).stdout, `${VERSION}\n`);
  });

  test("importing it gives what the source exports", async () => {
    const program = `
      const module = await import("aembit-auth");
      console.log(JSON.stringify([Object.keys(module).sort(), module.VERSION]));
    `;
    const args = ["--input-type=module", "-e", program];
    const { stdout, stderr } = await runProgram(process.execPath, args, { cwd: app });
    assert.equal(stderr, "");
    const names = [
      "AembitAuth", "AembitAuthError", "VERSION", "authenticate", "createAuthRequest",
      "edgeUrlFromClientId", "loadAwsCredentials", "readEcsMetadata", "resolveRegion",
      "signGetCallerIdentity", "signRequest",
    ];
    assert.deepEqual(JSON.parse(stdout), [names, VERSION]);
  });

  /** This Node, and any other that is installed and new enough. */
  const nodes = [process.execPath, ...(process.env["PATH"] ?? "").split(delimiter)
    .filter((path) => !path.includes("node_modules"))
    .map((path) => join(path, "node"))
    .filter((path) => existsSync(path))
    .map((path) => realpathSync(path))];
  for (const path of new Set(nodes)) {
    test(`its command runs on ${path}`, { skip: process.platform === "win32" }, async (context) => {
      const { stdout } = await runProgram(path, ["--version"]);
      if (Number(/^v(\d+)/.exec(stdout)?.[1]) < 20) return context.skip(`${stdout.trim()} < v20`);
      const command = join(app, "node_modules/.bin/aembit-auth");
      // Without that line a shell would take the program for a script, and run what it finds.
      assert.equal(readFileSync(command, "utf8").split("\n", 1)[0], "#!/usr/bin/env node");
      const first = { PATH: [dirname(path), process.env["PATH"]].join(delimiter) };
      const ways = [
        await runProgram(command, ["--version"], { cwd: folder, env: first }),
        await runProgram(path, [command, "--version"], { cwd: folder }),
        await runProgram(path, [join(app, "node_modules/aembit-auth/aembit-auth.js"), "--version"]),
      ];
      for (const ended of ways) {
        assert.deepEqual([ended.stdout, ended.stderr, ended.status], [`${VERSION}\n`, "", 0]);
      }
      return undefined;
    });
  }

  test("it logs in as the source does", async () => {
    const cloud = await startCloud();
    try {
      const path = join(app, "node_modules/aembit-auth/aembit-auth.js");
      const ended = await runProgram(process.execPath, [path], { env: cloud.env.ecs() });
      assert.equal(ended.stdout, `${cloud.edge.issued[0]}\n`, ended.stderr);
    } finally {
      await cloud.close();
    }
  });

  const CONSUMER = `
    import { AembitAuth, AembitAuthError, authenticate, signRequest } from "aembit-auth";
    import type { AembitAuthErrorCode, AembitToken, AwsCredentials } from "aembit-auth";
    const credentials: () => Promise<AwsCredentials> = async () =>
      ({ accessKeyId: "id", secretAccessKey: "secret", expiration: new Date() });
    const token: AembitToken = await authenticate({ credentials, signal: AbortSignal.timeout(1) });
    const client = new AembitAuth({ source: "ecs", env: process.env, fetch, logger: console });
    const { data } = await client.getCredentials({ host: "h", port: 1, credentialType: "ApiKey" });
    try {
      await client.getToken({ forceRefresh: true });
    } catch (error) {
      const code: AembitAuthErrorCode | undefined =
        error instanceof AembitAuthError ? error.code : undefined;
      console.log(code, token.expiresAt.getTime(), data);
    }
    const date = new Date();
    const context = { credentials: await credentials(), region: "r", service: "s", date };
    const headers = new Headers({ host: "h" });
    console.log(signRequest({ method: "GET", path: "/", headers }, context).headers["X-Amz-Date"]);
    // @ts-expect-error: there is no such source
    await authenticate({ source: "sso" });
    // @ts-expect-error: a token cannot be changed
    token.accessToken = "";
  `;
  for (const [module, resolution] of [["nodenext", "nodenext"], ["esnext", "bundler"]] as const) {
    test(`its types serve a program under ${resolution} resolution`, async () => {
      writeFileSync(join(app, "consumer.ts"), CONSUMER);
      const args = [...TSC, "--module", module, "--moduleResolution", resolution, "consumer.ts"];
      const { status, stdout } = await runProgram("tsc", args, { cwd: app, env });
      assert.deepEqual([status, stdout], [0, ""]);
    });
  }

  const readme = (): string => readFileSync(join(ROOT, "README.md"), "utf8");

  test("every example in README.md that is TypeScript passes the type check", async () => {
    const blocks = [...readme().matchAll(/^```ts\b[^\n]*\n(.*?)^```$/gms)].map(([, code]) => code);
    assert.ok(blocks.length > 0, "README.md has no block marked ts");
    const folderOfExamples = join(app, "examples");
    mkdirSync(folderOfExamples);
    copyFileSync(FILE, join(folderOfExamples, basename(FILE)));
    const names = blocks.map((code, index) => {
      const name = `example-${index + 1}.ts`;
      writeFileSync(join(folderOfExamples, name), `${code}\nexport {};\n`);
      return name;
    });
    const args = [...TSC, "--module", "nodenext", ...names];
    const { status, stdout } = await runProgram("tsc", args, { cwd: folderOfExamples, env });
    assert.deepEqual([status, stdout], [0, ""]);
  });

  test("every file that README.md names exists, and every heading it points to", () => {
    const text = readme();
    const links = [...text.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
    const named = [...text.matchAll(/`((?:[\w-]+\/)*[\w.-]+\.(?:ts|mjs|json|md))`/g)];
    const local = links.filter((target) => !/^([a-z]+:|#)/i.test(target));
    const built = ["aembit-auth.js", "aembit-auth.d.ts"];
    for (const path of [...local, ...named.map(([, name = ""]) => name)]) {
      const bare = path.replace(/[#?].*/, "");
      assert.ok(built.includes(bare) || existsSync(join(ROOT, bare)), `README.md names ${path}`);
    }
    const headings = [...text.matchAll(/^#+ (.+)$/gm)].map(([, heading = ""]) =>
      `#${heading.toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, "").replaceAll(" ", "-")}`);
    for (const target of links.filter((link) => link.startsWith("#"))) {
      assert.ok(headings.includes(target), `README.md has no heading ${target}`);
    }
  });
});

describe("The shape of the file", () => {
  const text = readFileSync(FILE, "utf8");
  const lines = text.split("\n");
  /** The file without its comments, line by line. */
  const code = text.replaceAll(/^\s*\/\*\*.*?\*\/$/gms, "").split("\n")
    .filter((line) => !/^\s*\/\//.test(line));

  test("the section marks are the list in the header, in order", () => {
    const [header = ""] = /\/\*\*.*?\*\//s.exec(text) ?? [];
    const rows = header.slice(header.search(/Sections/)).split("\n").slice(1);
    const start = rows.findIndex((row) => /\d+\. /.test(row));
    const rest = rows.slice(start);
    const end = rest.findIndex((row) => !/^ \* +\d+\. /.test(row));
    const listed = rest.slice(0, end).flatMap((row) =>
      [...row.matchAll(/(\d+)\. (.+?)(?=\s+\d+\. |\s*$)/g)]
        .map(([, number, title]) => `${number}. ${title}`));
    const inOrder = listed.sort((a, b) => parseInt(a, 10) - parseInt(b, 10));
    const marks = [...text.matchAll(/^\/\/ --- (.+) ---$/gm)].map(([, mark]) => mark);
    assert.ok(marks.length > 5);
    assert.deepEqual(marks, inOrder);
    assert.deepEqual(marks.map((mark) => parseInt(mark ?? "", 10)), marks.map((_, at) => at + 1));
  });

  test("it imports modules of Node alone", () => {
    const whole = code.join("\n");
    const atTop = /^(?:im|ex)port\b(?:[^"';]*\bfrom)? "([^"]+)"/gm;
    const found = [...whole.matchAll(atTop), ...whole.matchAll(/\bimport\("([^"]+)"/g)];
    const names = found.map(([, specifier = ""]) => specifier);
    assert.ok(names.includes("node:crypto") && names.length > 1);
    for (const name of names) assert.match(name, /^node:[\w/]+$/);
    assert.doesNotMatch(whole, /\bimport\s*\((?!")|\brequire\(|getBuiltinModule/);
  });

  test("no any, and no check of the compiler is switched off", () => {
    for (const line of code) assert.doesNotMatch(line, /[:<|&,(]\s*any\b|\bas any\b|\bany\[\]/);
    assert.doesNotMatch(text, /@ts-|eslint|prettier-ignore|c8 ignore|v8 ignore/);
  });

  test("no line is longer than 100 columns, here and in the fixtures", () => {
    const fixtures = readdirSync(join(ROOT, "fixtures")).filter((name) => name.endsWith(".ts"));
    for (const path of [FILE, ...fixtures.map((name) => join(ROOT, "fixtures", name))]) {
      const long = readFileSync(path, "utf8").split("\n").filter((line) => line.length > 100);
      assert.deepEqual(long, [], path);
    }
  });

  test("every function is under 60 lines", () => {
    const lengths = lines.flatMap((line, at): [name: string, length: number][] => {
      const isHead = /(\)(: [^=]+)?|=>) \{$/.test(line);
      const isBranch = /^\s*(\} )?(if|else|for|while|switch|catch|try)\b/.test(line);
      if (!isHead || isBranch) return [];
      const indent = /^ */.exec(line)?.[0] ?? "";
      const isOutside = (other: string): boolean => other.startsWith(`${indent}}`);
      const length = lines.slice(at + 1).findIndex(isOutside) + 2;
      // A head of several lines began where the indentation was last the same.
      const above = lines.slice(0, at + 1).reverse();
      const isStart = (other: string): boolean =>
        /^ *[\w#]/.exec(other)?.[0].length === indent.length + 1;
      const head = line.trimStart().startsWith(")") ? above.findIndex(isStart) : 0;
      return [[(above[head] ?? "").trim(), length + head]];
    });
    assert.ok(lengths.length > 80 && lengths.some(([, length]) => length > 20));
    assert.deepEqual(lengths.filter(([, length]) => length >= 60), []);
  });
});

describe("on AWS's own addresses, with nothing set but what AWS sets", () => {
  let places: Places | string;
  before(async () => {
    places = await enterNamespace();
  });

  /** What happened there; undefined where the machine has no such place, and the test says so. */
  const at = (context: TestContext, name: string): Visit | undefined => {
    const visit = typeof places === "string" ? undefined : places[name];
    if (visit === undefined) {
      context.skip(typeof places === "string" ? places : "no such addresses on this machine");
    }
    return visit;
  };

  const roles = "/latest/meta-data/iam/security-credentials/";
  const instance = [
    "imds PUT /latest/api/token",
    "imds GET /latest/meta-data/placement/region",
    `imds GET ${roles}`,
    `imds GET ${roles}app-role`,
  ];
  const cases: readonly (readonly [name: string, signer: Visit["signer"], asked: string[]])[] = [
    ["EC2", "ec2", instance],
    ["EC2, IPv6", "ec2", instance],
    ["ECS", "ecs", ["ecs GET /v2/credentials/*", "tmds GET /v4/*", "tmds GET /v4/*/task"]],
    ["EKS Pod Identity", "pod", ["pod GET /v1/credentials"]],
    ["EKS Pod Identity, IPv6", "pod", ["pod GET /v1/credentials"]],
    ["EKS IRSA", "webIdentity", ["sts POST /"]],
    ["Lambda", "lambda", []],
  ];
  const anyId = (line: string): string => line.replace(/[0-9a-f]{8}[0-9a-f-]{20,}/, "*");
  for (const [name, signer, asked] of cases) {
    it(`${name}: the token is printed, and only what is needed was asked, once`, (context) => {
      const visit = at(context, name);
      if (visit === undefined) return;
      assert.deepEqual([visit.status, visit.stderr], [0, ""]);
      assert.equal(visit.stdout, `${visit.issued}\n`);
      assert.equal(visit.signer, signer);
      const expected = [...asked, "edge POST /edge/v1/auth"].sort();
      assert.deepEqual(visit.requests.map(anyId).sort(), expected);
      assert.equal(visit.requests.at(-1), "edge POST /edge/v1/auth");
    });
  }

  it("EC2: the doctor finds nothing wrong", (context) => {
    const visit = at(context, "EC2, doctor");
    if (visit === undefined) return;
    assert.equal(visit.status, 0, visit.stdout + visit.stderr);
    assert.ok(visit.stdout.split("\n").length > 5, visit.stdout);
    assert.doesNotMatch(visit.stdout, /FAIL/);
  });

  it("a certificate of an unknown authority ends the call before anything is sent", (context) => {
    const visit = at(context, "EC2, an authority that nobody trusts");
    if (visit === undefined) return;
    assert.deepEqual([visit.status, visit.stdout], [5, ""]);
    assert.match(visit.stderr, /edge_unavailable/);
    assert.deepEqual(visit.requests.filter((request) => request.startsWith("edge")), []);
  });
});

describe("in a root folder that holds only Node, its libraries and the one file", () => {
  const root = mkdtempSync(join(tmpdir(), "root-"));
  const outside = process.getuid?.() === 0 ? [] : ["unshare", "--map-root-user"];
  let cloud: Cloud;
  let reason: string | undefined;

  /** As a link where both are on one disk: the binary has more than 100 MB. */
  const place = (source: string, target: string): void => {
    mkdirSync(dirname(join(root, target)), { recursive: true });
    try {
      linkSync(realpathSync(source), join(root, target));
    } catch {
      copyFileSync(source, join(root, target));
    }
  };
  const run = (args: readonly string[], env: Record<string, string>): Promise<Ended> => {
    const path = `${process.env["PATH"]}:/usr/sbin:/sbin`;
    const [program = "chroot", ...rest] = [...outside, "chroot", root, "/node", ...args];
    return runProgram(program, rest, { env: { ...env, PATH: path } });
  };

  before(async () => {
    cloud = await startCloud();
    try {
      const libraries = execFileSync("ldd", [process.execPath], { encoding: "utf8" });
      for (const [, path = ""] of libraries.matchAll(/(\/\S+) \(0x/g)) place(path, path);
      place(process.execPath, "node");
      place(FILE, "aembit-auth.ts");
      const { status, stderr } = await run(["-e", "0"], {});
      if (status !== 0) reason = `no Node in a root folder of its own: ${stderr.trim()}`;
    } catch (error) {
      reason = `no root folder of its own: ${String(error)}`;
    }
  });
  after(async () => {
    await cloud.close();
    rmSync(root, { recursive: true, force: true });
  });

  for (const name of ["ec2", "ecs", "staticKeys"] as const) {
    it(`${name}: the token is printed`, async (context) => {
      if (reason !== undefined) return context.skip(reason);
      const ended = await run(["/aembit-auth.ts", "token"], cloud.env[name]());
      assert.deepEqual([ended.status, ended.stderr], [0, ""]);
      assert.equal(ended.stdout, `${cloud.edge.issued.at(-1)}\n`);
    });
  }
});

describe("corners", () => {
  let cloud: Cloud;
  let folder: string;
  before(async () => {
    cloud = await startCloud();
    folder = mkdtempSync(join(tmpdir(), "corners-"));
  });
  beforeEach(() => cloud.reset());
  after(async () => {
    await cloud.close();
    rmSync(folder, { recursive: true });
  });

  it("a variable that is there and undefined counts as unset", async () => {
    const env = { AWS_REGION: undefined, AWS_DEFAULT_REGION: "eu-west-1" };
    assert.equal(await resolveRegion({ env }), "eu-west-1");
  });

  it("an empty path is signed as the root, normalised or not", () => {
    const date = new Date(0);
    const credentials = { accessKeyId: "AKID", secretAccessKey: "secret" };
    for (const normalizePath of [true, false]) {
      const { canonicalRequest } = signRequest(
        { method: "GET", path: "", headers: [["Host", "example.com"]] },
        { credentials, region: "us-east-1", service: "s3", date, normalizePath },
      );
      assert.equal(canonicalRequest.split("\n")[1], "/");
    }
  });

  it("an abort in the very tick of the first request rejects with its reason", async () => {
    const controller = new AbortController();
    const reason = new Error("changed my mind");
    const fetch = (): Promise<Response> => {
      controller.abort(reason);
      return new Promise(() => {});
    };
    const env = { ...cloud.env.ec2() };
    const call = createAuthRequest({ env, fetch, signal: controller.signal });
    await assert.rejects(call, (error) => error === reason);
  });

  it("a clock that fails between two attempts is the caller's mistake, and no network error", async () => {
    const times = [Date.now(), Date.now(), Date.now()];
    cloud.edge.fail("/edge/v1/auth", { status: 503 });
    const now = (): number => times.shift() ?? NaN;
    const options = { env: cloud.env.staticKeys(), fetch: cloud.fetch, now };
    await failure(authenticate({ ...options, region: "eu-west-1" }), "invalid_config");
  });

  it("metadata over https does not go through the proxy for https either", async () => {
    const script = join(folder, "https.mjs");
    writeFileSync(script, `
      import { loadAwsCredentials } from ${JSON.stringify(pathToFileURL(FILE).href)};
      const uri = "https://127.0.0.1:1234/credentials";
      const env = { AWS_CONTAINER_CREDENTIALS_FULL_URI: uri };
      await loadAwsCredentials({ env }).catch(({ code, message }) => console.log(code, message));
    `);
    const env = { NODE_USE_ENV_PROXY: "1", https_proxy: "http://127.0.0.1:1235" };
    const { stdout } = await runProgram(process.execPath, [script], { env });
    assert.match(stdout, /^invalid_config https_proxy .*NO_PROXY=127\.0\.0\.1\n$/);
  });

  it("an error that is none of ours ends the command with its stack, and not with 0", async () => {
    const preload = join(folder, "broken.mjs");
    writeFileSync(preload, "process.stdout.write = () => { throw new TypeError('no pipe'); };");
    const args = ["--import", pathToFileURL(preload).href, FILE, "--version"];
    const { status, stderr } = await runProgram(process.execPath, args);
    assert.equal(status, 1);
    assert.match(stderr, /TypeError: no pipe/);
  });

  it("a field of a credential that is no text is assigned as JSON", async () => {
    cloud.edge.policies = [
      { host: "db.example.com", credentialType: "Custom", data: { port: 5432, tags: ["a"] } },
    ];
    const { stdout } = await runCommand([
      "credentials", "--server-workload-host", "db.example.com", "--server-workload-port", "5432",
      "--credential-type", "Custom", "--output-format", "sh-export",
    ], { env: cloud.env.ecs() });
    assert.equal(stdout, "export PORT='5432'\nexport TAGS='[\"a\"]'\n");
  });

  it("a forced exchange is not undone by an older one that takes longer", async () => {
    const arrived = Promise.withResolvers<void>();
    const released = Promise.withResolvers<void>();
    cloud.edge.respond("/edge/v1/auth", async () => {
      arrived.resolve();
      await released.promise;
      return { body: '{"accessToken":"older","expiresIn":3600}' };
    }, 1);
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch });
    const slow = client.getToken();
    await arrived.promise;
    const forced = await client.getToken({ forceRefresh: true });
    released.resolve();
    assert.equal((await slow).accessToken, "older");
    assert.equal((await client.getToken()).accessToken, forced.accessToken);
  });

  it("a complaint names no flag where there is none", async () => {
    const { message } = await failure(resolveRegion({ maxAttempts: 0 }), "invalid_config");
    assert.match(message, /^maxAttempts must be /);
  });

  it("a token is kept though a forced exchange that began later has failed", async () => {
    const released = Promise.withResolvers<void>();
    const arrived = Promise.withResolvers<void>();
    cloud.edge.respond("/edge/v1/auth", async () => {
      arrived.resolve();
      await released.promise;
      return { body: '{"accessToken":"slow","expiresIn":3600}' };
    }, 1);
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch });
    const slow = client.getToken();
    await arrived.promise;
    cloud.edge.fail("/edge/v1/auth", { status: 400 }, 1);
    await failure(client.getToken({ forceRefresh: true }), "edge_rejected");
    released.resolve();
    await slow;
    assert.equal((await client.getToken()).accessToken, "slow");
    assert.equal(cloud.edge.requests.length, 2);
  });

  it("a time-out names the step, though another call has done with the same step", async () => {
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch, timeoutMs: 1500 });
    await client.getToken();
    cloud.edge.fail("/edge/v1/credentials", "hang", 1);
    const request = { host: "api.example.com", port: 443, credentialType: "ApiKey" };
    const hangs = failure(client.getCredentials(request), "timeout");
    await client.getCredentials(request);
    assert.match((await hangs).message, /waiting for Aembit: POST \S+\/edge\/v1\/credentials/);
  });

  it("fields that are none of a request's business do not make it fail", async () => {
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch });
    const more = { region: "EU", version: "16", source: "crm", timeoutMs: "none", json: 1 };
    const request = { host: "api.example.com", port: 443, credentialType: "ApiKey", ...more };
    assert.equal((await client.getCredentials(request)).credentialType, "ApiKey");
  });

  it("an output format is taken without the white space around it", async () => {
    const flags = ["--server-workload-host", "api.example.com", "--server-workload-port", "443"];
    const args = ["credentials", ...flags, "--credential-type", "ApiKey", "--output-format"];
    const env = cloud.env.ecs();
    const { stdout } = await runCommand([...args, "sh-export "], { env });
    assert.match(stdout, /^export API_KEY='/);
    const refused = await runCommand([...args, " aws-credential-process"], { env });
    assert.deepEqual([refused.status, refused.stdout], [2, ""]);
  });

  it("doctor fails at the source that was named and is not there", async () => {
    const { status, stdout } = await runCommand(["doctor", "--source", "env"], {
      env: cloud.env.ecs(),
    });
    assert.equal(status, 3);
    assert.match(stdout, /^FAIL env: no_aws_credentials: .*AWS_ACCESS_KEY_ID.* not set$/m);
    assert.match(stdout, /^- +region: not asked$/m);
    assert.deepEqual(cloud.requests(), []);
  });

  it("doctor fails at the exchange, and not at the clock, when Aembit does not answer", async () => {
    cloud.edge.fail("/edge/v1/auth", "hang", 9);
    const args = ["doctor", "--timeout", "0.7"];
    const { status, stdout } = await runCommand(args, { env: cloud.env.ecs() });
    assert.equal(status, 5);
    assert.match(stdout, /^FAIL exchange: timeout: .*waiting for Aembit/m);
    assert.match(stdout, /^- +clock: not asked$/m);
  });

  it("doctor shows the clock also when Aembit refuses", async () => {
    cloud.edge.fail("/edge/v1/auth", { status: 400 }, 9);
    const { stdout } = await runCommand(["doctor"], { env: cloud.env.ecs() });
    assert.match(stdout, /^FAIL exchange: edge_rejected/m);
    assert.match(stdout, /^ok +clock: off by -?[01] s$/m);
  });

  it("a correction that the login has taught is used for the credential at once", async () => {
    const now = (): number => Date.now() - 3_600_000;
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch, now });
    await client.getCredentials({ host: "api.example.com", port: 443, credentialType: "ApiKey" });
    const asked = cloud.edge.requests.map(({ path }) => path);
    assert.deepEqual(asked, ["/edge/v1/auth", "/edge/v1/auth", "/edge/v1/credentials"]);
  });

  it("ECS metadata that could not be read once is read for the next exchange", async () => {
    cloud.tmds.fail(/task$/, { status: 403 }, 1);
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch });
    const parts: boolean[] = [];
    for (const forceRefresh of [false, true]) {
      await client.getToken({ forceRefresh });
      parts.push(cloud.edge.requests.at(-1)?.body.includes("taskMetadata") ?? false);
    }
    assert.deepEqual(parts, [false, true]);
  });

  it("credentials that are good serve on though ECS metadata never could be read", async () => {
    cloud.tmds.fail(/v4/, { status: 403 }, 99);
    const client = new AembitAuth({ env: cloud.env.ecs(), fetch: cloud.fetch });
    await client.getToken();
    cloud.ecs.fail(/credentials/, { status: 400 }, 99);
    await client.getToken({ forceRefresh: true });
    assert.equal(cloud.edge.issued.length, 2);
  });

  it("the IMDS token is kept where its answer does not say for how long", async () => {
    const { accessKeyId, secretAccessKey, sessionToken } = cloud.accounts.ec2;
    // Credentials without an end are read for each exchange.
    cloud.imds.respond(/security-credentials\/.+/, () => ({ body: JSON.stringify({
      Code: "Success", AccessKeyId: accessKeyId, SecretAccessKey: secretAccessKey,
      Token: sessionToken,
    }) }));
    let puts = 0;
    const fetch: typeof globalThis.fetch = async (input, init) => {
      const response = await cloud.fetch(input, init);
      if (init?.method !== "PUT") return response;
      puts += 1;
      return new Response(await response.text());
    };
    const client = new AembitAuth({ env: cloud.env.ec2(), fetch });
    for (let count = 0; count < 3; count += 1) await client.getToken({ forceRefresh: true });
    assert.equal(puts, 1);
  });

  it("keys that the caller gave are cut out of what the metadata endpoint says", async () => {
    const secretAccessKey = "short-SECRET-key";
    cloud.tmds.fail(/v4/, { status: 400, body: JSON.stringify(`you sent ${secretAccessKey}`) });
    const lines: string[] = [];
    const logger = { debug: () => {}, warn: (line: string) => void lines.push(line) };
    const credentials = { accessKeyId: "AKIDEXAMPLE", secretAccessKey };
    await createAuthRequest({ env: cloud.env.ecs(), fetch: cloud.fetch, credentials, logger });
    assert.match(lines.join(), /you sent \[cut\]/);
  });

  it("text made to confuse the search for secrets does not hold the call up", async () => {
    cloud.pod.fail(/credentials/, { status: 400, body: "0 ".repeat(2_000) });
    const env = { ...cloud.env.eksPodIdentity() };
    delete env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"];
    env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "0-0-0-0-0-0-0-0-0-0-0-1";
    await failure(loadAwsCredentials({ env, fetch: cloud.fetch }), "metadata_unavailable");
  });

  for (const after of ["1.5", "-5", "2, 2", "soon 1"]) {
    it(`a Retry-After of "${after}" is ignored, and the pause is the usual one`, async ({ mock }) => {
      mock.method(Math, "random", () => 0.5);
      cloud.edge.fail("/edge/v1/auth", { status: 503, headers: { "Retry-After": after } }, 2);
      const options = { env: cloud.env.ecs(), fetch: cloud.fetch };
      await authenticate(options);
      const [first, , third] = cloud.edge.requests.map(({ at }) => at);
      // Half of 200 and half of 400 ms, less what a timer may come early.
      assert.ok((third ?? 0) - (first ?? 0) > 290);
    });
  }

  it("a session token that is null is left out of what the AWS SDKs are told", async () => {
    const data = { awsAccessKeyId: "AKID", awsSecretAccessKey: "secret", awsSessionToken: null };
    cloud.edge.policies = [{ host: "sts.example.com", credentialType: "AwsStsFederation", data }];
    const { stdout } = await runCommand([
      "credentials", "--server-workload-host", "sts.example.com", "--server-workload-port", "443",
      "--credential-type", "AwsStsFederation", "--output-format", "aws-credential-process",
    ], { env: cloud.env.ecs() });
    assert.ok(!stdout.includes("SessionToken"), stdout);
    assert.match(stdout, /"Version":1,"AccessKeyId":"AKID","SecretAccessKey":"secret"/);
  });

  it("doctor says what it got where ECS metadata cannot be read", async () => {
    cloud.tmds.fail(/v4/, { status: 403 });
    const env = cloud.env.ecs();
    const auto = await runCommand(["doctor"], { env });
    assert.equal(auto.status, 0, auto.stdout);
    assert.match(auto.stdout, /^ok +ECS metadata: none sent$/m);
    assert.match(auto.stderr, /warning: .*ECS .* metadata: .*answered 403/);
    const required = await runCommand(["doctor", "--ecs-metadata", "require"], { env });
    assert.equal(required.status, 3);
    assert.match(required.stdout, /^FAIL ECS metadata: .*answered 403/m);
  });
});
