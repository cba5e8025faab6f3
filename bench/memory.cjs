// Loaded with --require: says how much memory the process had at its peak.
process.on("exit", () => {
  require("node:fs").writeSync(2, `maxRSS=${process.resourceUsage().maxRSS}\n`);
});
