// What signing and a warm getToken() cost in a process that is running already.
import crypto from "node:crypto";
import { syncBuiltinESMExports } from "node:module";

import { Sha256 } from "@aws-crypto/sha256-js";
import { HttpRequest } from "@smithy/protocol-http";
import { SignatureV4 } from "@smithy/signature-v4";
import aws4 from "aws4";
import { AwsV4Signer } from "aws4fetch";

const REGION = "eu-west-1";
const HOST = `sts.${REGION}.amazonaws.com`;
const FORM = "application/x-www-form-urlencoded; charset=utf-8";
const BODY = "Action=GetCallerIdentity&Version=2011-06-15";
const CREDENTIALS = {
  accessKeyId: "ASIAEC2FAKE00EXAMPLE",
  secretAccessKey: "fakeSecretAccessKeyFakeSecretAccessKeyEX",
  sessionToken: "FakeSessionToken".repeat(60), // role credentials carry about this much
};
const BATCHES = 60;
const BATCH_MS = 25;

/** Notes each hash that `work` computes with node:crypto; `repeat` computes them once more. */
function hashesOf(work) {
  const { createHash, createHmac, hash } = crypto;
  const original = { createHash, createHmac, hash };
  const steps = [];
  const recorded = (create) => (...args) => {
    const step = { create, args, data: [], encoding: undefined };
    steps.push(step);
    const object = create(...args);
    const recorder = {
      update: (data) => {
        step.data.push(data);
        object.update(data);
        return recorder;
      },
      digest: (encoding) => object.digest(step.encoding = encoding),
    };
    return recorder;
  };
  crypto.createHash = recorded(original.createHash);
  crypto.createHmac = recorded(original.createHmac);
  crypto.hash = (...args) => {
    steps.push({ create: original.hash, args, data: undefined });
    return original.hash(...args);
  };
  syncBuiltinESMExports();
  work();
  Object.assign(crypto, original);
  syncBuiltinESMExports();
  const repeat = () => {
    let last;
    for (const { create, args, data, encoding } of steps) {
      last = create(...args);
      if (data === undefined) continue;
      for (const part of data) last.update(part);
      last = last.digest(encoding);
    }
    return last;
  };
  return { repeat, count: steps.length };
}

async function nsPerCall(work, isAsync) {
  let calls = 0;
  const startedMs = performance.now();
  let passedMs = 0;
  while (passedMs < BATCH_MS) {
    for (let i = 0; i < 50; i += 1) {
      const result = work();
      if (isAsync) await result;
    }
    calls += 50;
    passedMs = performance.now() - startedMs;
  }
  return (passedMs * 1e6) / calls;
}

export async function measureSignatures({ signGetCallerIdentity }) {
  // A new second for each signature, as in life: nobody may answer from a cache of signatures.
  let ms = Date.UTC(2025, 0, 15, 1);
  const next = () => new Date(ms = Date.UTC(2025, 0, 15, 1) + ((ms + 1000) % 36_000_000));
  const stamp = () => next().toISOString().replace(/[-:]|\.\d+/g, "");
  const ours = () => signGetCallerIdentity(CREDENTIALS, REGION, next());
  const hashes = hashesOf(ours);
  const smithy = new SignatureV4({
    credentials: CREDENTIALS, region: REGION, service: "sts", sha256: Sha256, applyChecksum: false,
  });
  const contestants = [
    { name: "its hashes alone", work: hashes.repeat },
    { name: "signGetCallerIdentity, signing key kept", work: ours },
    {
      name: "aws4, signing key cached",
      work: () => aws4.sign({
        service: "sts", region: REGION, method: "POST", path: "/", host: HOST, body: BODY,
        extraHeadersToIgnore: { "content-length": true },
        headers: { "Content-Type": FORM, "X-Amz-Date": stamp() },
      }, CREDENTIALS),
    },
    {
      name: "aws4fetch",
      isAsync: true,
      work: () => new AwsV4Signer({
        ...CREDENTIALS, service: "sts", region: REGION, url: `https://${HOST}/`, body: BODY,
        headers: { "Content-Type": FORM }, datetime: stamp(), allHeaders: true,
      }).sign(),
    },
    {
      name: "@smithy/signature-v4, signing key cached",
      isAsync: true,
      work: () => smithy.sign(new HttpRequest({
        method: "POST", protocol: "https:", hostname: HOST, path: "/", body: BODY,
        headers: { host: HOST, "content-type": FORM },
      }), { signingDate: next() }),
    },
  ].map((contestant) => ({ ...contestant, ns: [] }));
  for (const { work, isAsync } of contestants) {
    for (let i = 0; i < 5; i += 1) await nsPerCall(work, isAsync);
  }
  for (let batch = 0; batch < BATCHES; batch += 1) {
    for (const contestant of contestants) {
      contestant.ns.push(await nsPerCall(contestant.work, contestant.isAsync));
    }
  }
  const bare = contestants[0].ns;
  const rows = contestants.map(({ name, ns }) => ({
    name,
    ratios: ns.map((value, batch) => value / bare[batch]),
    perSecond: ns.map((value) => 1e9 / value),
  }));
  return { rows, hashes: hashes.count };
}

export async function measureWarm({ AembitAuth }) {
  const accessToken = "x".repeat(800);
  const answer = JSON.stringify({ accessToken, tokenType: "Bearer", expiresIn: 3600 });
  const client = new AembitAuth({
    clientId: "aembit:useast2:a1b2c3:identity:aws_role:01234567-89ab-4cde-8f01-23456789abcd",
    credentials: CREDENTIALS,
    region: REGION,
    env: {},
    fetch: async () => new Response(answer),
  });
  await client.getToken();
  const getToken = () => client.getToken();
  const nothing = async () => answer;
  const ns = [];
  const ratios = [];
  for (let batch = 0; batch < BATCHES; batch += 1) {
    const bare = await nsPerCall(nothing, true);
    ns.push(await nsPerCall(getToken, true));
    ratios.push(ns.at(-1) / bare);
  }
  return { ns, ratios };
}
