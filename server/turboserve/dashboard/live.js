// What the server says of itself, asked for while the page can be seen: statistics, rates from counters, sessions.

import { ask, askJson } from "./api.js";
import { hear, tell } from "./dom.js";

const BUSY_MS = 1000;
const IDLE_MS = 2000;
const TREE_MS = 4000; // its cost grows with the conversations, and it changes with each answer only

let model = null; // of several behind a router: the one that is looked at
let before = null;
let treeAt = -Infinity;
let endPause = null; // while there is one
let isWanted = false; // a look was asked for while another was under way

/** Of several models behind a router, figures are of one. */
export function lookAt(name) {
  if (name === model) return;
  model = name;
  before = null;
  treeAt = -Infinity;
  wake();
}

export async function begin() {
  document.addEventListener("visibilitychange", wake);
  hear("answered", () => {
    treeAt = -Infinity;
    wake();
  });
  for (;;) {
    if (!document.hidden) await look();
    await pause(document.hidden ? Infinity : before?.isBusy ? BUSY_MS : IDLE_MS);
  }
}

function wake() {
  if (endPause) endPause();
  else isWanted = true;
}

async function pause(ms) {
  if (!isWanted) {
    await new Promise((done) => {
      const timer = Number.isFinite(ms) ? setTimeout(done, ms) : 0;
      endPause = () => {
        clearTimeout(timer);
        done();
      };
    });
  }
  endPause = null;
  isWanted = false;
}

async function look() {
  try {
    const [reply, page] = await Promise.all([askJson("v1/kv/stats"), ask("metrics").then((metrics) => metrics.text())]);
    const stats = statsOf(reply);
    const counters = { at: performance.now(), ...countersOf(page), isBusy: stats.requests.running + stats.requests.waiting > 0 };
    tell("stats", { stats, rates: ratesOf(counters, before) });
    before = counters;
    if (performance.now() - treeAt >= TREE_MS) {
      treeAt = performance.now();
      tell("tree", await askJson(model === null ? "v1/kv/tree" : `v1/kv/tree?model=${encodeURIComponent(model)}`));
    }
  } catch (error) {
    before = null;
    tell("lost", error.message);
  }
}

/** A router answers for all its models. Asking it for one that is not loaded would load it, so nothing of it is asked. */
function statsOf(reply) {
  if (model === null) return reply;
  const stats = reply.data.find((one) => one.model === model)?.statistics;
  if (!stats) throw new Error(`${model} is not loaded; the first message loads it.`);
  return stats;
}

function countersOf(page) {
  return {
    tokens: total(page, "turboserve_generation_tokens_total"),
    firstSum: total(page, "turboserve_time_to_first_token_seconds_sum"),
    firstCount: total(page, "turboserve_time_to_first_token_seconds_count"),
  };
}

/** Of all samples of that name, or of those of the model that is looked at. */
function total(page, name) {
  const lines = page.matchAll(new RegExp(`^${name}(\\{[^\\n]*\\})? (\\S+)$`, "gm"));
  const label = model === null ? "" : `model="${model}"`;
  return [...lines].reduce((sum, [, labels = "", value]) => sum + (labels.includes(label) ? Number(value) : 0), 0);
}

/** Since the last look; `first` is the mean time to first token of requests that got theirs meanwhile, or null. */
function ratesOf(now, last) {
  if (!last || now.tokens < last.tokens) return { perS: null, first: null }; // the first look, or the server was restarted
  const num = now.firstCount - last.firstCount;
  return {
    perS: (now.tokens - last.tokens) / ((now.at - last.at) / 1000),
    first: num > 0 ? (now.firstSum - last.firstSum) / num : null,
  };
}
