/** Stores conversations as they change, and tells other tabs. */

import * as store from "./store.js";
import { tellTabs } from "./tabs.js";

/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./answering.js").Run} Run */

const INTERVAL = 1000; // milliseconds, while an answer grows

export class Saver {
  #tell;
  #savedAt = 0;
  /** @type {Set<string>} */
  #deleted = new Set(); // ids of conversations, which a request that ends must not store again

  /**
   * @param {(type: "unsaved" | "merged" | "list", detail?: unknown) => void} tell  unsaved: the
   *   error; merged: the conversation, in which another tab has asked, too
   */
  constructor(tell) {
    this.#tell = tell;
  }

  /** @param {string} id  of a conversation, which is no longer stored */
  forbid(id) {
    this.#deleted.add(id);
  }

  /** @param {string} id */
  allow(id) {
    this.#deleted.delete(id);
  }

  /**
   * Stores the conversation of a request.
   * @param {Run} run
   * @param {boolean} isGrowing  whether only the text of its answer has changed: this is stored once
   *   in an interval
   */
  async save({ conversation, media, answer }, isGrowing = false) {
    if (this.#deleted.has(conversation.id)) return;
    if (isGrowing && performance.now() - this.#savedAt < INTERVAL) return;
    this.#savedAt = performance.now();
    conversation.updated = Date.now();
    const { id, version } = conversation;
    const result = await this.#unless(store.saveConversation(conversation, answer));
    if (!result) return;
    if (result === "new" && version > 0) await this.saveMedia(id, [...media.values()]);
    tellTabs("saved", { id }); // a tab that reads it then finds its files
    if (result === "merged") {
      for (const one of await store.listMedia(id)) if (!media.has(one.id)) media.set(one.id, one);
      this.#tell("merged", conversation);
    }
    if (!isGrowing) this.#tell("list");
  }

  /**
   * @param {string} id  of the conversation
   * @param {Media[]} media
   */
  saveMedia(id, media) {
    return this.#unless(store.saveMedia(id, media));
  }

  /**
   * Deletes files that no message of a conversation shows.
   * @param {Run} run
   * @param {string[]} ids
   */
  async forgetMedia({ conversation, media }, ids) {
    const shown = conversation.messages.flatMap((one) => (one.role === "user" ? one.media : []));
    const unused = ids.filter((id) => !shown.includes(id));
    for (const id of unused) media.delete(id);
    if (unused.length > 0) await store.deleteMedia(unused).catch(() => {});
  }

  /** @type {<T>(stored: Promise<T>) => Promise<T | undefined>} */
  #unless(stored) {
    return stored.catch((error) => {
      this.#tell("unsaved", error);
      return undefined;
    });
  }
}
