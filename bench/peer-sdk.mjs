// The AWS SDK's default chain finds the credentials and its signer signs; fetch does the rest.
import { Sha256 } from "@aws-crypto/sha256-js";
import { fromNodeProviderChain } from "@aws-sdk/credential-providers";
import { HttpRequest } from "@smithy/protocol-http";
import { SignatureV4 } from "@smithy/signature-v4";

import { base64, login } from "./least.mjs";

const { env } = process;

async function regionOfInstance() {
  const imds = env.AWS_EC2_METADATA_SERVICE_ENDPOINT;
  const ttl = { "x-aws-ec2-metadata-token-ttl-seconds": "21600" };
  const response = await fetch(`${imds}/latest/api/token`, { method: "PUT", headers: ttl });
  const headers = { "x-aws-ec2-metadata-token": await response.text() };
  return (await fetch(`${imds}/latest/meta-data/placement/region`, { headers })).text();
}

async function taskMetadata() {
  const base = env.ECS_CONTAINER_METADATA_URI_V4;
  if (!base) return undefined;
  const [containerMetadata, task] = await Promise.all([base64(base), base64(`${base}/task`)]);
  return { containerMetadata, taskMetadata: task };
}

async function sign(credentials, region) {
  const signer = new SignatureV4({
    credentials,
    region,
    service: "sts",
    sha256: Sha256,
    applyChecksum: false,
  });
  const hostname = `sts.${region}.amazonaws.com`;
  const { headers } = await signer.sign(new HttpRequest({
    method: "POST",
    protocol: "https:",
    hostname,
    path: "/",
    headers: { host: hostname, "content-type": "application/x-www-form-urlencoded; charset=utf-8" },
    body: "Action=GetCallerIdentity&Version=2011-06-15",
  }));
  return {
    "Content-Type": headers["content-type"],
    "X-Amz-Date": headers["x-amz-date"],
    "X-Amz-Security-Token": headers["x-amz-security-token"],
    Authorization: headers.authorization,
  };
}

const [credentials, region, ecs] = await Promise.all([
  fromNodeProviderChain()(),
  env.AWS_REGION ?? regionOfInstance(),
  taskMetadata(),
]);
login({ credentials, region, ecs }, sign);
