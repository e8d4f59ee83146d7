/** Shows a question: its pictures and videos as the server has seen them, and its text. */

import { copyText, count, element, iconButton } from "../dom.js";
import { frameStrip } from "../compose/frames.js";
import { objectUrl } from "../compose/media.js";
import { showPicture } from "../viewer.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").UserMessage} UserMessage */
/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("../client/api.js").MediaUsage} MediaUsage */

/**
 * Returns the element of a question; `showUsages` adds what the server says about its files.
 * @param {Session} session
 * @param {UserMessage} message
 * @param {number} index
 */
export function questionItem(session, message, index) {
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
    iconButton("edit", "Edit the question", () => editQuestion(session, index, text, actions)),
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
    if (usage) tiles[index].append(...usageParts(media, usage));
  });
}

/**
 * @param {Media} media
 * @param {MediaUsage} usage
 */
function usageParts(media, usage) {
  if (media.kind === "video") return usage.frame_timestamps ? [frameStrip(media, usage)] : [];
  const size = `${usage.resized_size.width} × ${usage.resized_size.height}`;
  return [element("span", { class: "note", text: `${size} · ${count(usage.tokens, "token")}` })];
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

/**
 * @param {Session} session
 * @param {number} index
 * @param {HTMLElement} text
 * @param {HTMLElement} actions
 */
function editQuestion(session, index, text, actions) {
  const message = /** @type {UserMessage} */ (session.conversation.messages[index]);
  const area = /** @type {HTMLTextAreaElement} */ (
    element("textarea", { "aria-label": "Question", rows: "3" })
  );
  area.value = message.text;
  const close = () => {
    form.replaceWith(text, actions);
    /** @type {HTMLElement | null} */ (actions.lastElementChild)?.focus();
  };
  const form = element(
    "form",
    { class: "edit" },
    area,
    element("button", { type: "button", class: "quiet", text: "Cancel", on: { click: close } }),
    element("button", { type: "submit", class: "primary", text: "Ask again" }),
  );
  const send = () => area.value.trim() && session.edit(index, area.value.trim());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    event.preventDefault(); // an answer that runs goes on
    close();
  });
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  actions.remove();
  text.replaceWith(form);
  area.focus();
}
