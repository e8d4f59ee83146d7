/** Writes an answer as text, with its boxes as they are shown: phrases, and pixels. */

import { splitText } from "./phrases.js";

/** @typedef {import("../client/conversation.js").Answer} Answer */

/**
 * Returns the text of an answer without the coordinates in it.
 * @param {Answer} answer
 */
export function plainText({ text, grounding }) {
  const { pieces } = splitText(text, grounding, 0);
  return pieces.map((piece) => (typeof piece === "string" ? piece : piece.phrase)).join("");
}

/**
 * Returns a line for each box, point and quad: "blue cross: box 118, 64, 143, 90", in pixels of the
 * first picture as sent; in thousandths where the picture is not known.
 * @param {Answer} answer
 */
export function shapeLines({ grounding }) {
  return grounding.map(({ type, label, pixels, normalized }, index) => {
    const known = pixels[0]?.coordinates;
    const numbers = (known ?? normalized).map((one) => Math.round(one)).join(", ");
    return `${label || `${type} ${index + 1}`}: ${type} ${numbers}${known ? "" : " thousandths"}`;
  });
}
