/** Builds elements without strings of HTML: text is always text. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns the element of index.html with an id.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return /** @type {T} */ (found);
}

/**
 * Creates an element.
 * @param {string} tag
 * @param {Record<string, any>} [properties]  `class`, `text`, `on` (listeners); others are attributes
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/**
 * Creates an SVG element.
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {SVGElement}
 */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/**
 * @template {Element} T
 * @param {T} node
 * @param {Record<string, any>} properties
 * @param {(Node | string | null | undefined | false)[]} children
 * @returns {T}
 */
function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const type in value) node.addEventListener(type, value[type]);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((one) => one !== null && one !== undefined && one !== false));
  return node;
}

/**
 * Returns an icon of index.html; it is hidden from screen readers.
 * @param {string} name
 */
export function icon(name) {
  return svg(
    "svg",
    { class: "icon", "aria-hidden": "true" },
    svg("use", { href: `#icon-${name}` }),
  );
}

/**
 * Creates a button with an icon; its label is read by screen readers and shown as a tooltip.
 * @param {string} name
 * @param {string} label
 * @param {(event: MouseEvent) => void} onClick
 * @param {Record<string, any>} [properties]
 */
export function iconButton(name, label, onClick, properties = {}) {
  const given = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return element("button", { ...given, ...properties, on: { click: onClick } }, icon(name));
}

/**
 * Tells screen readers what has happened.
 * @param {string} text
 */
export function announce(text) {
  byId("announcer").textContent = text;
}

/**
 * Shows a sentence in an element, which is hidden without one. The same sentence is told once.
 * @param {HTMLElement} node
 * @param {string} sentence
 */
export function showSentence(node, sentence) {
  if (node.textContent !== sentence) node.textContent = sentence;
  node.hidden = sentence === "";
}

/**
 * Copies a text; `button` confirms it for a moment.
 * @param {string} text
 * @param {HTMLElement} [button]
 */
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // pages that are not served by localhost or https have no clipboard
  }
  announce("Copied.");
  if (!button) return;
  button.dataset.copied = "";
  setTimeout(() => delete button.dataset.copied, 1500);
}

/** @param {string} text */
function copyBySelection(text) {
  const area = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  const parent = document.querySelector("dialog[open]") ?? document.body;
  const focused = document.activeElement;
  parent.append(area);
  /** @type {HTMLTextAreaElement} */ (area).value = text;
  /** @type {HTMLTextAreaElement} */ (area).select();
  document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) focused.focus();
}

/**
 * Returns a number with separators: 1,024.
 * @param {number} value
 */
export function formatNumber(value) {
  return value.toLocaleString("en-US");
}

/**
 * Returns a number and its noun: "1 token", "20 tokens".
 * @param {number} value
 * @param {string} noun
 */
export function count(value, noun) {
  return `${formatNumber(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/** Returns a new id; crypto.randomUUID is missing on pages without TLS. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
