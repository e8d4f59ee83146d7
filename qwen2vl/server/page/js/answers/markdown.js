/**
 * Shows the text of an answer as Markdown. Answers are not trusted: HTML in them is shown as text,
 * pictures as links, and what marked writes passes through DOMPurify.
 */

import { Marked } from "../../vendor/marked.esm.js";
import DOMPurify from "../../vendor/purify.es.mjs";

const marked = new Marked({
  gfm: true,
  breaks: true,
  async: false,
  renderer: {
    html: (/** @type {any} */ { text }) => escapeHtml(text),
    image: (/** @type {any} */ { href, text }) =>
      `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,
    checkbox: (/** @type {any} */ { checked }) => (checked ? "[x] " : "[ ] "),
  },
});

const ALLOWED_TAGS = [
  ...["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "ul", "ol", "li"],
  ...["strong", "em", "del", "code", "pre", "a"],
  ...["table", "thead", "tbody", "tr", "th", "td"],
];
const OPTIONS = {
  ALLOWED_TAGS,
  ALLOWED_ATTR: ["href", "start", "align"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (/** @type {Element} */ node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** @type {Record<string, string>} */
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

/** @param {string} text */
function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (one) => ENTITIES[one]);
}

/**
 * Returns a text as nodes that are safe to insert.
 * @param {string} text
 * @returns {DocumentFragment}
 */
export function renderMarkdown(text) {
  const html = /** @type {string} */ (marked.parse(text));
  return /** @type {any} */ (DOMPurify).sanitize(html, OPTIONS);
}
