// The list at the side: which conversations there are, and which one is open.

import { byId, el, hear, icon, setText } from "./dom.js";
import * as format from "./format.js";
import * as store from "./store.js";
import * as talk from "./talk.js";

let openId = null;
let onOpen = null;

/** `open(chat)` shows one; null: begin a new one. */
export function begin(open) {
  onOpen = open;
  hear("chats", draw);
  hear("changed", draw);
}

export function mark(chat) {
  openId = chat.id;
  draw();
}

/** The one before or after the open one in the list. */
export function neighbour(step) {
  const chats = store.all();
  const at = chats.findIndex((chat) => chat.id === openId);
  return chats[at < 0 ? 0 : at + step];
}

function draw() {
  const chats = store.all();
  byId("no-chats").hidden = chats.length > 0;
  const focused = document.activeElement?.dataset?.chat;
  byId("chats").replaceChildren(...chats.map(row));
  if (focused) byId("chats").querySelector(`[data-chat="${focused}"]`)?.focus();
}

function row(chat) {
  const state = talk.isRunning(chat) ? "answering" : `${chat.isFork ? "fork, " : ""}${format.ago(Date.now() - chat.at)}`;
  return el("li", { class: chat.id === openId ? "chat-row open" : "chat-row" },
    el("button", { type: "button", class: "chat-open", "data-chat": chat.id, "aria-current": chat.id === openId ? "true" : null, onclick: () => onOpen(chat) },
      el("span", { class: "chat-title" }, chat.title),
      el("span", { class: "chat-state" }, state)),
    el("button", { type: "button", class: "quiet small chat-drop", "aria-label": `Delete ${chat.title}`, title: "Delete", onclick: () => drop(chat) }, icon("trash")));
}

function drop(chat) {
  if (!confirm(`Delete "${chat.title}"? Its text and its cache are gone then.`)) return;
  talk.forget(chat);
  setText(byId("announce"), "Deleted.");
  if (chat.id === openId) onOpen(null);
}
