/**
 * Finds the phrases of boxes in a rendered answer. The text has the coordinates behind each phrase,
 * "red square(296,43),(567,297)": they are known from the grounding of the answer, so they are
 * looked for as they are, and replaced by the phrase alone, as a button that shows its box.
 */

import { element } from "../dom.js";

/** @typedef {import("./boxes.js").Shape} Shape */
/** @typedef {{phrase: string, shapes: number[]} | string} Piece */

/**
 * Replaces the phrases and coordinates in a rendered answer by buttons.
 * @param {Node} root
 * @param {Shape[]} shapes
 */
export function linkPhrases(root, shapes) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  /** @type {Text[]} */
  const texts = [];
  while (walker.nextNode()) texts.push(/** @type {Text} */ (walker.currentNode));
  let next = 0;
  for (const text of texts) {
    const { pieces, found } = splitText(text.data, shapes, next);
    if (found === next) continue;
    next = found;
    text.replaceWith(...pieces.map(toNode));
  }
}

/**
 * Splits a text at the phrases of the shapes from `first` on.
 * @param {string} text
 * @param {Shape[]} shapes
 * @param {number} first
 * @returns {{pieces: Piece[], found: number}}  found: the first shape that was not found
 */
export function splitText(text, shapes, first) {
  /** @type {Piece[]} */
  const pieces = [];
  let rest = text;
  let index = first;
  for (; index < shapes.length; index++) {
    const written = coordinates(shapes[index]);
    const at = rest.indexOf(written);
    if (at < 0) break;
    const before = rest.slice(0, at);
    const label = shapes[index].label ?? "";
    const last = pieces.at(-1);
    rest = rest.slice(at + written.length);
    if (typeof last === "object" && before.trim().replace(",", "") === "") {
      last.shapes.push(index); // a further box of the same phrase
    } else if (label && before.trimEnd().endsWith(label)) {
      const begin = before.trimEnd().slice(0, -label.length);
      pieces.push(begin, { phrase: label, shapes: [index] });
    } else {
      const space = before === "" || /\s$/.test(before) ? "" : " ";
      pieces.push(before + space, {
        phrase: `${shapes[index].type} ${index + 1}`,
        shapes: [index],
      });
    }
  }
  pieces.push(rest);
  return { pieces: pieces.filter((piece) => piece !== ""), found: index };
}

/**
 * Returns the coordinates as the model writes them.
 * @param {Shape} shape
 */
function coordinates({ normalized }) {
  const points = [];
  for (let i = 0; i < normalized.length; i += 2) {
    points.push(`(${normalized[i]},${normalized[i + 1]})`);
  }
  return points.join(",");
}

/** @param {Piece} piece */
function toNode(piece) {
  if (typeof piece === "string") return document.createTextNode(piece);
  const properties = {
    type: "button",
    class: `phrase color-${piece.shapes[0] % 6}`,
    "data-shapes": piece.shapes.join(" "),
    text: piece.phrase,
  };
  return element("button", properties);
}
