// A fleet that is started in the same second, and a day of its life in a simulated clock.
const CLIENTS = 1000;
const DAY_MS = 86_400_000;
const LIFE_S = 3600;
const POLL_MS = 5000;

/** The same dice in every run: mulberry32. */
function dice(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * Each client is asked for its token about every 5 seconds, as a busy service would. In the first
 * half of a token's life, where no client may renew, it isn't: a day would be 17 million calls.
 */
export async function simulateFleet({ AembitAuth }, spread) {
  const roll = dice(1);
  const { random } = Math;
  Math.random = spread ? dice(2) : () => 0;
  let nowMs = Date.UTC(2025, 0, 15);
  const startMs = nowMs;
  const exchanges = [];
  let running = 0;
  const answer = JSON.stringify({ accessToken: "token", tokenType: "Bearer", expiresIn: LIFE_S });
  const seconds = new Map();
  const plan = (client, atMs) => {
    const second = Math.floor(atMs / 1000);
    const list = seconds.get(second) ?? [];
    if (list.length === 0) seconds.set(second, list);
    list.push(client);
  };
  try {
    for (let i = 0; i < CLIENTS; i += 1) {
      const client = { fetched: -1 };
      const fetch = async () => {
        client.fetched = nowMs;
        exchanges.push(nowMs - startMs);
        running += 1;
        setImmediate(() => (running -= 1));
        return new Response(answer);
      };
      client.auth = new AembitAuth({
        clientId: "aembit:useast2:a1b2c3:identity:aws_role:01234567-89ab-4cde-8f01-23456789abcd",
        credentials: { accessKeyId: "ASIAEC2FAKE00EXAMPLE", secretAccessKey: "fakeSecretEXAMPLE" },
        region: "eu-west-1",
        env: {},
        now: () => nowMs,
        fetch,
      });
      plan(client, 0);
    }
    for (let second = 0; second * 1000 < DAY_MS; second += 1) {
      const due = seconds.get(second);
      if (due === undefined) continue;
      seconds.delete(second);
      nowMs = startMs + second * 1000;
      const before = exchanges.length;
      await Promise.all(due.map((client) => client.auth.getToken()));
      // Renewals in the background end before the clock moves on.
      while (exchanges.length > before && running > 0) {
        await new Promise((resolve) => setImmediate(resolve));
      }
      for (const client of due) {
        const halfMs = client.fetched + LIFE_S * 500;
        const [fromMs, share] = nowMs < halfMs ? [halfMs, 0] : [nowMs, 0.5];
        plan(client, fromMs + POLL_MS * (share + roll()) - startMs);
      }
    }
  } finally {
    Math.random = random;
  }
  return summary(exchanges);
}

function summary(exchanges) {
  const perHour = Array.from({ length: 24 }, () => 0);
  for (const atMs of exchanges) perHour[Math.floor(atMs / 3_600_000)] += 1;
  return {
    perHour,
    total: exchanges.length,
    later: busiest(exchanges.filter((atMs) => atMs >= 60_000)),
  };
}

function busiest(times) {
  let most = 0;
  let first = 0;
  times.forEach((atMs, i) => {
    while (times[first] <= atMs - 10_000) first += 1;
    most = Math.max(most, i - first + 1);
  });
  return most;
}
