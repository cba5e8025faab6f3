// Prints the project's figures as Markdown: `npm install && npm run bench`. Everything that is
// compared is measured in the same run, in turns, because absolute times differ from machine to
// machine and from minute to minute. RUNS=5 makes it quick.
import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

import { buildSync, transformSync } from "esbuild";

import { simulateFleet } from "./fleet.mjs";
import { measureSignatures, measureWarm } from "./speed.mjs";

const HERE = dirname(fileURLToPath(import.meta.url));
const ROOT = join(HERE, "..");
const SOURCE = join(ROOT, "aembit-auth.ts");
const OUT = join(HERE, "node_modules/.cache/aembit-auth");
const COMPILED = join(OUT, "aembit-auth.js");
const SDK_BUNDLE = join(OUT, "peer-sdk.mjs");
const RUNS = Number(process.env.RUNS ?? 25);

const sorted = (values) => values.toSorted((a, b) => a - b);
const quantile = (values, share) => {
  const list = sorted(values);
  return list[Math.round(share * (list.length - 1))];
};
const median = (values) => quantile(values, 0.5);
const table = (head, rows) => {
  const line = (cells) => `| ${cells.join(" | ")} |`;
  const rule = head.map((_, i) => (i === 0 ? "---" : "---:"));
  return [head, rule, ...rows].map(line).join("\n");
};
const ratio = (value) => value.toFixed(2);
const note = (text) => process.stderr.write(`${text}\n`);

// --- What is compared ---

/** Parts of the SDK are CommonJS, and in a bundle nobody gives them `require`. */
const REQUIRE = 'import { createRequire } from "node:module";'
  + "const require = createRequire(import.meta.url);";

function build() {
  rmSync(OUT, { recursive: true, force: true });
  mkdirSync(OUT, { recursive: true });
  const tsc = createRequire(join(ROOT, "package.json")).resolve("typescript/package.json");
  const { bin } = JSON.parse(readFileSync(tsc, "utf8"));
  // Types are checked elsewhere; this is only about what runs.
  const compilerOptions = { noEmit: false, noCheck: true, rootDir: ROOT, outDir: OUT };
  const config = { extends: join(ROOT, "tsconfig.json"), compilerOptions, include: [SOURCE] };
  writeFileSync(join(OUT, "tsconfig.json"), JSON.stringify(config));
  const args = ["-p", OUT];
  execFileSync(process.execPath, [join(dirname(tsc), bin.tsc), ...args], { stdio: "inherit" });
  writeFileSync(join(OUT, "package.json"), '{ "type": "module" }\n');
  buildSync({
    entryPoints: [join(HERE, "peer-sdk.mjs")],
    bundle: true,
    minify: true,
    platform: "node",
    format: "esm",
    outfile: SDK_BUNDLE,
    banner: { js: REQUIRE },
    logLevel: "error",
  });
}

const nodeBinary = (major) => join(HERE, `node_modules/node${major}/bin/node`);

function programs() {
  const least = [join(HERE, "least.mjs")];
  const cache = (major) => ({ NODE_COMPILE_CACHE: join(OUT, `compile-cache-${major}`) });
  return [
    { name: "least program", node: 24, args: least },
    { name: "this file, compiled", node: 24, args: [COMPILED] },
    { name: "this file, .ts, compile cache", node: 24, args: [SOURCE], env: cache(24) },
    { name: "this file, .ts", node: 24, args: [SOURCE] },
    { name: "aws4 + fetch", node: 24, args: [join(HERE, "peer-aws4.mjs")] },
    { name: "AWS SDK + signature-v4 + fetch", node: 24, args: [join(HERE, "peer-sdk.mjs")] },
    { name: "the same, bundled and minified", node: 24, args: [SDK_BUNDLE] },
    { name: "least program", node: 26, args: least },
    { name: "this file, compiled", node: 26, args: [COMPILED] },
    { name: "this file, .ts, compile cache", node: 26, args: [SOURCE], env: cache(26) },
    { name: "this file, .ts", node: 26, args: [SOURCE] },
  ].map((program) => ({ ...program, times: [], rss: 0 }));
}

// --- (a) From process start to token ---

async function startCloud() {
  const args = [join(ROOT, "fixtures/cloud.ts")];
  const child = spawn(nodeBinary(26), args, { stdio: ["pipe", "pipe", "inherit"] });
  child.stdout.setEncoding("utf8");
  let text = "";
  while (!text.includes("\n")) text += (await once(child.stdout, "data"))[0];
  return { env: JSON.parse(text).env, stop: () => child.stdin.end() };
}

/** One run: milliseconds until the process has ended, and what it wrote. */
async function run({ name, node, args, env }, place, before = []) {
  const startedMs = performance.now();
  const child = spawn(nodeBinary(node), [...before, ...args], { env: { ...place, ...env } });
  let stdout = "";
  let stderr = "";
  child.stdout.on("data", (data) => (stdout += data));
  child.stderr.on("data", (data) => (stderr += data));
  const [status] = await once(child, "close");
  const ms = performance.now() - startedMs;
  if (status !== 0 || !/^\S{20,}\n$/.test(stdout)) {
    throw new Error(`${name} on Node ${node} failed (${status}): ${stdout}${stderr}`);
  }
  return { ms, stderr };
}

async function measureStart(place) {
  const list = programs();
  const hook = ["--require", join(HERE, "memory.cjs")];
  for (const program of list) {
    await run(program, place); // fills the compile cache
    const peaks = [];
    // The peak depends on when the collector happens to run, so a few runs would not do.
    for (let i = 0; i < 15; i += 1) {
      peaks.push(Number(/maxRSS=(\d+)/.exec((await run(program, place, hook)).stderr)[1]));
    }
    program.rss = median(peaks);
  }
  for (let round = 0; round < RUNS; round += 1) {
    // The order turns, so that no program always runs right after the same one.
    const turn = round % list.length;
    for (const program of [...list.slice(turn), ...list.slice(0, turn)]) {
      program.times.push((await run(program, place)).ms);
    }
  }
  return list.map((program) => {
    const { name, node, times, rss } = program;
    const least = list.find((other) => other.node === node);
    const ratios = times.map((ms, round) => ms / least.times[round]);
    return [name, node, ratio(median(ratios)), spreadOf(ratios), ratio(rss / least.rss),
      `${Math.round(median(times))} ms`, `${Math.round(rss / 1024)} MiB`];
  });
}

// --- (d) Bytes ---

const diskBytes = (path) =>
  1024 * parseInt(execFileSync("du", ["-sk", path], { encoding: "utf8" }), 10);

function measureBytes() {
  const source = readFileSync(SOURCE);
  const compiled = readFileSync(COMPILED);
  const options = { loader: "ts", minify: true, format: "esm", target: "node20" };
  const minified = transformSync(source.toString(), options).code;
  const kib = (bytes) => `${(bytes / 1024).toFixed(1)} KiB`;
  const row = (name, bytes) => [name, kib(bytes.length), kib(gzipSync(bytes, { level: 9 }).length)];
  const folder = (name) => join(HERE, "node_modules", name);
  const others = ["aws4", "aws4fetch"].map((name) =>
    [`node_modules of ${name} (signs only)`, kib(diskBytes(folder(name))), ""]);
  // All that is installed and is neither a tool nor another peer has come with the SDK.
  const notSdk = /^(\.|@?esbuild|aws4|node\d)/;
  const sdk = readdirSync(folder("")).filter((name) => !notSdk.test(name))
    .reduce((sum, name) => sum + diskBytes(folder(name)), 0);
  return [
    row("aembit-auth.ts", source),
    row("compiled (tsc)", compiled),
    row("minified (esbuild)", Buffer.from(minified)),
    row("AWS SDK peer, bundled and minified", readFileSync(SDK_BUNDLE)),
    ["node_modules of the AWS SDK peer", kib(sdk), ""],
    ...others,
  ];
}

// --- All of it ---

const print = (title, ...parts) => console.log(`### ${title}\n\n${parts.join("\n\n")}\n`);
const spreadOf = (ratios) => `${ratio(quantile(ratios, 0.1))} to ${ratio(quantile(ratios, 0.9))}`;

build();
const cloud = await startCloud();
const head = ["", "Node", "time", "p10 to p90", "peak memory", "time here", "memory here"];
for (const [place, title] of [["ecs", "ECS"], ["ec2", "EC2"]]) {
  note(`start, ${title} …`);
  const text = `Times what the least program takes on the same Node; ${RUNS} rounds, in turns.`;
  const rows = await measureStart(cloud.env[place]);
  print(`From process start to token, ${title}`, text, table(head, rows));
}
cloud.stop();

const library = await import(COMPILED);
note("signatures …");
const { rows, hashes } = await measureSignatures(library);
print(
  "Signing GetCallerIdentity",
  `Times what the ${hashes} hashes of one signature cost by themselves, with a new signing key each time.`,
  table(["", "time", "p10 to p90", "a second, here"], rows.map(({ name, ratios, perSecond }) =>
    [name, ratio(median(ratios)), spreadOf(ratios), Math.round(median(perSecond))])),
);
const warm = await measureWarm(library);
print(
  "A warm `getToken()`",
  `${Math.round(median(warm.ns))} ns here: ${ratio(median(warm.ratios))} times `
    + "the `await` of an async function that does nothing.",
);
const sizes = table(["", "size", "gzip -9"], measureBytes());
print("Size", "What is copied, installed or bundled.", sizes);

note("fleet …");
const fleets = [];
for (const spread of [true, false]) {
  const { perHour, later, total } = await simulateFleet(library, spread);
  const name = spread ? "with the random share" : "without it";
  fleets.push([name, total, perHour.slice(1, 6).join(" "), perHour.slice(-5).join(" "), later]);
}
print(
  "A fleet",
  "1,000 clients, started in the same second; a day, with tokens of one hour.",
  table(["", "exchanges", "in hours 2 to 6", "in hours 20 to 24", "busiest 10 s later"], fleets),
);
