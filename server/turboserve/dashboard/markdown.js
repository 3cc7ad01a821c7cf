// A model's text as HTML that cannot do harm: parsed by marked, cleaned by DOMPurify, held down by the page's policy.

import { Marked } from "./vendor/marked.js";

const escaped = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

// HTML in an answer is shown as it was written: a model that explains a tag means its text. Images become their words.
const renderer = {
  html: ({ text, block }) => (block ? `<p>${escaped(text.trim())}</p>` : escaped(text)),
  image: ({ text, href }) => escaped(text || href),
};

const marked = new Marked({ gfm: true, breaks: true, async: false, renderer });

// Nothing that loads, styles or submits: an image's address alone could carry a conversation to another host.
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "li", "ol", "p", "pre",
    "s", "strong", "sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "start", "align", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** A DocumentFragment; code and tables can be scrolled by keyboard. */
export function rendered(text) {
  const fragment = DOMPurify.sanitize(marked.parse(text), ALLOWED);
  // A link's definition or a lone sign is nothing in Markdown, but it is all that was said.
  if (!fragment.textContent.trim()) fragment.replaceChildren(Object.assign(document.createElement("p"), { textContent: text }));
  for (const wide of fragment.querySelectorAll("pre, table")) wide.setAttribute("tabindex", "0");
  for (const heading of fragment.querySelectorAll("h1, h2, h3, h4, h5, h6")) lowered(heading);
  return fragment;
}

/** Answers' headings lie under the page's own. */
function lowered(heading) {
  const level = Math.min(6, Number(heading.tagName[1]) + 2);
  const lower = document.createElement(`h${level}`);
  lower.append(...heading.childNodes);
  heading.replaceWith(lower);
}
