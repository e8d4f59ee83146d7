/**
 * The conversation on the page: its messages, the request that runs, and what is stored.
 *
 * Events: "change" (messages were added, removed or finished), "text" (the answer has grown),
 * "list" (the stored conversations have changed), "unsaved" (not stored; `detail` is the error).
 */

import { RequestError, isAbort, streamChat, untilAborted } from "./api.js";
import { endInterrupted, newAnswer, newConversation } from "./conversation.js";
import { announce } from "../dom.js";
import { releaseStrips } from "../compose/frames.js";
import { releaseMedia } from "../compose/media.js";
import { askForKey, currentModel, loadModels } from "./models.js";
import { prepareRequest } from "./request.js";
import { settings } from "./settings.js";
import {
  deleteConversation,
  deleteEverything,
  deleteMedia,
  listMedia,
  saveConversation,
  saveMedia,
} from "./store.js";

/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./conversation.js").Answer} Answer */
/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").Conversation} Conversation */

const SAVE_INTERVAL = 1000; // milliseconds, while an answer grows
const MAX_TITLE = 60;

export class Session extends EventTarget {
  conversation = newConversation();
  /** @type {Map<string, Media>} */
  media = new Map();
  /** @type {{controller: AbortController, answer: Answer} | null} */
  #running = null;
  #savedAt = 0;
  /** @type {Set<string>} */
  #deleted = new Set(); // ids of conversations, which a request that ends must not store again

  get isRunning() {
    return this.#running !== null;
  }

  /** Begins an empty conversation; it is stored with its first message. */
  startNew() {
    this.#show(newConversation(), []);
  }

  /**
   * Shows a stored conversation.
   * @param {Conversation} conversation
   */
  async open(conversation) {
    const media = await listMedia(conversation.id).catch(() => []);
    endInterrupted(conversation);
    this.#show(conversation, media);
  }

  /**
   * @param {Conversation} conversation
   * @param {Media[]} media
   */
  #show(conversation, media) {
    this.stop();
    releaseMedia();
    releaseStrips();
    this.conversation = conversation;
    this.media = new Map(media.map((one) => [one.id, one]));
    this.#tell("change");
    this.#tell("list");
  }

  /**
   * Deletes a stored conversation.
   * @param {string} id
   */
  async remove(id) {
    this.#deleted.add(id);
    if (id === this.conversation.id) this.startNew();
    await deleteConversation(id).catch(() => {});
    this.#tell("list");
  }

  /** Deletes all stored conversations. */
  async removeAll() {
    this.#deleted.add(this.conversation.id);
    this.startNew();
    await deleteEverything().catch(() => {});
    this.#tell("list");
  }

  /**
   * Sends a question and receives its answer.
   * @param {string} text
   * @param {Media[]} media
   */
  async ask(text, media) {
    const { conversation } = this;
    for (const one of media) this.media.set(one.id, one);
    saveMedia(conversation.id, media).catch((error) => this.#tell("unsaved", error));
    conversation.messages.push({ role: "user", text, media: media.map((one) => one.id) });
    conversation.title ||= (text || media.map((one) => one.name).join(", ")).slice(0, MAX_TITLE);
    await this.#answer();
  }

  /**
   * Changes a question, drops what follows it, and receives a new answer.
   * @param {number} index  of the message
   * @param {string} text
   */
  async edit(index, text) {
    this.stop();
    const { messages } = this.conversation;
    const message = messages[index];
    if (message?.role !== "user") return;
    this.#forgetMedia(messages.splice(index + 1));
    messages[index] = { ...message, text };
    if (index === 0) this.conversation.title = text.slice(0, MAX_TITLE);
    await this.#answer();
  }

  /** @param {Message[]} dropped  messages, whose pictures and videos nothing else shows */
  #forgetMedia(dropped) {
    const ids = dropped.flatMap((one) => (one.role === "user" ? one.media : []));
    for (const id of ids) this.media.delete(id);
    if (ids.length > 0) deleteMedia(ids).catch(() => {});
  }

  /** Replaces the last answer by a new one. */
  async regenerate() {
    this.stop();
    const { messages } = this.conversation;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    await this.#answer();
  }

  /** Ends the running request; what has arrived of the answer stays. */
  stop() {
    const running = this.#running;
    if (!running) return;
    this.#running = null;
    running.answer.state = "stopped";
    running.controller.abort();
    this.#tell("change");
  }

  async #answer() {
    const { conversation } = this;
    const controller = new AbortController();
    const answer = newAnswer(settings());
    this.#running = { controller, answer };
    const before = [...conversation.messages];
    conversation.messages.push(answer);
    this.#save(conversation);
    this.#tell("change");
    announce("Waiting for the answer.");
    try {
      await this.#receive(conversation, before, answer, controller.signal);
    } catch (error) {
      const isStopped = isAbort(error) || controller.signal.aborted;
      answer.state = isStopped ? "stopped" : "failed";
      if (!isStopped) answer.error = describe(error);
      if (error instanceof RequestError && error.status === 401) this.#retryWithKey(answer);
    }
    this.#finish(conversation, answer, controller);
  }

  /**
   * @param {Conversation} conversation
   * @param {Message[]} before  the messages that are sent
   * @param {Answer} answer
   * @param {AbortSignal} signal
   */
  async #receive(conversation, before, answer, signal) {
    const { media } = this; // another conversation may be shown before all is read
    if (!currentModel()) await untilAborted(loadModels(), signal);
    const model = currentModel();
    if (!model) throw new RequestError("The server has not said which models it has. Try again.");
    answer.model = model.id;
    const prepared = prepareRequest(before, media, answer.settings, model);
    const request = await untilAborted(prepared, signal);
    answer.paths = request.paths;
    const body = { ...request.body, stream: true, stream_options: { include_usage: true } };
    for await (const part of streamChat(body, signal)) {
      signal.throwIfAborted();
      if (part.event === "accepted") answer.state = "running";
      else if (part.event === "text") answer.text += part.text;
      else if (part.event === "grounding") answer.grounding = part.grounding;
      else if (part.event === "usage") answer.usage = part.usage;
      else answer.state = part.reason === "length" ? "cut" : "done";
      this.#tell("text");
      if (performance.now() - this.#savedAt > SAVE_INTERVAL) this.#save(conversation, true);
    }
    if (answer.state === "running") answer.state = "done";
  }

  /** @param {Answer} answer */
  #retryWithKey(answer) {
    askForKey().then((isGiven) => {
      const isLast = this.conversation.messages.at(-1) === answer;
      if (isGiven && isLast && answer.state === "failed") this.regenerate();
    });
  }

  /**
   * @param {Conversation} conversation
   * @param {Answer} answer
   * @param {AbortController} controller
   */
  #finish(conversation, answer, controller) {
    if (this.#running?.controller === controller) this.#running = null;
    if (!conversation.messages.includes(answer)) return;
    this.#save(conversation);
    if (conversation !== this.conversation) return;
    if (answer.state === "stopped") announce("Stopped.");
    else announce(answer.error || `Answer: ${answer.text}`);
    this.#tell("change");
  }

  /**
   * @param {Conversation} conversation
   * @param {boolean} isGrowing  whether only the text of its last answer has changed
   */
  #save(conversation, isGrowing = false) {
    if (this.#deleted.has(conversation.id)) return;
    this.#savedAt = performance.now();
    conversation.updated = Date.now();
    saveConversation(conversation).then(
      () => isGrowing || this.#tell("list"),
      (error) => this.#tell("unsaved", error),
    );
  }

  /** @type {(type: string, detail?: unknown) => void} */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** @param {unknown} error */
function describe(error) {
  if (error instanceof RequestError) return error.message;
  console.error(error);
  return error instanceof Error ? `The page has failed: ${error.message}` : String(error);
}
