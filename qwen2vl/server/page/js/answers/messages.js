/** Shows the messages of a conversation. */

import { answerItem, answerText } from "./answer.js";
import { questionItem, showLeftOut, showUsages } from "./question.js";
import { isLeftOut } from "../client/conversation.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").Answer} Answer */
/** @typedef {import("../client/api.js").MediaUsage} MediaUsage */

/** @typedef {import("../client/conversation.js").Message} Message */
/** @typedef {{item: HTMLElement, made: string, files: string}} Shown */

/**
 * What is shown of each message: its element, and of what it was made.
 * @type {WeakMap<Message, Shown>}
 */
let shown = new WeakMap();
/** @type {import("../client/conversation.js").Conversation | null} */
let conversation = null; // of which they are

/**
 * Shows all messages of the session. The element of a message that has not changed stays, with
 * what the user does in it: a video that plays, an edit, the focus.
 * @param {Session} session
 * @param {HTMLElement} list
 */
export function renderMessages(session, list) {
  if (conversation !== session.conversation) shown = new WeakMap(); // their URLs are released
  conversation = session.conversation;
  const { messages } = conversation;
  const seen = mediaUsages(session);
  messages.forEach((message, index) => {
    const item =
      message.role === "user"
        ? currentQuestion(session, message, index, seen)
        : currentAnswer(session, message, index);
    const there = list.children[index];
    if (!there) list.append(item);
    else if (there !== item) there.replaceWith(item);
  });
  while (list.children.length > messages.length) list.lastElementChild?.remove();
}

/**
 * @param {Session} session
 * @param {import("../client/conversation.js").UserMessage} message
 * @param {number} index
 * @param {Map<string, MediaUsage>} seen
 */
function currentQuestion(session, message, index, seen) {
  const leftOut = isLeftOut(session.conversation.messages, index);
  const made = JSON.stringify([leftOut, message.media.map((id) => seen.get(id) ?? null)]);
  const files = filesOf(session, [message]);
  const found = shown.get(message);
  const known = found?.files === files ? found : undefined;
  const item = known?.item ?? questionItem(session, message);
  if (known?.made !== made) {
    showUsages(item, session, message, seen);
    showLeftOut(item, leftOut);
  }
  shown.set(message, { item, made, files });
  return item;
}

/**
 * @param {Session} session
 * @param {Answer} answer
 * @param {number} index
 */
function currentAnswer(session, answer, index) {
  const { messages } = session.conversation;
  const isLast = index === messages.length - 1;
  const files = filesOf(session, messages.slice(0, index));
  const { state, text, error, model, grounding, usage } = answer;
  const made = JSON.stringify([isLast, state, text, error, model, grounding, usage]);
  const known = shown.get(answer);
  if (known?.made === made && known.files === files) return known.item;
  const item = answerItem(session, answer, index);
  shown.set(answer, { item, made, files });
  return item;
}

/**
 * Returns which files of messages this tab has: another tab may still be storing some.
 * @param {Session} session
 * @param {Message[]} messages
 */
function filesOf(session, messages) {
  const ids = messages.flatMap((one) => (one.role === "user" ? one.media : []));
  return ids.filter((id) => session.media.has(id)).join();
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
