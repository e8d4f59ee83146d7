/**
 * The pictures and videos of the next question: their order, their tokens, and the slider that
 * limits the size of its pictures. The slider begins at the limit of the model for each question.
 */

import { announce, byId, count, element, formatNumber, iconButton } from "../dom.js";
import { objectUrl } from "./media.js";
import { currentModel, modelEvents } from "../client/models.js";
import { resizedSize, tokensOf, withMaxPixels } from "./resize.js";

/** @typedef {import("./media.js").Media} Media */
/** @typedef {import("./resize.js").PixelLimits} PixelLimits */

const STEPS = 100; // of the slider, on a logarithmic scale

export class Attachments extends EventTarget {
  /** @type {Media[]} */
  items = [];
  /** @type {number | null} */
  maxPixels = null; // of its pictures; null: the model's
  #list = byId("attachments");
  #slider = /** @type {HTMLInputElement} */ (byId("picture-size"));

  constructor() {
    super();
    this.#slider.max = String(STEPS);
    this.#slider.addEventListener("input", () => this.#limit());
    modelEvents.addEventListener("load", () => this.#render());
  }

  /** @param {Media[]} media */
  add(media) {
    this.items.push(...media);
    this.#render();
  }

  /**
   * Shows other ones in their place.
   * @param {Media[]} media
   * @param {number | null} maxPixels
   */
  replace(media, maxPixels) {
    this.items = [...media];
    this.maxPixels = maxPixels;
    this.#render();
  }

  /**
   * @param {number} index
   * @param {number} by  places to the right
   */
  #move(index, by) {
    const [moved] = this.items.splice(index, 1);
    this.items.splice(index + by, 0, moved);
    this.#render();
    announce(`${moved.name} is now number ${index + by + 1}.`);
    const item = this.#list.children[index + by];
    const buttons = /** @type {HTMLButtonElement[]} */ ([
      ...item.querySelectorAll(".caption button"),
    ]);
    const [same, other] = by < 0 ? buttons : buttons.reverse();
    (same.disabled ? other : same).focus();
  }

  /** @param {number} index */
  #remove(index) {
    const [removed] = this.items.splice(index, 1);
    this.#render();
    announce(`${removed.name} is removed.`);
    const next = /** @type {HTMLElement | null} */ (this.#list.querySelector("button"));
    (next ?? byId("question")).focus();
  }

  #render() {
    this.#list.replaceChildren(...this.items.map((media, index) => this.#item(media, index)));
    this.#list.hidden = this.items.length === 0;
    const hasPictures = this.items.some((one) => one.kind === "image");
    byId("size-row").hidden = !hasPictures || !currentModel(); // the slider has the model's limits
    this.#showTokens();
    this.dispatchEvent(new Event("change"));
  }

  /**
   * @param {Media} media
   * @param {number} index
   */
  #item(media, index) {
    const last = this.items.length - 1;
    const isPlayed = media.kind === "video" && media.type.startsWith("video/");
    const preview = isPlayed
      ? element("video", {
          src: objectUrl(media),
          muted: true,
          preload: "metadata",
          "aria-hidden": "true",
        })
      : element("img", { src: objectUrl(media), alt: "" });
    const move = (
      /** @type {string} */ name,
      /** @type {string} */ where,
      /** @type {number} */ by,
    ) =>
      iconButton(name, `Move ${media.name} ${where}`, () => this.#move(index, by), {
        disabled: by < 0 ? index === 0 : index === last,
        hidden: last === 0,
      });
    return element(
      "li",
      { title: media.name },
      element("span", { class: "visually-hidden", text: media.name }),
      element(
        "span",
        { class: "preview" },
        preview,
        iconButton("close", `Remove ${media.name}`, () => this.#remove(index)),
      ),
      element(
        "span",
        { class: "caption" },
        move("left", "to the left", -1),
        last > 0 && element("span", { class: "order", text: String(index + 1) }),
        element("span", { class: "badge" }),
        move("right", "to the right", 1),
      ),
    );
  }

  /** @returns {PixelLimits | null} */
  #modelLimits() {
    const limits = currentModel()?.limits;
    if (!limits) return null;
    const { resize_factor: factor, min_pixels: minPixels, max_pixels: maxPixels } = limits;
    return { factor, minPixels, maxPixels };
  }

  /** Takes the value of the slider; its right end is the limit of the model. */
  #limit() {
    const limits = this.#modelLimits();
    if (!limits) return;
    const { factor, minPixels, maxPixels } = limits;
    const [low, high] = [minPixels / factor ** 2, maxPixels / factor ** 2];
    const tokens = Math.round(low * (high / low) ** (this.#slider.valueAsNumber / STEPS));
    const isFull = this.#slider.valueAsNumber >= STEPS;
    this.maxPixels = isFull ? null : tokens * factor ** 2;
    this.#showTokens();
    this.dispatchEvent(new Event("change"));
  }

  #showTokens() {
    const limits = this.#modelLimits();
    if (!limits) return;
    const chosen = this.maxPixels;
    const effective = withMaxPixels(limits, chosen);
    const { factor, minPixels, maxPixels } = limits;
    const position = Math.log((chosen ?? maxPixels) / minPixels) / Math.log(maxPixels / minPixels);
    if (document.activeElement !== this.#slider) {
      this.#slider.value = String(chosen === null ? STEPS : Math.round(position * STEPS));
    }
    const most = `at most ${formatNumber(Math.floor(effective.maxPixels / factor ** 2))} tokens each`;
    this.#slider.setAttribute("aria-valuetext", most);
    let total = 0;
    this.items.forEach((media, index) => {
      const { text, tokens } = badge(media, effective);
      total += tokens;
      /** @type {HTMLElement} */ (this.#list.children[index].querySelector(".badge")).textContent =
        text;
    });
    const pictures = this.items.filter((one) => one.kind === "image").length;
    const context = currentModel()?.max_model_len ?? 0;
    const sum =
      pictures > 1 ? ` · together ${formatNumber(total)} of ${formatNumber(context)}` : "";
    byId("size-text").textContent = most + sum;
  }
}

/**
 * @param {Media} media
 * @param {PixelLimits} limits
 * @returns {{text: string, tokens: number}}
 */
function badge(media, limits) {
  if (media.kind === "video") return { text: "video", tokens: 0 };
  const size = resizedSize(media.width, media.height, limits);
  if (!size) return { text: "too narrow", tokens: 0 };
  const tokens = tokensOf(size, limits.factor);
  return { text: count(tokens, "token"), tokens };
}
