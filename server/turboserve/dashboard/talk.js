// What happens to a conversation: sending, answering, stopping, forking. Draws nothing.

import { ask, chatChunks } from "./api.js";
import { tell } from "./dom.js";
import * as store from "./store.js";

const running = new Map(); // chat id -> AbortController

export const isRunning = (chat) => running.has(chat.id);

export const stop = (chat) => running.get(chat.id)?.abort();

/** Add the user's message and have it answered. */
export function send(chat, text) {
  chat.messages.push({ role: "user", content: text });
  return answer(chat);
}

/** Replace the message at `index`, forget what followed, and have it answered. */
export function editAndSend(chat, index, text) {
  chat.messages.length = index;
  return send(chat, text);
}

/** Forget the answer at `index` and what followed, and have it answered anew. */
export function answerAgain(chat, index) {
  chat.messages.length = index;
  return answer(chat);
}

/** Give the calls of the last message their results. */
export function sendResults(chat, results) {
  for (const [callId, content] of results) chat.messages.push({ role: "tool", content, callId });
  return answer(chat);
}

async function answer(chat) {
  if (isRunning(chat)) return;
  const body = requestBody(chat);
  const message = { role: "assistant", content: "", thinking: "", calls: [], state: "running" };
  const controller = new AbortController();
  running.set(chat.id, controller);
  chat.messages.push(message);
  store.touch(chat);
  tell("changed", chat);
  const begun = performance.now();
  const clock = { begun, first: null };
  try {
    for await (const chunk of chatChunks(body, chat.id, controller.signal)) take(chunk, chat, message, clock);
    message.state = "done";
  } catch (error) {
    message.state = controller.signal.aborted ? "stopped" : "failed";
    if (message.state === "failed") message.error = error.message;
  }
  running.delete(chat.id);
  store.save(chat);
  tell("changed", chat);
  tell("answered", { chat, message });
}

function take(chunk, chat, message, clock) {
  if (chunk.usage) message.figures = figuresOf(chunk.usage, clock);
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, reasoning_content: thinking, tool_calls: calls } = choice.delta;
  if (!content && !thinking && !calls) return;
  clock.first ??= performance.now();
  message.content += content ?? "";
  message.thinking += thinking ?? "";
  for (const piece of calls ?? []) {
    const call = (message.calls[piece.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= piece.id ?? "";
    call.name ||= piece.function.name ?? "";
    call.arguments += piece.function.arguments ?? "";
  }
  tell("delta", { chat, message });
}

function figuresOf(usage, clock) {
  const now = performance.now();
  const first = clock.first ?? now;
  return {
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details.cached_tokens,
    answer: usage.completion_tokens,
    firstS: (first - clock.begun) / 1000,
    perS: usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / Math.max(1e-3, (now - first) / 1000) : null,
    format: usage.turboserve.kv_format,
    bytes: usage.turboserve.kv_bytes.total,
    ratio: usage.turboserve.ratio,
  };
}

function requestBody(chat) {
  const { system, temperature, maxTokens, tools, toolChoice } = chat.settings;
  const body = { messages: chat.messages.filter(isSaid).map(wired), stream: true, stream_options: { include_usage: true } };
  if (system) body.messages.unshift({ role: "system", content: system });
  if (chat.model) body.model = chat.model;
  if (chat.format) body.kv_format = chat.format;
  if (Number.isFinite(temperature)) body.temperature = temperature;
  if (Number.isFinite(maxTokens)) body.max_tokens = maxTokens;
  if (tools?.length) Object.assign(body, { tools, tool_choice: toolChoice ?? "auto" });
  return body;
}

/** An answer that failed before its first word was none. */
const isSaid = (message) => message.role !== "assistant" || message.content || message.calls.length;

function wired(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.callId, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const said = { role: "assistant", content: message.content || null };
  if (message.calls.length) {
    said.tool_calls = message.calls.map((call) => (
      { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }
    ));
  }
  return said;
}

/** A new conversation that ends with the message at `index`; on the server it shares the pages of this one. */
export async function fork(chat, index) {
  const copy = store.forked(chat, index);
  store.save(copy);
  try {
    await ask(`v1/sessions/${chat.id}/fork`, { method: "POST", body: { id: copy.id } });
  } catch {
    // Nothing of it is kept there (any more), or it is being read: then the first message computes what is missing.
  }
  return copy;
}

/** Forget it here and there. */
export async function forget(chat) {
  stop(chat);
  store.remove(chat);
  try {
    await ask(`v1/sessions/${chat.id}`, { method: "DELETE" });
  } catch {
    // It was not kept, or its last request is just ending; then it goes when memory is needed.
  }
}
