// Which model and KV format a conversation has, and its settings: instructions, sampling, tools.

import { askJson } from "./api.js";
import { byId, el, setText } from "./dom.js";
import * as format from "./format.js";
import { lookAt } from "./live.js";
import * as store from "./store.js";

const FORMATS = ["balanced", "compact", "tiny", "8/4", "4/4", "4/3", "3/3", "f16"];

let chat = null;
let models = [];

const modelField = byId("model");
const formatField = byId("format");

export async function loadModels() {
  models = (await askJson("v1/models")).data;
  modelField.replaceChildren(...models.map((model) => el("option", { value: model.id }, model.id)));
  show(chat);
}

/** A router's models have a state; asked about figures, it wants to know of which model. */
const isRouter = () => models.some((model) => "status" in model);

const modelOf = (shown) => models.find((model) => model.id === shown.model) ?? models[0];

export function show(shown) {
  chat = shown;
  const model = modelOf(chat);
  if (model) {
    modelField.value = model.id;
    if (isRouter()) lookAt(model.parent ?? model.id);
  }
  const own = model?.kv_format ? `${model.kv_format} (server)` : "server";
  const names = FORMATS.includes(chat.format) || !chat.format ? FORMATS : [...FORMATS, chat.format];
  formatField.replaceChildren(el("option", { value: "" }, own), ...names.map((name) => el("option", { value: name }, name)));
  formatField.value = chat.format;
  const { system, temperature, maxTokens, tools, toolChoice } = chat.settings;
  byId("set-system").value = system ?? "";
  byId("set-temperature").value = temperature ?? "";
  byId("set-max-tokens").value = maxTokens ?? "";
  byId("set-tools").value = tools ? JSON.stringify(tools, null, 1) : "";
  byId("set-tool-choice").value = toolChoice ?? "auto";
  say("");
  modelField.title = model?.max_model_len ? `Context: ${format.count(model.max_model_len)} tokens` : "";
}

function say(problem) {
  byId("set-problem").hidden = !problem;
  setText(byId("set-problem"), problem);
}

export function begin() {
  modelField.addEventListener("change", () => {
    chat.model = modelField.value;
    show(chat);
    store.save(chat);
  });
  formatField.addEventListener("change", () => {
    chat.format = formatField.value;
    store.save(chat);
  });
  byId("tune").addEventListener("click", () => {
    const form = byId("settings");
    form.hidden = !form.hidden;
    byId("tune").setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) byId("set-system").focus();
  });
  byId("settings").addEventListener("submit", (event) => event.preventDefault());
  byId("settings").addEventListener("change", read);
}

function read() {
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const settings = {
    system: byId("set-system").value.trim() || undefined,
    temperature: number("set-temperature"),
    maxTokens: number("set-max-tokens"),
    toolChoice: byId("set-tool-choice").value,
  };
  const tools = byId("set-tools").value.trim();
  try {
    settings.tools = tools ? JSON.parse(tools) : undefined;
    if (tools && !Array.isArray(settings.tools)) throw new SyntaxError("not a list");
    say("");
  } catch {
    say("The tools are no JSON list, so the ones from before are kept.");
    settings.tools = chat.settings.tools;
  }
  chat.settings = settings;
  store.save(chat);
}
