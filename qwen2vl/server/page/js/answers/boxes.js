/**
 * Boxes, points and quads of an answer: drawn over the pictures, and listed with their coordinates.
 * A phrase, its shape and its row are linked: each shows the others when it is pointed at, has the
 * focus, or is tapped.
 */

import { copyText, element, iconButton, svg } from "../dom.js";
import { objectUrl } from "../compose/media.js";

/** @typedef {import("../compose/media.js").Media} Media */
/**
 * @typedef {object} Shape
 * @property {"box" | "point" | "quad"} type
 * @property {string | null} label
 * @property {number[]} normalized  in thousandths of the upright picture
 * @property {{param: string, coordinates: number[]}[]} pixels  of each picture as it was sent
 */

const COLORS = 6; // of style.css
const SEVERAL = "The model does not say which picture it means, so the boxes are drawn on each.";

/**
 * Builds the pictures with shapes, and the list of coordinates.
 * @param {Shape[]} shapes
 * @param {Media[]} pictures  on which they are drawn
 * @param {Record<string, string>} paths  path of a picture in the request -> its id
 */
export function shapesFigure(shapes, pictures, paths) {
  const figure = element("figure", { class: "shapes" });
  const shown = pictures.map((one) => overlay(one, shapes));
  figure.append(element("div", { class: "canvases" }, ...shown));
  if (pictures.length > 1) figure.append(element("p", { class: "note", text: SEVERAL }));
  const pathOf = (/** @type {Media} */ picture) =>
    Object.keys(paths).find((path) => paths[path] === picture.id);
  const coordinates = shapes.map((shape) =>
    pictures.map((picture) => pixelsOf(shape, pathOf(picture)) ?? shape.normalized),
  );
  const firsts = shapes.map((shape, index) => coordinates[index][0] ?? shape.normalized);
  const rows = shapes.map((shape, index) => row(shape, index, firsts[index]));
  const copyAll = element("button", { type: "button", class: "link", text: "Copy all as JSON" });
  copyAll.addEventListener("click", () => {
    const all = shapes.map(({ type, label }, shape) => {
      if (pictures.length < 2) return { type, label, coordinates: firsts[shape] };
      const each = pictures.map(({ name }, i) => ({ name, coordinates: coordinates[shape][i] }));
      return { type, label, pictures: each };
    });
    copyText(JSON.stringify(all, null, 2), copyAll);
  });
  figure.append(
    element("ul", { class: "rows" }, ...rows),
    element(
      "figcaption",
      { class: "note" },
      `Coordinates in ${unitOf(pictures)}. `,
      shapes.length > 1 && copyAll,
    ),
  );
  return figure;
}

/** @param {Media[]} pictures */
function unitOf(pictures) {
  if (pictures.length === 0) return "thousandths of width and height";
  return `pixels of ${pictures.length > 1 ? "picture 1" : "the picture"} as sent`;
}

/**
 * @param {Shape} shape
 * @param {string | undefined} path
 */
function pixelsOf(shape, path) {
  return shape.pixels.find((one) => one.param === path)?.coordinates;
}

/**
 * Draws the shapes over one picture. The browser shows it upright, so they are drawn from the
 * thousandths of the upright picture.
 * @param {Media} picture
 * @param {Shape[]} shapes
 */
function overlay(picture, shapes) {
  const { width, height } = picture;
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": "Boxes of the answer",
  });
  shapes.forEach((shape, index) => drawing.append(mark(shape, index, width, height)));
  const image = element("img", { src: objectUrl(picture), alt: `Picture ${picture.name}` });
  const canvas = element("div", { class: "canvas" }, image, drawing);
  canvas.style.setProperty("--ratio", String(width / height));
  return canvas;
}

/**
 * @param {Shape} shape
 * @param {number} index
 * @param {number} width
 * @param {number} height
 */
function mark(shape, index, width, height) {
  const points = shape.normalized.map((n, i) => (n / 1000) * (i % 2 ? height : width));
  const outline = geometry(shape.type, points, Math.max(width, height));
  const group = svg("g", {
    class: `mark color-${index % COLORS}`,
    role: "img",
    tabindex: "0",
    "data-shapes": index,
    "aria-label": `${nameOf(shape, index)}: ${points.map(Math.round).join(", ")}`,
  });
  group.append(outline("halo"), outline("line"));
  return group;
}

/**
 * Returns a function that draws one outline in a class.
 * @param {Shape["type"]} type
 * @param {number[]} points
 * @param {number} side
 * @returns {(name: string) => SVGElement}
 */
function geometry(type, points, side) {
  if (type === "point") {
    const [cx, cy] = points;
    return (name) => svg("circle", { class: name, cx, cy, r: side * 0.015 });
  }
  if (type === "quad") return (name) => svg("polygon", { class: name, points: points.join(" ") });
  const [x1, y1, x2, y2] = points;
  const box = { x: Math.min(x1, x2), y: Math.min(y1, y2) };
  const size = { width: Math.abs(x2 - x1), height: Math.abs(y2 - y1) };
  return (name) => svg("rect", { class: name, ...box, ...size });
}

/**
 * @param {Shape} shape
 * @param {number} index
 * @param {number[]} coordinates
 */
function row(shape, index, coordinates) {
  const name = nameOf(shape, index);
  const text = `[${coordinates.join(", ")}]`;
  const copy = iconButton("copy", `Copy the coordinates of ${name}`, (event) =>
    copyText(text, /** @type {HTMLElement} */ (event.currentTarget)),
  );
  return element(
    "li",
    { class: `color-${index % COLORS}`, "data-shapes": index },
    element("span", { class: "swatch", "aria-hidden": "true" }),
    element("span", { class: "label", text: name }),
    element("code", { text: coordinates.map((one) => Math.round(one)).join(", ") }),
    copy,
  );
}

/**
 * @param {Shape} shape
 * @param {number} index
 */
function nameOf(shape, index) {
  return shape.label || `${shape.type} ${index + 1}`;
}

/**
 * Links what belongs to one shape within an answer.
 * @param {HTMLElement} root
 */
export function linkShapes(root) {
  const linked = () =>
    /** @type {NodeListOf<HTMLElement>} */ (root.querySelectorAll("[data-shapes]"));
  /** @param {Element | null} origin */
  const show = (origin) => {
    const wanted = new Set(origin?.getAttribute("data-shapes")?.split(" ") ?? []);
    for (const one of linked()) {
      const isActive = one.dataset.shapes?.split(" ").some((index) => wanted.has(index)) ?? false;
      one.classList.toggle("active", isActive);
    }
    root.classList.toggle("has-active", wanted.size > 0);
  };
  /** @param {Event} event */
  const onEnter = (event) => show(/** @type {Element} */ (event.target).closest("[data-shapes]"));
  for (const type of ["pointerover", "focusin", "click"]) root.addEventListener(type, onEnter);
  for (const type of ["pointerleave", "focusout"]) root.addEventListener(type, () => show(null));
}
