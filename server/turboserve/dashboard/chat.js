// The conversation in the middle: its messages, and the field below. Draws; what happens is talk.js's.

import { byId, el, hear, iconButton, setText, tell } from "./dom.js";
import * as format from "./format.js";
import { rendered } from "./markdown.js";
import * as talk from "./talk.js";

const DRAW_INTERVAL_MS = 80; // an answer is parsed anew for each drawing; twelve a second look fluent
const NEAR_END_PX = 80;
// Of what the embedded model was trained on, so that a first try of it is answered; any other model can as well.
const SUGGESTIONS = [
  "What does textwrap.shorten do?",
  "Explain what a KV cache is.",
  "Write a Python function that computes the Fibonacci numbers.",
];

let chat = null;
let drawn = []; // one { message, node, body } for each message
let pending = 0;

const scroll = byId("scroll");
const list = byId("messages");
const input = byId("input");

export function show(shown) {
  chat = shown;
  draw();
  scroll.scrollTop = scroll.scrollHeight;
}

function draw() {
  setText(byId("title"), chat.title || "New conversation");
  drawn = chat.messages.map(drawnMessage);
  list.replaceChildren(...(drawn.length ? drawn.map(({ node }) => node) : [welcome()]));
  showRunning();
}

function showRunning() {
  const running = talk.isRunning(chat);
  byId("send").hidden = running;
  byId("stop").hidden = !running;
  list.setAttribute("aria-busy", String(running));
}

function welcome() {
  return el("div", { class: "welcome" },
    el("p", { class: "welcome-line" }, "Ask the model something"),
    el("p", { class: "hint" }, "Its KV cache is compressed while you talk; the figures beside show what that saves."),
    el("div", { class: "suggestions" }, SUGGESTIONS.map((text) => (
      el("button", { type: "button", class: "suggestion", onclick: () => submit(text) }, text)
    ))),
  );
}

// --- one message

function drawnMessage(message, index) {
  const body = el("div", { class: "body" });
  const node = el("article", { class: `message ${message.role}` }, body);
  fill(body, message, index);
  return { message, node, body };
}

function fill(body, message, index) {
  if (message.role === "assistant") return fillAnswer(body, message, index);
  const who = message.role === "tool" ? "Result of a call" : "You";
  const text = el("div", { class: "text plain" }, message.content);
  body.replaceChildren(
    el("h3", { class: message.role === "tool" ? "who" : "sr" }, who),
    text,
    message.role === "user" ? actions(iconButton("edit", "Edit and send again", () => edit(body, index)), ...common(message, index)) : "",
  );
}

function fillAnswer(body, message, index) {
  const isRunning = message.state === "running";
  const folds = [...body.querySelectorAll("details")].map((fold) => fold.open); // what the reader opened stays open
  body.replaceChildren(
    el("h3", { class: "sr" }, "Answer"),
    message.thinking ? thinking(message) : "",
    message.content ? el("div", { class: "text" }, rendered(message.content)) : "",
    ...message.calls.map((call) => callFold(call)),
    isRunning ? el("p", { class: "waiting" }, el("span", { class: "sr" }, "The model is answering"), el("i"), el("i"), el("i")) : "",
    message.state === "stopped" ? el("p", { class: "note" }, "Stopped.") : "",
    message.state === "failed" ? el("p", { class: "problem" }, message.error) : "",
    isRunning ? "" : foot(message, index),
  );
  body.querySelectorAll("details").forEach((fold, i) => (fold.open = folds[i] ?? false));
  const isLast = index === chat.messages.length - 1;
  if (message.calls.length && isLast && !isRunning) body.append(resultsForm(message));
}

function thinking(message) {
  const words = message.thinking.split(/\s+/).filter(Boolean).length;
  return el("details", { class: "fold" },
    el("summary", {}, `Thinking, ${format.plural(words, "word")}`),
    el("div", { class: "text" }, rendered(message.thinking)));
}

function callFold(call) {
  return el("details", { class: "fold call" },
    el("summary", {}, "Calls ", el("code", {}, call.name)),
    el("pre", { tabindex: 0 }, pretty(call.arguments)));
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not complete yet
  }
}

function resultsForm(message) {
  const fields = message.calls.map((call) => el("textarea", { rows: 2, required: true, "aria-label": `Result of ${call.name}`, placeholder: `Result of ${call.name}` }));
  const submitted = (event) => {
    event.preventDefault();
    talk.sendResults(chat, message.calls.map((call, i) => [call.id, fields[i].value]));
  };
  return el("form", { class: "results", onsubmit: submitted }, fields, el("button", { class: "primary" }, "Send results"));
}

function foot(message, index) {
  const figures = message.figures;
  const said = figures && [
    format.plural(figures.answer, "token"),
    figures.perS && `${figures.perS.toFixed(figures.perS < 10 ? 1 : 0)}/s`,
    `first after ${format.seconds(figures.firstS)}`,
    `${format.count(figures.cached)} of ${format.count(figures.prompt)} prompt tokens from cache`,
    `${figures.format}, ${format.bytes(figures.bytes)}`,
  ].filter(Boolean).join(" · ");
  return actions(
    ...common(message, index),
    iconButton("again", "Answer again", () => begun(talk.answerAgain(chat, index))),
    said ? el("span", { class: "figures" }, said) : "",
  );
}

function common(message, index) {
  return [
    iconButton("copy", "Copy the text", () => copy(message.content)),
    iconButton("fork", "Fork the conversation here", async () => tell("open", await talk.fork(chat, index))),
  ];
}

const actions = (...buttons) => el("div", { class: "actions" }, buttons);

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    setText(byId("announce"), "Copied.");
  } catch {
    setText(byId("announce"), "This browser does not let the page copy; select the text instead.");
  }
}

function edit(body, index) {
  if (talk.isRunning(chat)) return;
  const field = el("textarea", { class: "edit", "aria-label": "Your message", rows: 3 });
  field.value = chat.messages[index].content;
  const done = () => fill(body, chat.messages[index], index);
  const send = () => field.value.trim() && begun(talk.editAndSend(chat, index, field.value.trim()));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") done();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
    if (event.key === "Escape" || (event.key === "Enter" && !event.shiftKey)) event.preventDefault();
    event.stopPropagation();
  });
  body.replaceChildren(field, el("div", { class: "buttons" },
    el("button", { type: "button", class: "quiet", onclick: done }, "Cancel"),
    el("button", { type: "button", class: "primary", onclick: send }, "Send again")));
  field.focus();
}

/** Open the newest of the user's messages for editing. */
export function editLast() {
  const index = chat.messages.findLastIndex((message) => message.role === "user");
  if (index >= 0) edit(drawn[index].body, index);
}

// --- sending

export function submit(text = input.value) {
  const wanted = text.trim();
  if (!wanted || talk.isRunning(chat)) return;
  input.value = "";
  fit();
  begun(talk.send(chat, wanted));
}

/** The page follows the answer that was just asked for, wherever the reader was. */
function begun() {
  scroll.scrollTop = scroll.scrollHeight;
  input.focus();
}

function fit() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 220)}px`;
}

export function begin() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener("input", fit);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  byId("stop").addEventListener("click", () => talk.stop(chat));
  hear("changed", (changed) => changed === chat && keepingPlace(draw));
  hear("delta", ({ chat: of }) => of === chat && drawSoon());
  hear("answered", ({ chat: of, message }) => of === chat && announce(message));
}

function drawSoon() {
  pending ||= setTimeout(() => {
    pending = 0;
    const last = drawn.at(-1);
    if (last?.message.state === "running") keepingPlace(() => fillAnswer(last.body, last.message, drawn.length - 1));
  }, DRAW_INTERVAL_MS);
}

/** Who reads the end sees the new end; who scrolled up is left there. */
function keepingPlace(change) {
  const isAtEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END_PX;
  change();
  if (isAtEnd) scroll.scrollTop = scroll.scrollHeight;
}

function announce(message) {
  const words = { done: "The answer is complete.", stopped: "The answer was stopped.", failed: `The answer failed: ${message.error}` };
  setText(byId("announce"), words[message.state]);
}
