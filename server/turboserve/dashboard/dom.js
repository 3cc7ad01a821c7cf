// Making elements, and telling other modules what happened. Texts become text nodes: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id, which the page is known to have. */
export const byId = (id) => document.getElementById(id);

/** `el("button", { class: "quiet", onclick: f }, "Copy")`; false, null and undefined attributes are left out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** One of the symbols at the top of the page. */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/** A button with a symbol whose name is read out and shown when pointed at. */
export function iconButton(name, label, onclick) {
  return el("button", { type: "button", class: "quiet small", "aria-label": label, title: label, onclick }, icon(name));
}

/** Set a text only where it changed: an unchanged page costs no layout, and no screen reader reads it again. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Rows of a definition list: [[term, description], ...]. Built once, then only the texts change. */
export function setPairs(list, rows) {
  const terms = rows.map(([term]) => term).join("\n");
  if (list.dataset.terms !== terms) {
    list.dataset.terms = terms;
    list.replaceChildren(...rows.map(([term]) => el("div", {}, el("dt", {}, term), el("dd"))));
  }
  const shown = list.querySelectorAll("dd");
  rows.forEach(([, text], i) => setText(shown[i], text));
}

// --- what modules tell each other

const bus = new EventTarget();

export function tell(name, detail) {
  bus.dispatchEvent(new CustomEvent(name, { detail }));
}

export function hear(name, heard) {
  bus.addEventListener(name, (event) => heard(event.detail));
}
