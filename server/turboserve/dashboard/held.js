// What each of the caller's conversations holds: pages of the open one, a bar for each, the tree of shared beginnings.

import { byId, el, hear, setPairs, svg, tell } from "./dom.js";
import * as format from "./format.js";
import * as store from "./store.js";

const MAX_ROWS = 50;
const MAX_PAGES_DRAWN = 240;
const ROW_PX = 22;
const TREE_WIDTH = 340;
const LABEL_WIDTH = 118;

let tree = { sessions: [], nodes: [], page_tokens: 0 };
let open = null;
let isAllShown = false;

export function begin() {
  hear("tree", (seen) => {
    if (JSON.stringify(seen) === JSON.stringify(tree)) return; // nothing to draw, and nothing for the processor to do
    tree = seen;
    draw();
  });
  hear("chats", draw); // titles may have changed
}

export function mark(chat) {
  open = chat.id;
  draw();
}

function draw() {
  drawThis(tree.sessions.find((session) => session.id === open));
  drawAll();
  drawTree();
}

/** A conversation's title here; of other clients' ones, the id. */
function nameOf(session) {
  const chat = store.find(session.id);
  return chat ? `${chat.title}${chat.isFork ? ", fork" : ""}` : session.id;
}

// --- the open conversation

function drawThis(session) {
  const holder = byId("this");
  if (!session) return holder.replaceChildren(el("p", { class: "hint" }, "The server holds nothing of it yet."));
  const facts = el("dl", { class: "facts" });
  const { pages } = session;
  setPairs(facts, [
    ["Tokens", format.count(session.tokens)],
    ["Where", session.tier === "running" ? "answering" : session.tier],
    ["Format", session.kv_format],
    ["Takes", format.bytes(session.tier === "disk" ? session.disk_bytes : session.kv_bytes.total)],
    ["Compressed pages", pages ? format.count(pages.compressed) : "–"],
    ["Of them shared", pages ? format.count(pages.shared) : "–"],
    ["Exact tokens", pages ? format.count(pages.exact_tokens) : "–"],
    ["Copy on disk", session.disk_bytes ? format.bytes(session.disk_bytes) : "no"],
  ]);
  holder.replaceChildren(...(pages ? [pageStrip(session)] : []), facts);
}

/** A square for each page, in the order of its tokens: shared beginnings first, exact ends outlined. */
function pageStrip({ pages }) {
  const drawn = Math.min(pages.compressed, MAX_PAGES_DRAWN);
  const squares = Array.from({ length: drawn }, (_, i) => el("i", { class: i < pages.shared ? "page shared" : "page" }));
  if (pages.exact_tokens) squares.push(el("i", { class: "page exact" }));
  const words = `${format.plural(pages.compressed, "compressed page")}, ${pages.shared} of them shared, and ${format.plural(pages.exact_tokens, "exact token")}`;
  return el("div", {},
    el("div", { class: "pages", role: "img", "aria-label": words }, squares),
    el("p", { class: "key" }, el("i", { class: "page" }), "compressed ", el("i", { class: "page shared" }), "shared ", el("i", { class: "page exact" }), "exact"));
}

// --- all of them

function drawAll() {
  const holder = byId("all");
  const sessions = [...tree.sessions].sort((a, b) => weight(b) - weight(a));
  if (!sessions.length) return holder.replaceChildren(el("p", { class: "hint" }, "None of yours is held."));
  const most = Math.max(...sessions.map(weight));
  const shown = sessions.slice(0, isAllShown ? MAX_ROWS : 8);
  const more = Math.min(sessions.length, MAX_ROWS) - shown.length;
  holder.replaceChildren(
    el("p", { class: "key" }, el("i", { class: "page" }), "compressed ", el("i", { class: "page exact" }), "exact ", el("i", { class: "page disk" }), "on disk"),
    el("ul", { class: "held" }, shown.map((session) => heldRow(session, most))),
    more > 0 ? el("button", { type: "button", class: "quiet", onclick: () => { isAllShown = true; drawAll(); } }, `Show ${more} more`) : "");
}

const weight = (session) => (session.tier === "disk" ? session.disk_bytes : session.kv_bytes.total);

function heldRow(session, most) {
  const { compressed, exact, slack, uncompressed } = session.kv_bytes;
  const parts = session.tier === "disk" ? [["disk", session.disk_bytes]] : [["compressed", compressed], ["exact", exact + uncompressed], ["slack", slack]];
  const bar = svg("svg", { class: "held-bar", viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" }, stacked(parts, most));
  const chat = store.find(session.id);
  const name = el(chat ? "button" : "span", { class: "held-name", type: chat ? "button" : null, onclick: chat ? () => tell("open", chat) : undefined }, nameOf(session));
  const where = session.tier === "memory" ? "" : session.tier === "disk" ? ", on disk" : ", answering";
  return el("li", { class: session.id === open ? "held-row open" : "held-row" },
    name, el("span", { class: "held-figure" }, `${format.bytes(weight(session))}, ${format.count(session.tokens)} tokens${where}`), bar);
}

function stacked(parts, most) {
  let x = 0;
  return parts.filter(([, size]) => size > 0).map(([kind, size]) => {
    const width = (100 * size) / most;
    x += width;
    return svg("rect", { class: `fill-${kind}`, x: x - width, y: 0, width, height: 6 });
  });
}

// --- the tree

/** Tokens go to the right; a line that parts is a beginning that is stored once. */
function drawTree() {
  const holder = byId("tree");
  const { rows, depth } = laidOut(tree.nodes);
  if (!rows.length) return holder.replaceChildren(el("p", { class: "hint" }, "Conversations that begin alike share their pages. None is held yet."));
  const parting = rows.filter((row) => row.children.length + row.node.sessions.length > 1).length;
  const height = depth * ROW_PX + 6;
  const most = Math.max(...rows.map((row) => row.node.tokens));
  // The root of the length: the first, shared tokens stay visible beside conversations that are a hundred times as long.
  const x = (tokens) => 3 + Math.sqrt(tokens / most) * (TREE_WIDTH - LABEL_WIDTH - 12);
  const words = `Prefix tree of ${format.plural(tree.sessions.length, "conversation")}: ${format.plural(parting, "beginning")} shared by several`;
  holder.replaceChildren(
    el("p", { class: "reading" }, words),
    el("div", { class: "tree-scroll", tabindex: 0, role: "region", "aria-label": "Prefix tree" }, svg("svg", { class: "tree", viewBox: `0 0 ${TREE_WIDTH} ${height}`, role: "img", "aria-label": words }, rows.flatMap((row) => branch(row, x)))));
}

function laidOut(nodes) {
  const rows = nodes.map((node) => ({ node, children: [], y: 0, from: 0, parent: null }));
  rows.forEach((row) => {
    row.parent = row.node.parent === null ? null : rows[row.node.parent];
    row.parent?.children.push(row);
    row.from = row.parent?.node.tokens ?? 0;
  });
  let depth = 0;
  const place = (row) => {
    row.children.forEach(place);
    const own = row.node.sessions.map(() => depth++);
    row.lines = own;
    const around = [...row.children.map((child) => child.y), ...own];
    row.y = around.length ? (Math.min(...around) + Math.max(...around)) / 2 : depth++;
  };
  rows.filter((row) => !row.parent).forEach(place);
  return { rows, depth: Math.max(1, depth) };
}

function branch(row, x) {
  const { node, parent, children, lines } = row;
  const at = (line) => line * ROW_PX + ROW_PX / 2;
  const isShared = children.length + node.sessions.length > 1;
  const start = x(row.from);
  const bend = parent ? `M${start} ${at(parent.y)}V${at(row.y)}H${x(node.tokens)}` : `M${start} ${at(row.y)}H${x(node.tokens)}`;
  const drawn = [svg("path", { class: isShared ? "edge shared" : "edge", d: bend }, svg("title", {}, `${format.count(node.tokens - row.from)} tokens, ${node.kv_format}`))];
  node.sessions.forEach((id, i) => {
    const session = tree.sessions.find((one) => one.id === id);
    const y = at(lines[i]);
    if (lines[i] !== row.y) drawn.push(svg("path", { class: "edge", d: `M${x(node.tokens)} ${at(row.y)}V${y}` }));
    const name = session ? nameOf(session) : id;
    drawn.push(
      svg("circle", { class: `leaf ${session?.tier ?? ""}`, cx: x(node.tokens), cy: y, r: 3.5 }),
      svg("text", { class: id === open ? "leaf-name open" : "leaf-name", x: x(node.tokens) + 9, y: y + 3.5 }, svg("title", {}, `${name}, ${format.count(node.tokens)} tokens`), short(name, x(node.tokens))));
  });
  return drawn;
}

/** What fits between the leaf and the edge, at about 5.6 units a character. */
function short(name, at) {
  const most = Math.max(6, Math.floor((TREE_WIDTH - at - 12) / 5.6));
  return name.length > most ? `${name.slice(0, most - 1)}…` : name;
}
