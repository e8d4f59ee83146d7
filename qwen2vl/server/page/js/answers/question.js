/** Shows a question: its pictures and videos as the server has seen them, and its text. */

import { copyText, count, element, iconButton } from "../dom.js";
import { frameStrip } from "../compose/frames.js";
import { objectUrl } from "../compose/media.js";
import { showPicture } from "../viewer.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").UserMessage} UserMessage */
/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("../client/api.js").MediaUsage} MediaUsage */

const LEFT_OUT = "Not answered, so it is not sent again with later questions.";

/**
 * Returns the element of a question; `showUsages` adds what the server says about its files.
 * @param {Session} session
 * @param {UserMessage} message
 */
export function questionItem(session, message) {
  const media = mediaOf(session, message);
  const lost = message.media.length - media.length;
  const text = element("p", { class: "text", text: message.text });
  const item = element(
    "li",
    { class: "question" },
    element("h2", { class: "visually-hidden", text: "You" }),
    media.length > 0 &&
      element("ul", { class: "media" }, ...media.map((one, i) => tile(one, i, media))),
    lost > 0 &&
      element("p", {
        class: "note",
        text: `${count(lost, "file")} no longer stored in this browser.`,
      }),
  );
  const actions = element(
    "div",
    { class: "actions" },
    iconButton("copy", "Copy the question", (event) =>
      copyText(message.text, /** @type {HTMLElement} */ (event.currentTarget)),
    ),
    iconButton("edit", "Edit the question", () =>
      session.dispatchEvent(new CustomEvent("edit", { detail: message })),
    ),
  );
  item.append(element("div", { class: "line" }, text, actions));
  return item;
}

/**
 * @param {Session} session
 * @param {UserMessage} message
 */
function mediaOf(session, message) {
  return message.media.map((id) => session.media.get(id)).filter((one) => one !== undefined);
}

/**
 * Shows beside each picture and video of a question how the server has seen it.
 * @param {HTMLElement} item  of the question
 * @param {Session} session
 * @param {UserMessage} message
 * @param {Map<string, MediaUsage>} seen
 */
export function showUsages(item, session, message, seen) {
  const tiles = item.querySelectorAll(".media > li");
  mediaOf(session, message).forEach((media, index) => {
    const usage = seen.get(media.id);
    tiles[index].querySelector(":scope > .note, :scope > .strip")?.remove();
    if (usage) tiles[index].append(...usageParts(media, usage, message.maxPixels));
  });
}

/**
 * Says below a question that later requests leave it out.
 * @param {HTMLElement} item  of the question
 * @param {boolean} isLeftOut
 */
export function showLeftOut(item, isLeftOut) {
  item.querySelector(":scope > .left-out")?.remove();
  if (isLeftOut) item.append(element("p", { class: "left-out note", text: LEFT_OUT }));
}

/**
 * @param {Media} media
 * @param {MediaUsage} usage
 * @param {number | null} maxPixels
 */
function usageParts(media, usage, maxPixels) {
  if (media.kind === "video") return usage.frame_timestamps ? [frameStrip(media, usage)] : [];
  const size = `${usage.resized_size.width} × ${usage.resized_size.height}`;
  const limited = maxPixels === null ? "" : " · size limited";
  const text = `${size} · ${count(usage.tokens, "token")}${limited}`;
  return [element("span", { class: "note", text })];
}

/**
 * @param {Media} media
 * @param {number} index
 * @param {Media[]} all
 */
function tile(media, index, all) {
  const number = all.length > 1 && element("span", { class: "number", text: String(index + 1) });
  if (media.kind === "video") return videoTile(media, number);
  const button = element(
    "button",
    { type: "button", class: "picture", "aria-label": `Enlarge ${media.name}` },
    element("img", { src: objectUrl(media), alt: "" }),
    number,
  );
  button.addEventListener("click", () => showPicture(media));
  return element("li", { title: media.name }, button);
}

/**
 * @param {Media} media
 * @param {HTMLElement | false} number
 */
function videoTile(media, number) {
  const isAnimation = media.type.startsWith("image/");
  const player = isAnimation
    ? element("img", { src: objectUrl(media), alt: `Animation ${media.name}` })
    : element("video", {
        src: objectUrl(media),
        controls: true,
        preload: "metadata",
        "aria-label": media.name,
      });
  return element(
    "li",
    { class: "video", title: media.name },
    element("div", { class: "player" }, player, number),
  );
}
