/**
 * The conversation on the page: its messages, the request that runs, and what is stored.
 *
 * Events: "change" (messages were added, removed or finished), "text" (the answer has grown),
 * "list" (the stored conversations have changed).
 */

import { RequestError, isAbort, streamChat } from "./api.js";
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
  /** @type {AbortController | null} */
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
    saveMedia(conversation.id, media).catch(() => {});
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
    messages.splice(index + 1);
    messages[index] = { ...message, text };
    if (index === 0) this.conversation.title = text.slice(0, MAX_TITLE);
    await this.#answer();
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
    this.#running?.abort();
    this.#running = null;
  }

  async #answer() {
    const { conversation } = this;
    const controller = new AbortController();
    this.#running = controller;
    const answer = newAnswer(settings());
    const before = [...conversation.messages];
    conversation.messages.push(answer);
    this.#save(conversation);
    this.#tell("change");
    announce("Waiting for the answer.");
    try {
      await this.#receive(before, answer, controller.signal);
    } catch (error) {
      answer.state = isAbort(error) ? "stopped" : "failed";
      if (!isAbort(error)) answer.error = describe(error);
      if (error instanceof RequestError && error.status === 401) this.#retryWithKey(controller);
    }
    this.#finish(conversation, answer, controller);
  }

  /**
   * @param {Message[]} before  the messages that are sent
   * @param {Answer} answer
   * @param {AbortSignal} signal
   */
  async #receive(before, answer, signal) {
    const model = currentModel() ?? ((await loadModels()) ? currentModel() : null);
    if (!model) throw new RequestError("The server has not said which models it has. Try again.");
    answer.model = model.id;
    const request = await prepareRequest(before, this.media, answer.settings, model);
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
      if (performance.now() - this.#savedAt > SAVE_INTERVAL) this.#save(this.conversation);
    }
    if (answer.state === "running") answer.state = "done";
  }

  /** @param {AbortController} controller */
  #retryWithKey(controller) {
    askForKey().then((isGiven) => {
      if (isGiven && !this.isRunning && !controller.signal.aborted) this.regenerate();
    });
  }

  /**
   * @param {Conversation} conversation
   * @param {Answer} answer
   * @param {AbortController} controller
   */
  #finish(conversation, answer, controller) {
    if (this.#running === controller) this.#running = null;
    if (conversation.messages.includes(answer)) this.#save(conversation);
    if (conversation !== this.conversation) return;
    if (answer.state === "stopped") announce("Stopped.");
    else announce(answer.error || `Answer: ${answer.text}`);
    this.#tell("change");
  }

  /** @param {Conversation} conversation */
  #save(conversation) {
    if (this.#deleted.has(conversation.id)) return;
    this.#savedAt = performance.now();
    conversation.updated = Date.now();
    saveConversation(conversation).then(
      () => this.#tell("list"),
      () => {}, // the browser refuses storage; main.js has said so
    );
  }

  /** @param {string} type */
  #tell(type) {
    this.dispatchEvent(new Event(type));
  }
}

/** @param {unknown} error */
function describe(error) {
  if (error instanceof RequestError) return error.message;
  console.error(error);
  return error instanceof Error ? `The page has failed: ${error.message}` : String(error);
}
