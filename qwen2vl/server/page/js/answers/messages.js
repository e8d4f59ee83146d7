/** Shows the messages of a conversation. */

import { answerItem, answerText } from "./answer.js";
import { questionItem } from "./question.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").Answer} Answer */
/** @typedef {import("../client/api.js").MediaUsage} MediaUsage */

/**
 * Shows all messages of the session.
 * @param {Session} session
 * @param {HTMLElement} list
 */
export function renderMessages(session, list) {
  const { messages } = session.conversation;
  const seen = mediaUsages(session);
  list.replaceChildren(
    ...messages.map((message, index) =>
      message.role === "user"
        ? questionItem(session, message, index, seen)
        : answerItem(session, message, index),
    ),
  );
}

/**
 * Shows what has arrived of the last answer.
 * @param {Session} session
 * @param {HTMLElement} list
 */
export function renderGrowingAnswer(session, list) {
  const answer = session.conversation.messages.at(-1);
  const body = list.lastElementChild?.querySelector(".text");
  if (body && answer?.role === "assistant") body.replaceChildren(...answerText(answer));
}

/**
 * Returns what the server has said about each picture and video, by its id.
 * @param {Session} session
 * @returns {Map<string, MediaUsage>}
 */
function mediaUsages(session) {
  const found = new Map();
  for (const message of session.conversation.messages) {
    for (const usage of (message.role === "assistant" && message.usage?.media) || []) {
      found.set(/** @type {Answer} */ (message).paths[usage.param], usage);
    }
  }
  return found;
}
