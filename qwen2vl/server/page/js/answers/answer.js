/** Shows an answer: its text, its boxes, what went wrong, and what can be done with it. */

import { linkShapes, shapesFigure } from "./boxes.js";
import { copyText, element, formatNumber, icon, iconButton } from "../dom.js";
import { renderMarkdown } from "./markdown.js";
import { smallerText } from "../client/explain.js";
import { askForKey, currentModel } from "../client/models.js";
import { changeSettings } from "../client/settings.js";
import { linkPhrases } from "./phrases.js";
import { showRequestCode } from "./request_code.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").Answer} Answer */
/** @typedef {import("../compose/media.js").Media} Media */

const CUT = "The answer was cut: it reached “Longest answer” in the settings.";
const FULL = "The answer was cut: nothing more fits into the context of the model.";

/**
 * Returns the element of an answer.
 * @param {Session} session
 * @param {Answer} answer
 * @param {number} index
 */
export function answerItem(session, answer, index) {
  const isActive = answer.state === "waiting" || answer.state === "running";
  const isLast = index === session.conversation.messages.length - 1;
  const item = element(
    "li",
    { class: "answer", "aria-busy": isActive ? "true" : null },
    element("h2", { class: "visually-hidden", text: `Answer of ${answer.model || "the model"}` }),
    element("div", { class: "text" }, ...answerText(answer)),
  );
  if (isActive) return item;
  const pictures = picturesOf(session, answer, index);
  if (answer.grounding.length > 0) {
    item.append(shapesFigure(answer.grounding, pictures, answer.paths));
    linkShapes(item);
  }
  const cut = answer.settings.maxTokens === null ? FULL : CUT;
  const note =
    answer.state === "cut" ? cut : answer.state === "stopped" && !answer.error && "Stopped.";
  if (note) item.append(element("p", { class: "note", text: note }));
  if (answer.error) item.append(failure(session, answer, isLast));
  item.append(actionsOf(session, answer, index, isLast));
  return item;
}

/**
 * Returns the pictures that an answer is about: those of its question, or the ones before.
 * @param {Session} session
 * @param {Answer} answer
 * @param {number} index
 */
function picturesOf(session, answer, index) {
  for (const message of session.conversation.messages.slice(0, index).reverse()) {
    if (message.role !== "user") continue;
    const media = message.media.map((id) => session.media.get(id));
    const found = media.filter((one) => one?.kind === "image" && one.width > 0);
    if (found.length > 0) return /** @type {Media[]} */ (found);
  }
  return [];
}

/**
 * Returns what is shown as the text of an answer.
 * @param {Answer} answer
 */
export function answerText(answer) {
  if (answer.text) {
    const rendered = renderMarkdown(answer.text);
    linkPhrases(rendered, answer.grounding);
    return [rendered];
  }
  if (answer.state !== "waiting" && answer.state !== "running") return [];
  const label = answer.state === "waiting" ? "Sending" : "Reading the question";
  return [element("p", { class: "waiting" }, element("span", { text: label }))];
}

/**
 * @param {Session} session
 * @param {Answer} answer
 * @param {boolean} isLast
 */
function failure(session, answer, isLast) {
  const retry = element("button", { type: "button", class: "quiet" }, icon("again"), "Try again");
  retry.addEventListener("click", () => session.regenerate());
  return element(
    "div",
    { class: "failure" },
    element("p", { text: answer.error }),
    isLast &&
      element("div", { class: "buttons" }, ...remedyButtons(session, answer.remedies), retry),
  );
}

/**
 * @param {Session} session
 * @param {import("../client/conversation.js").Remedies} remedies
 */
function remedyButtons(session, { tokens, pixels, key }) {
  const factor = currentModel()?.limits.resize_factor;
  const button = (/** @type {string} */ text, /** @type {() => void} */ run) =>
    element("button", { type: "button", class: "quiet", text, on: { click: run } });
  const askFreely = () => {
    changeSettings({ maxTokens: null });
    session.regenerate();
  };
  const askWithKey = async () => (await askForKey()) && session.regenerate();
  return [
    ...(tokens ? [button("Clear “Longest answer” and ask again", askFreely)] : []),
    ...(pixels && factor
      ? [button(smallerText(pixels, factor), () => session.regenerate(pixels))]
      : []),
    ...(key ? [button("Enter the key", askWithKey)] : []),
  ];
}

/**
 * @param {Session} session
 * @param {Answer} answer
 * @param {number} index
 * @param {boolean} isLast
 */
function actionsOf(session, answer, index, isLast) {
  const before = session.conversation.messages.slice(0, index);
  return element(
    "div",
    { class: "actions" },
    answer.text &&
      iconButton("copy", "Copy the answer", (event) => copyText(shownText(event), target(event))),
    isLast &&
      !answer.error &&
      iconButton("again", "Generate the answer again", () => session.regenerate()),
    iconButton("code", "Show the request as curl and Python", () =>
      showRequestCode(before, session.media, answer),
    ),
    answer.usage && element("span", { class: "wide note", text: modelText(answer) }),
    answer.usage && element("span", { class: "note", text: tokensText(answer.usage) }),
  );
}

/** @param {import("../client/api.js").Usage} usage */
function tokensText(usage) {
  const details = usage.prompt_tokens_details;
  const visual = (details?.image_tokens ?? 0) + (details?.video_tokens ?? 0);
  const seen = visual ? ` (${formatNumber(visual)} visual)` : "";
  const [given, written] = [usage.prompt_tokens, usage.completion_tokens].map(formatNumber);
  return `${given} tokens in${seen}, ${written} out`;
}

/** @param {Answer} answer */
function modelText({ model, usage }) {
  const milliseconds = Object.values(usage?.timings_ms ?? {}).reduce((sum, one) => sum + one, 0);
  return milliseconds ? `${model} · ${(milliseconds / 1000).toFixed(1)} s` : model;
}

/**
 * Returns the text of an answer as it is shown: boxes as phrases.
 * @param {MouseEvent} event
 */
function shownText(event) {
  const text = target(event).closest(".answer")?.querySelector(".text");
  return /** @type {HTMLElement} */ (text).innerText.trim();
}

/** @param {MouseEvent} event */
function target(event) {
  return /** @type {HTMLElement} */ (event.currentTarget);
}
