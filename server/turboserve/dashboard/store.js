// Conversations as this browser keeps them: texts and choices, in localStorage. The server keeps their caches only.
//
// { id, title, isFork, model, format, settings: { system, temperature, maxTokens, tools, toolChoice }, at, messages }
// message: { role, content, thinking, calls: [{ id, name, arguments }], callId, state, error, figures }

import { tell } from "./dom.js";

const PREFIX = "turboserve.chat.";
const TITLE_LENGTH = 60;

const known = new Map();

export function loadAll() {
  for (let i = 0; i < localStorage.length; i += 1) {
    const name = localStorage.key(i);
    if (name.startsWith(PREFIX)) read(name);
  }
}

function read(name) {
  try {
    const chat = JSON.parse(localStorage.getItem(name));
    for (const message of chat.messages) if (message.state === "running") message.state = "stopped";
    known.set(chat.id, chat);
  } catch {
    localStorage.removeItem(name); // not ours any more, or cut off when the storage was full
  }
}

/** Newest first. */
export const all = () => [...known.values()].sort((a, b) => b.at - a.at);

export const find = (id) => known.get(id);

/** Random, so that a server that several people use never mixes two conversations up; a valid session id. */
export const newId = () => `ui-${[...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("")}`;

/** Not kept before its first message. */
export function blank(like = {}) {
  return { id: newId(), title: "", model: like.model ?? "", format: like.format ?? "", settings: {}, at: Date.now(), messages: [] };
}

export function save(chat) {
  if (!chat.messages.length) return;
  if (!chat.title) chat.title = titleOf(chat);
  known.set(chat.id, chat);
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    tell("problem", "This browser's storage is full: delete conversations to keep new ones.");
  }
  tell("chats");
}

/** Its last use is now, which brings it to the top of the list. */
export function touch(chat) {
  chat.at = Date.now();
  save(chat);
}

export function remove(chat) {
  known.delete(chat.id);
  localStorage.removeItem(PREFIX + chat.id);
  tell("chats");
}

/** A copy that ends with the message at `index`. */
export function forked(chat, index) {
  const copy = structuredClone({ ...chat, messages: chat.messages.slice(0, index + 1) });
  return { ...copy, id: newId(), isFork: true, at: Date.now() };
}

function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  const line = (first?.content ?? "").trim().split("\n")[0];
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line || "Conversation";
}
