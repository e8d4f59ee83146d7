/** Conversations and their messages, as they are shown and stored. */

import { newId } from "../dom.js";

/** @typedef {{role: "user", text: string, media: string[]}} UserMessage */
/**
 * @typedef {object} Answer
 * @property {"assistant"} role
 * @property {string} text  as the server has sent it
 * @property {string} model
 * @property {"waiting" | "running" | "done" | "cut" | "stopped" | "failed"} state
 * @property {string} error  a sentence; empty: none
 * @property {import("../answers/boxes.js").Shape[]} grounding
 * @property {import("./api.js").Usage | null} usage
 * @property {Record<string, string>} paths  of the request: path of a picture -> its id
 * @property {import("./settings.js").Settings} settings  of the request
 */
/** @typedef {UserMessage | Answer} Message */
/** @typedef {{id: string, title: string, updated: number, messages: Message[]}} Conversation */

const LEFT = "The page was closed before the answer was complete.";

/**
 * Returns an empty conversation.
 * @returns {Conversation}
 */
export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), messages: [] };
}

/**
 * Returns an answer that is waited for.
 * @param {Readonly<import("./settings.js").Settings>} settings  of the request
 * @returns {Answer}
 */
export function newAnswer(settings) {
  return {
    role: "assistant",
    text: "",
    model: "",
    state: "waiting",
    error: "",
    grounding: [],
    usage: null,
    paths: {},
    settings: { ...settings },
  };
}

/**
 * Ends the answers of a stored conversation whose page was closed while they came.
 * @param {Conversation} conversation
 */
export function endInterrupted(conversation) {
  for (const message of conversation.messages) {
    if (message.role === "assistant" && ["waiting", "running"].includes(message.state)) {
      Object.assign(message, { state: "stopped", error: message.text ? "" : LEFT });
    }
  }
}
