// The least program that gets a token: the same requests in the same order as aembit-auth.ts, and
// nothing else. No checks, no retries, no time-outs, no hidden secrets. It is the floor to compare
// with, and with `sign` from elsewhere the body of the peers.
import { createHash, createHmac } from "node:crypto";

const { env } = process;
const STS_BODY = "Action=GetCallerIdentity&Version=2011-06-15";
const FORM = "application/x-www-form-urlencoded; charset=utf-8";

const sha256 = (data) => createHash("sha256").update(data).digest("hex");
const hmac = (key, data) => createHmac("sha256", key).update(data).digest();

function sign({ AccessKeyId, SecretAccessKey, Token }, region) {
  const date = new Date().toISOString().replace(/[-:]|\.\d+/g, "");
  const scope = `${date.slice(0, 8)}/${region}/sts/aws4_request`;
  const names = "content-type;host;x-amz-date;x-amz-security-token";
  const canonical = `POST\n/\n\ncontent-type:${FORM}\nhost:sts.${region}.amazonaws.com\n`
    + `x-amz-date:${date}\nx-amz-security-token:${Token}\n\n${names}\n${sha256(STS_BODY)}`;
  const steps = [scope.slice(0, 8), region, "sts", "aws4_request"];
  const key = steps.reduce(hmac, `AWS4${SecretAccessKey}`);
  const toSign = `AWS4-HMAC-SHA256\n${date}\n${scope}\n${sha256(canonical)}`;
  const signature = hmac(key, toSign).toString("hex");
  return {
    "Content-Type": FORM,
    "X-Amz-Date": date,
    "X-Amz-Security-Token": Token,
    Authorization: `AWS4-HMAC-SHA256 Credential=${AccessKeyId}/${scope}, SignedHeaders=${names}, `
      + `Signature=${signature}`,
  };
}

export const base64 = async (url) =>
  Buffer.from(await (await fetch(url)).arrayBuffer()).toString("base64");

export async function onEcs() {
  const base = env.ECS_CONTAINER_METADATA_URI_V4;
  const [credentials, containerMetadata, taskMetadata] = await Promise.all([
    fetch(env.AWS_CONTAINER_CREDENTIALS_FULL_URI).then((response) => response.json()),
    base64(base),
    base64(`${base}/task`),
  ]);
  return { credentials, region: env.AWS_REGION, ecs: { containerMetadata, taskMetadata } };
}

export async function onEc2() {
  const imds = env.AWS_EC2_METADATA_SERVICE_ENDPOINT;
  const ttl = { "x-aws-ec2-metadata-token-ttl-seconds": "21600" };
  const response = await fetch(`${imds}/latest/api/token`, { method: "PUT", headers: ttl });
  const headers = { "x-aws-ec2-metadata-token": await response.text() };
  const read = async (path) =>
    (await fetch(`${imds}/latest/meta-data/${path}`, { headers })).text();
  const roles = "iam/security-credentials/";
  const [region, document] = await Promise.all([
    read("placement/region"),
    read(roles).then((role) => read(roles + role)),
  ]);
  return { credentials: JSON.parse(document), region };
}

/** Sends what was signed, and prints the token. */
export async function login({ credentials, region, ecs }, signed) {
  const stsGetCallerIdentity = { headers: await signed(credentials, region), region };
  const aws = { stsGetCallerIdentity, ...(ecs && { ecs }) };
  const response = await fetch(`${env.AEMBIT_EDGE_BASE_URL}/edge/v1/auth`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/json" },
    body: JSON.stringify({ clientId: env.AEMBIT_CLIENT_ID, client: { aws } }),
  });
  console.log((await response.json()).accessToken);
}

if (process.argv[1].endsWith("least.mjs")) {
  login(await (env.AWS_CONTAINER_CREDENTIALS_FULL_URI ? onEcs() : onEc2()), sign);
}
