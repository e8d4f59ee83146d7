/**
 * The conversation on the page, and the requests that run.
 *
 * Events: "change" (messages of the conversation that is shown were added, removed or finished),
 * "text" (its answer has grown), "list" (the stored conversations or the requests have changed),
 * "edit" (a question is to be edited; `detail` is the message), "answered" (a request has ended;
 * `detail` is the run), "merged" (another tab has asked in the conversation, too), "unsaved" (not
 * stored; `detail` is the error).
 */

import { receiveAnswer } from "./answering.js";
import * as content from "./conversation.js";
import { announce } from "../dom.js";
import { releaseStrips } from "../compose/frames.js";
import { releaseMedia } from "../compose/media.js";
import { askForKey } from "./models.js";
import { Saver } from "./saving.js";
import { settings } from "./settings.js";
import * as store from "./store.js";
import { tabEvents, tellTabs } from "./tabs.js";

/** @typedef {import("./answering.js").Run} Run */
/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {Map<string, Media>} MediaMap */

const MAX_TITLE = 60;

export class Session extends EventTarget {
  conversation = content.newConversation();
  /** @type {MediaMap} */
  media = new Map();
  /** @type {Map<string, Run>} */
  #running = new Map(); // by the id of the conversation: it goes on while another one is shown
  /** @type {{id: string, isOutdated: boolean} | null} */
  #opening = null; // the conversation that is read; isOutdated: it was stored again meanwhile
  #saver = new Saver((type, detail) => {
    if (type !== "merged") this.#tell(type, detail);
    else if (detail === this.conversation) ["change", "merged"].forEach((one) => this.#tell(one));
  });

  constructor() {
    super();
    /** @type {(type: string, listener: (detail: any) => void) => void} */
    const on = (type, listener) =>
      tabEvents.addEventListener(type, (event) =>
        listener(/** @type {CustomEvent} */ (event).detail),
      );
    on("saved", ({ id }) => this.reload(id));
    on("answering", ({ id }) => this.reload(id));
    on("opened", ({ id }) => this.#running.has(id) && tellTabs("answering", { id }));
    on("deleted", ({ id }) => this.drop(id));
    on("left", ({ ids }) => {
      if (!ids.includes(this.conversation.id) || this.isRunning) return;
      content.endInterrupted(this.conversation);
      this.#tell("change");
    });
    addEventListener("pagehide", () => tellTabs("left", { ids: [...this.#running.keys()] }));
  }

  /** Whether an answer of the conversation that is shown is received. */
  get isRunning() {
    return this.isAnswering(this.conversation.id);
  }

  /** Whether another tab receives an answer of the conversation that is shown. */
  get isAnsweredElsewhere() {
    return !this.isRunning && content.isActive(this.conversation.messages.at(-1));
  }

  /** @param {string} id  of a conversation */
  isAnswering(id) {
    return this.#running.has(id);
  }

  /** Begins an empty conversation; it is stored with its first message. */
  startNew() {
    this.#show(content.newConversation(), new Map());
  }

  /**
   * Shows a stored conversation.
   * @param {string} id
   */
  async open(id) {
    this.#saver.allow(id);
    const run = this.#running.get(id);
    if (run) return this.#show(run.conversation, run.media);
    const opening = (this.#opening = { id, isOutdated: false });
    const [found, media] = await Promise.all([
      store.loadConversation(id).catch(() => undefined),
      store.listMedia(id).catch(() => []),
    ]);
    if (opening !== this.#opening) return; // another one was shown, or this one deleted
    if (opening.isOutdated) return this.open(id);
    this.#opening = null;
    if (!found) return this.#tell("list");
    content.endInterrupted(found);
    this.#show(found, new Map(media.map((one) => [one.id, one])));
    tellTabs("opened", { id });
  }

  /**
   * @param {Conversation} conversation
   * @param {MediaMap} media
   */
  #show(conversation, media) {
    this.#opening = null;
    releaseMedia();
    releaseStrips();
    this.conversation = conversation;
    this.media = media;
    this.#tell("change");
    this.#tell("list");
  }

  /**
   * Shows what was stored by another tab, or in the list.
   * @param {string} id  of a conversation
   */
  async reload(id) {
    this.#tell("list");
    if (id === this.#opening?.id) this.#opening.isOutdated = true;
    const { conversation } = this;
    if (id !== conversation.id || this.isRunning) return; // the next time it is stored, both merge
    const reading = Promise.all([store.loadConversation(id), store.listMedia(id)]);
    const [stored, media = []] = await reading.catch(() => []);
    if (conversation !== this.conversation || this.isRunning) return;
    if (!stored || stored.version < conversation.version) return;
    store.takeOver(conversation, stored);
    for (const one of media) if (!this.media.has(one.id)) this.media.set(one.id, one);
    this.#tell("change");
  }

  /**
   * Stops the requests of a conversation that was deleted, and no longer shows it.
   * @param {string | null} id  null: all
   */
  drop(id) {
    if (id === this.#opening?.id) this.#opening = null;
    for (const one of id ? [id] : [this.conversation.id, ...this.#running.keys()]) {
      this.#saver.forbid(one);
      this.stop(one);
    }
    if (!id || id === this.conversation.id) this.startNew();
    else this.#tell("list");
  }

  /**
   * Sends a question and receives its answer.
   * @param {string} text
   * @param {Media[]} media
   * @param {number | null} maxPixels
   */
  async ask(text, media, maxPixels) {
    this.#addQuestion(text, media, maxPixels);
    await this.#answer([]);
  }

  /**
   * Replaces a question, drops what follows it, and receives a new answer.
   * @param {string} id  of the message
   * @param {string} text
   * @param {Media[]} media
   * @param {number | null} maxPixels
   */
  async edit(id, text, media, maxPixels) {
    this.stop();
    const index = this.conversation.messages.findIndex((one) => one.id === id);
    if (index < 0) return;
    const dropped = this.conversation.messages.splice(index);
    this.#addQuestion(text, media, maxPixels);
    await this.#answer(dropped.flatMap((one) => (one.role === "user" ? one.media : [])));
  }

  /** @type {(text: string, media: Media[], maxPixels: number | null) => void} */
  #addQuestion(text, media, maxPixels) {
    const { conversation } = this;
    const added = media.filter((one) => !this.media.has(one.id));
    for (const one of added) this.media.set(one.id, one);
    this.#saver.saveMedia(conversation.id, added);
    const isFirst = conversation.messages.length === 0;
    const ids = media.map((one) => one.id);
    conversation.messages.push(content.newQuestion(text, ids, maxPixels));
    if (isFirst && !conversation.isNamed) conversation.title = text.slice(0, MAX_TITLE);
  }

  /**
   * Replaces the last answer by a new one.
   * @param {number} [maxPixels]  a new size of the pictures of its question
   */
  async regenerate(maxPixels) {
    this.stop();
    const { messages } = this.conversation;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    const question = messages.at(-1);
    if (maxPixels && question?.role === "user")
      messages.splice(-1, 1, content.newQuestion(question.text, question.media, maxPixels));
    await this.#answer([]);
  }

  /**
   * Ends the request of a conversation; what has arrived of the answer stays.
   * @param {string} id
   */
  stop(id = this.conversation.id) {
    const run = this.#running.get(id);
    if (!run) return;
    this.#running.delete(id);
    run.answer.state = "stopped";
    run.controller.abort();
    this.#tell(id === this.conversation.id ? "change" : "list");
  }

  /** @param {string[]} dropped  ids of pictures and videos, of messages that were dropped */
  async #answer(dropped) {
    const { conversation, media } = this;
    const answer = content.newAnswer(settings());
    const run = { conversation, media, answer, controller: new AbortController() };
    const before = [...conversation.messages];
    conversation.messages.push(answer);
    this.#running.set(conversation.id, run);
    this.#saver.save(run).then(() => this.#saver.forgetMedia(run, dropped));
    this.#tell("change");
    announce("Waiting for the answer.");
    const needsKey = await receiveAnswer(run, before, () => {
      if (conversation === this.conversation) this.#tell("text");
      this.#saver.save(run, true);
    });
    if (this.#running.get(conversation.id) === run) this.#running.delete(conversation.id);
    if (needsKey) this.#retryWithKey(answer);
    if (!conversation.messages.includes(answer)) return;
    this.#saver.save(run);
    this.#tell("answered", run);
    if (conversation === this.conversation) this.#tell("change");
  }

  /** @param {import("./conversation.js").Answer} answer */
  #retryWithKey(answer) {
    askForKey().then((isGiven) => {
      const isLast = this.conversation.messages.at(-1) === answer;
      if (isGiven && isLast && answer.state === "failed") this.regenerate();
    });
  }

  /** @type {(type: string, detail?: unknown) => void} */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
