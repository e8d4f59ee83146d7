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
 * Returns the element of a question.
 * @param {Session} session
 * @param {UserMessage} message
 * @param {number} index
 * @param {Map<string, MediaUsage>} seen
 */
export function questionItem(session, message, index, seen) {
  const all = message.media.map((id) => session.media.get(id));
  const media = all.filter((one) => one !== undefined);
  const lost = all.length - media.length;
  const text = element("p", { class: "text", text: message.text });
  const item = element(
    "li",
    { class: "question" },
    element("h2", { class: "visually-hidden", text: "You" }),
    media.length > 0 &&
      element("ul", { class: "media" }, ...media.map((m, i) => tile(m, i, media, seen.get(m.id)))),
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
 * @param {Media} media
 * @param {number} index
 * @param {Media[]} all
 * @param {MediaUsage | undefined} usage  what the server has said about it
 */
function tile(media, index, all, usage) {
  const number = all.length > 1 && element("span", { class: "number", text: String(index + 1) });
  if (media.kind === "video") return videoTile(media, number, usage);
  const size = usage && `${usage.resized_size.width} × ${usage.resized_size.height}`;
  const button = element(
    "button",
    { type: "button", class: "picture", "aria-label": `Enlarge ${media.name}` },
    element("img", { src: objectUrl(media), alt: "" }),
    number,
  );
  button.addEventListener("click", () => showPicture(media));
  return element(
    "li",
    { title: media.name },
    button,
    usage && element("span", { class: "note", text: `${size} · ${count(usage.tokens, "token")}` }),
  );
}

/**
 * @param {Media} media
 * @param {HTMLElement | false} number
 * @param {MediaUsage | undefined} usage
 */
function videoTile(media, number, usage) {
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
    usage?.frame_timestamps && frameStrip(media, usage),
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
  const close = () => form.replaceWith(text, actions);
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
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  actions.remove();
  text.replaceWith(form);
  area.focus();
}
