// Puts the page together: which conversation is open, the key, the theme, views on small screens, the keyboard.

import { forgetKey, hasKey, useKeyQuestion } from "./api.js";
import { redraw } from "./charts.js";
import * as chatView from "./chat.js";
import * as chats from "./chats.js";
import { byId, hear, setText, tell } from "./dom.js";
import * as held from "./held.js";
import * as live from "./live.js";
import * as panel from "./panel.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import * as talk from "./talk.js";

const RETRY_MS = 2000;

let chat = null;

/** Show a conversation; null: a new one. The address names it, so that reloading and going back work. */
function open(wanted) {
  chat = wanted ?? store.blank(chat ?? {});
  const address = chat.messages.length ? `#${chat.id}` : location.pathname + location.search;
  if (location.hash.slice(1) !== (chat.messages.length ? chat.id : "")) history.pushState(null, "", address);
  view("chat"); // before its end is scrolled to: what is not seen has no height
  chatView.show(chat);
  settings.show(chat);
  chats.mark(chat);
  held.mark(chat);
}

function openFromAddress() {
  open(store.find(location.hash.slice(1)) ?? null);
}

// --- the key

function askForKey(wasWrong) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-problem").hidden = !wasWrong;
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = () => {
      byId("change-key").hidden = false;
      resolve(field.value.trim());
    };
  });
}

// --- theme and views

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function nameTheme() {
  setText(byId("theme-name"), isDark() ? "Light" : "Dark");
}

function changeTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("turboserve.theme", theme);
  nameTheme();
  redraw();
}

/** On narrow screens one of the three columns is seen at a time. */
function view(name) {
  document.body.dataset.view = name;
  for (const tab of document.querySelectorAll("[data-goto]")) {
    if (tab.dataset.goto === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

// --- keyboard

function pressed(event) {
  if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey) return;
  const isTyping = event.target.closest("input, textarea, select");
  const act = event.altKey ? ALT_KEYS[event.code] : event.key === "Escape" ? () => talk.stop(chat) : !isTyping && PLAIN_KEYS[event.key];
  if (!act) return;
  if (event.key !== "Escape") event.preventDefault();
  act();
}

const PLAIN_KEYS = {
  "/": () => byId("input").focus(),
  "?": () => byId("help-dialog").showModal(),
};
const ALT_KEYS = {
  KeyN: begun,
  KeyE: () => chatView.editLast(),
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
};

function begun() {
  open(null);
  byId("input").focus();
}

function step(by) {
  const next = chats.neighbour(by);
  if (next) open(next);
}

function begin() {
  useKeyQuestion(askForKey);
  store.loadAll();
  chats.begin(open);
  settings.begin();
  panel.begin();
  held.begin();
  chatView.begin();
  hear("open", open);
  hear("problem", (text) => setText(byId("announce"), text));
  hear("changed", (changed) => {
    if (changed !== chat) return;
    chats.mark(chat);
    if (location.hash.slice(1) !== chat.id) history.replaceState(null, "", `#${chat.id}`);
  });
  byId("new-chat").addEventListener("click", begun);
  byId("theme").addEventListener("click", changeTheme);
  byId("help").addEventListener("click", () => byId("help-dialog").showModal());
  byId("change-key").hidden = !hasKey();
  byId("change-key").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
  for (const tab of document.querySelectorAll("[data-goto]")) tab.addEventListener("click", () => view(tab.dataset.goto));
  document.addEventListener("keydown", pressed);
  addEventListener("popstate", openFromAddress);
  addEventListener("pagehide", () => store.all().filter(talk.isRunning).forEach(store.save));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); redraw(); });
  nameTheme();
  openFromAddress();
  byId("input").focus();
  beginLive();
}

/** A server that is still starting is asked again. */
async function beginLive() {
  for (;;) {
    try {
      await settings.loadModels();
      return live.begin();
    } catch (error) {
      tell("lost", error.message);
      await new Promise((done) => setTimeout(done, RETRY_MS));
    }
  }
}

begin();
