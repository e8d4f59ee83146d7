/**
 * Conversations, pictures and videos in the browser's IndexedDB. Nothing of them is stored
 * elsewhere. Where the browser refuses storage, they last until the page is closed.
 */

import { mergeMessages } from "./conversation.js";
import { transact } from "./database.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("../compose/media.js").Media} Media */

const RESTORABLE = 60_000; // milliseconds, in which another tab may restore what it has deleted

/**
 * Returns all conversations, the latest first.
 * @returns {Promise<Conversation[]>}
 */
export async function listConversations() {
  const all = (await listStored()).filter((one) => !one.deleted);
  return all.sort((a, b) => b.updated - a.updated);
}

/** @returns {Promise<Conversation[]>} */
async function listStored() {
  const all = await transact(["conversations"], "readonly", (transaction) =>
    transaction.objectStore("conversations").getAll(),
  );
  return all.map(complete);
}

/**
 * Returns a conversation, or undefined where there is none.
 * @param {string} id
 * @returns {Promise<Conversation | undefined>}
 */
export async function loadConversation(id) {
  const stored = await transact(["conversations"], "readonly", (transaction) =>
    transaction.objectStore("conversations").get(id),
  );
  if (!stored || stored.deleted) return undefined;
  storedIds.set(complete(stored), idsOf(stored));
  return stored;
}

/**
 * Adds what conversations did not have in the first version of the page.
 * @param {any} stored
 * @returns {Conversation}
 */
function complete(stored) {
  stored.version ??= 0;
  stored.messages.forEach((/** @type {any} */ one, /** @type {number} */ index) => {
    one.id ??= String(index);
    if (one.role === "user")
      one.maxPixels ??= stored.messages[index + 1]?.settings?.maxPixels ?? null;
    else one.remedies ??= {};
  });
  return stored;
}

/** @type {WeakMap<Conversation, Set<string>>} */
const storedIds = new WeakMap(); // ids of the messages that were loaded or stored

/** @param {Conversation} conversation */
function idsOf({ messages }) {
  return new Set(messages.map((one) => one.id));
}

/**
 * Takes over what another tab has stored of a conversation.
 * @param {Conversation} conversation
 * @param {Conversation} stored
 * @param {(message: Message) => boolean} isNew  whether this tab has written a message
 */
export function takeOver(conversation, stored, isNew = () => false) {
  const { title, isNamed, version } = stored;
  const messages = mergeMessages(stored.messages, conversation.messages, isNew);
  storedIds.set(conversation, idsOf(stored));
  Object.assign(conversation, { title, isNamed, version, messages });
}

/**
 * Stores a conversation. If another tab has stored a newer version, both are merged, in one
 * transaction: the messages of the other tab, then those that this tab has added.
 * @param {Conversation} conversation
 * @param {Message | null} own  the answer that this tab receives
 * @returns {Promise<"stored" | "new" | "merged">}  new: it was not stored before
 */
export async function saveConversation(conversation, own) {
  const { version } = conversation;
  let result = /** @type {"stored" | "new" | "merged"} */ ("stored");
  let ids = idsOf(conversation);
  try {
    await transact(["conversations"], "readwrite", (transaction, guard) => {
      const store = transaction.objectStore("conversations");
      const request = store.get(conversation.id);
      request.onsuccess = guard(() => {
        const stored = request.result && complete(request.result);
        if (!stored) result = "new";
        else if (stored.version !== conversation.version) {
          const before = idsOf(conversation);
          const known = storedIds.get(conversation) ?? new Set();
          takeOver(conversation, stored, (one) => one === own || !known.has(one.id));
          if ([...idsOf(stored)].some((theirs) => !before.has(theirs))) result = "merged";
        }
        conversation.version += 1;
        ids = idsOf(conversation);
        store.put(structuredClone(conversation));
      });
    });
  } catch (error) {
    conversation.version = version; // what is stored is still older
    throw error;
  }
  storedIds.set(conversation, ids);
  return result;
}

/**
 * Changes a stored conversation.
 * @param {string} id
 * @param {(stored: Conversation) => Partial<Conversation>} change
 */
export function changeConversation(id, change) {
  return transact(["conversations"], "readwrite", (transaction, guard) => {
    const store = transaction.objectStore("conversations");
    const request = store.get(id);
    request.onsuccess = guard(() => {
      const stored = request.result && complete(request.result);
      if (stored) store.put({ ...stored, ...change(stored), version: stored.version + 1 });
    });
  });
}

/**
 * Deletes what is marked as deleted: one conversation, or those that can no longer be restored.
 * @param {string} [chosen]  id of the one
 */
export async function deleteMarked(chosen) {
  const before = Date.now() - RESTORABLE;
  for (const { id, deleted } of await listStored())
    if (deleted && (chosen ? id === chosen : deleted < before)) await deleteConversation(id);
}

/**
 * @param {string} conversation  its id
 * @param {Media[]} media
 */
export function saveMedia(conversation, media) {
  return transact(["media"], "readwrite", (transaction) => {
    for (const one of media) transaction.objectStore("media").put({ ...one, conversation });
  });
}

/**
 * Returns the pictures and videos of a conversation.
 * @param {string} conversation  its id
 * @returns {Promise<Media[]>}
 */
export function listMedia(conversation) {
  return transact(["media"], "readonly", (transaction) =>
    transaction.objectStore("media").index("conversation").getAll(conversation),
  );
}

/** @param {string[]} ids */
export function deleteMedia(ids) {
  return transact(["media"], "readwrite", (transaction) => {
    for (const id of ids) transaction.objectStore("media").delete(id);
  });
}

/** @param {string} id */
function deleteConversation(id) {
  return transact(["conversations", "media"], "readwrite", (transaction) => {
    transaction.objectStore("conversations").delete(id);
    const media = transaction.objectStore("media");
    const keys = media.index("conversation").getAllKeys(id);
    keys.onsuccess = () => keys.result.forEach((key) => media.delete(key));
  });
}

export function deleteEverything() {
  return transact(["conversations", "media"], "readwrite", (transaction) => {
    transaction.objectStore("conversations").clear();
    transaction.objectStore("media").clear();
  });
}
