/** Conversations and their messages, as they are shown and stored. */

import { newId } from "../dom.js";

/**
 * @typedef {object} UserMessage
 * @property {string} id
 * @property {"user"} role
 * @property {string} text
 * @property {string[]} media  ids
 * @property {number | null} maxPixels  largest size of its pictures; null: the model's
 */
/**
 * @typedef {object} Remedies  what the page can do about an error
 * @property {boolean} [tokens]  ask without the setting "Longest answer"
 * @property {number} [pixels]  ask with this largest size of the pictures
 * @property {boolean} [key]  ask for the API key
 */
/**
 * @typedef {object} Answer
 * @property {string} id
 * @property {"assistant"} role
 * @property {string} text  as the server has sent it
 * @property {string} model
 * @property {"waiting" | "running" | "done" | "cut" | "stopped" | "failed"} state
 * @property {string} error  a sentence; empty: none
 * @property {Remedies} remedies  of the error
 * @property {import("../answers/boxes.js").Shape[]} grounding
 * @property {import("./api.js").Usage | null} usage
 * @property {Record<string, string>} paths  of the request: path of a picture -> its id
 * @property {import("./settings.js").Settings} settings  of the request
 */
/** @typedef {UserMessage | Answer} Message */
/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {boolean} isNamed  whether the user has written the title
 * @property {number} updated  milliseconds since 1970
 * @property {number} version  grows with each time that it is stored, by any tab
 * @property {number | null} deleted  when it was deleted; null: it is not
 * @property {Message[]} messages
 */

const LEFT = "The page was closed before the answer was complete.";

/**
 * Returns an empty conversation.
 * @returns {Conversation}
 */
export function newConversation() {
  const now = Date.now();
  const state = { isNamed: false, version: 0, deleted: null };
  return { id: newId(), title: "", updated: now, ...state, messages: [] };
}

/**
 * Returns a question.
 * @param {string} text
 * @param {string[]} media
 * @param {number | null} maxPixels
 * @returns {UserMessage}
 */
export function newQuestion(text, media, maxPixels) {
  return { id: newId(), role: "user", text, media, maxPixels };
}

/**
 * Returns an answer that is waited for.
 * @param {Readonly<import("./settings.js").Settings>} settings  of the request
 * @returns {Answer}
 */
export function newAnswer(settings) {
  return {
    id: newId(),
    role: "assistant",
    text: "",
    model: "",
    state: "waiting",
    error: "",
    remedies: {},
    grounding: [],
    usage: null,
    paths: {},
    settings: { ...settings },
  };
}

/** @param {Message | undefined} message */
export function isActive(message) {
  return message?.role === "assistant" && ["waiting", "running"].includes(message.state);
}

/**
 * Ends the answers of a stored conversation whose page was closed while they came.
 * @param {Conversation} conversation
 */
export function endInterrupted(conversation) {
  for (const message of conversation.messages) {
    if (message.role === "assistant" && isActive(message)) {
      Object.assign(message, { state: "stopped", error: message.text ? "" : LEFT });
    }
  }
}

/**
 * Returns whether the request of a later question leaves a question out, because it has no answer:
 * two questions in a row are not what the model was trained on, and what was refused once would be
 * refused again.
 * @param {Message[]} messages
 * @param {number} index  of the question
 */
export function isLeftOut(messages, index) {
  const next = messages[index + 1];
  return next !== undefined && !(next.role === "assistant" && (next.text || isActive(next)));
}

/**
 * Returns the messages that are sent for the answer that follows all of them.
 * @param {Message[]} messages
 */
export function sentMessages(messages) {
  return messages.filter((one, index) =>
    one.role === "assistant" ? one.text !== "" : !isLeftOut(messages, index),
  );
}

/**
 * Merges what another tab has stored with what this tab has. A message that both have stays the
 * same object if it is the same, or if this tab is its author.
 * @param {Message[]} stored
 * @param {Message[]} ours
 * @param {(message: Message) => boolean} isNew  whether this tab has written it, and not yet stored
 * @returns {Message[]}
 */
export function mergeMessages(stored, ours, isNew) {
  const known = new Map(ours.map((one) => [one.id, one]));
  const kept = stored.map((theirs) => {
    const mine = known.get(theirs.id);
    const isSame = mine && (isNew(mine) || JSON.stringify(mine) === JSON.stringify(theirs));
    return isSame ? mine : theirs;
  });
  const ids = new Set(stored.map((one) => one.id));
  return [...kept, ...ours.filter((one) => isNew(one) && !ids.has(one.id))];
}
