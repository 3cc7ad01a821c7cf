// The figures at the right: memory against FP16, speed, events, quality. Everything shown is the server's own figure.

import { chart } from "./charts.js";
import { byId, el, hear, setPairs, setText } from "./dom.js";
import * as format from "./format.js";

const ITEM_BYTES = { float32: 4, float16: 2, bfloat16: 2 };
const EVENTS = [
  ["evictions", "Evicted"], ["spills", "Spilled to disk"], ["restores", "Restored"],
  ["requantisations", "Shrunk"], ["preemptions", "Preempted"], ["refusals", "Refused"],
];

const or = (shown) => (value) => (value === null || value === undefined ? "–" : shown(value));

let plots = null;
let lastFirstS = null;

export function begin() {
  plots = {
    memory: chart(byId("plot-memory"), byId("read-memory"), [
      { label: "FP16 would need", colour: "--soft-line", fill: "--soft-fill", shown: or(format.bytes) },
      { label: "held", colour: "--accent", fill: "--accent-fill", shown: or(format.bytes) },
    ]),
    speed: chart(byId("plot-speed"), byId("read-speed"), [
      { label: "now", colour: "--accent", fill: "--accent-fill", shown: or((value) => `${value.toFixed(value < 10 ? 1 : 0)} tokens/s`) },
    ]),
    batch: chart(byId("plot-batch"), byId("read-batch"), [
      { label: "running", colour: "--accent", fill: "--accent-fill", shown: or((value) => format.count(value)) },
      { label: "first token", colour: "--soft-line", scale: "s", dots: true, shown: or(format.seconds) },
    ]),
  };
  hear("stats", draw);
  hear("lost", (message) => {
    byId("lost").hidden = false;
    setText(byId("lost"), `No new figures: ${message}`);
  });
}

/** What the tokens held would take in 16 bits; the server counts in the dtype that the model runs in. */
export const halfBytes = (raw, dtype) => (raw * 2) / (ITEM_BYTES[dtype] ?? 2);

function draw({ stats, rates }) {
  byId("lost").hidden = true;
  const half = halfBytes(stats.raw_equivalent_bytes, stats.model_dtype);
  const held = stats.kv_bytes.total;
  drawHero(stats, held, half);
  lastFirstS = rates.first ?? lastFirstS;
  const at = Date.now() / 1000;
  plots.memory.push(at, [half, held]);
  plots.speed.push(at, [rates.perS]);
  plots.batch.push(at, [stats.requests.running, rates.first]);
  if (rates.first === null && lastFirstS !== null) {
    setText(byId("read-batch"), `running ${stats.requests.running} · first token ${format.seconds(lastFirstS)}, last measured`);
  }
  setPairs(byId("events"), EVENTS.map(([kind, label]) => [label, format.count(sum(stats.events[kind]))]));
  drawQuality(stats);
  drawServer(stats);
}

const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

function drawHero(stats, held, half) {
  const { running, memory, disk } = stats.num_conversations;
  const num = running + memory;
  setText(byId("hero-line"), `${format.plural(num, "conversation")} in ${format.bytes(held)}`);
  const saving = half > held ? `, ${format.ratio(half / held)} as much` : ": the first tokens and the newest stay exact, so short talks save nothing";
  setText(byId("hero-sub"), held ? `FP16 would need ${format.bytes(half)}${saving}` : "Nothing is held yet");
  const widest = Math.max(held, half, 1);
  byId("bar-ours").style.width = `${(100 * held) / widest}%`;
  byId("bar-rest").style.width = `${(100 * Math.max(0, half - held)) / widest}%`;
  setPairs(byId("hero-facts"), [
    ["Answering", format.count(running)],
    ["In memory", format.count(memory)],
    ["On disk", format.count(disk)],
    ["Tokens held", format.count(stats.tokens)],
    ["Budget", format.bytes(stats.kv_budget_bytes)],
    ["Budget in use", format.percent(stats.kv_budget_bytes ? stats.kv_committed_bytes / stats.kv_budget_bytes : 0)],
  ]);
}

function drawQuality(stats) {
  const holder = byId("quality");
  const measured = stats.quality ?? [];
  const key = JSON.stringify([measured, stats.kv_format]);
  if (holder.dataset.key === key) return;
  holder.dataset.key = key;
  if (!measured.length) {
    return holder.replaceChildren(el("p", { class: "hint" }, "Not measured yet. ", el("code", {}, "turboserve eval"), " measures what formats cost on this model; the next start shows it here."));
  }
  const ordered = [...measured].sort((a, b) => (b.kv_format === stats.kv_format) - (a.kv_format === stats.kv_format) || a.kl_mean - b.kl_mean);
  holder.replaceChildren(
    el("table", { class: "figures-table" },
      el("thead", {}, el("tr", {}, ["Format", "Mean KL, nats", "Perplexity", "Other top token"].map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ordered.map((one) => el("tr", { class: one.kv_format === stats.kv_format ? "current" : null },
        el("th", { scope: "row" }, one.kv_format),
        el("td", {}, one.kl_mean.toFixed(4)),
        el("td", {}, `${one.perplexity_ratio >= 1 ? "+" : "−"}${(Math.abs(one.perplexity_ratio - 1) * 100).toFixed(1)}%`),
        el("td", {}, format.percent(one.flips)))))),
    el("p", { class: "hint" }, `Against the uncompressed model, over ${format.count(measured[0].tokens)} tokens, by turboserve eval.`));
}

function drawServer(stats) {
  setPairs(byId("server"), [
    ["Model", stats.model],
    ["KV format", stats.kv_format],
    ["Kernels", stats.kv_backend],
    ["Computes in", stats.model_dtype],
    ["Context", `${format.count(stats.max_context_tokens)} tokens`],
    ["A token takes", `${format.bytes(stats.bytes_per_token.compressed)}, FP16 ${format.bytes(halfBytes(stats.bytes_per_token.raw, stats.model_dtype))}`],
    ["Prompt from cache", stats.prefix_tokens.queried ? format.percent(stats.prefix_tokens.hit / stats.prefix_tokens.queried) : "–"],
    ["Waiting", format.plural(stats.requests.waiting, "request")],
    ["Disk store", stats.disk.enabled ? `${format.bytes(stats.disk.bytes)} of ${format.bytes(stats.disk.limit_bytes)}` : "off"],
  ]);
}
