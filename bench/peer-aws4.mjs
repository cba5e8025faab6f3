// aws4 signs but finds no credentials: the requests are those of the least program.
import aws4 from "aws4";
import { login, onEc2, onEcs } from "./least.mjs";

function sign({ AccessKeyId, SecretAccessKey, Token }, region) {
  const { headers } = aws4.sign({
    service: "sts",
    host: `sts.${region}.amazonaws.com`,
    extraHeadersToIgnore: { "content-length": true },
    region,
    method: "POST",
    path: "/",
    headers: { "Content-Type": "application/x-www-form-urlencoded; charset=utf-8" },
    body: "Action=GetCallerIdentity&Version=2011-06-15",
  }, { accessKeyId: AccessKeyId, secretAccessKey: SecretAccessKey, sessionToken: Token });
  const { Host, "Content-Length": length, ...sent } = headers;
  return sent;
}

login(await (process.env.AWS_CONTAINER_CREDENTIALS_FULL_URI ? onEcs() : onEc2()), sign);
