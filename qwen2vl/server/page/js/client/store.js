/**
 * Conversations, pictures and videos in the browser's IndexedDB. Nothing of them is stored
 * elsewhere. Where the browser refuses storage, they last until the page is closed.
 */

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("../compose/media.js").Media} Media */

const NAME = "qwen2vl";
const VERSION = 1;

/** @type {Promise<IDBDatabase> | null} */
let opened = null;

/** @returns {Promise<IDBDatabase>} */
function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      const media = request.result.createObjectStore("media", { keyPath: "id" });
      media.createIndex("conversation", "conversation");
    };
    request.onsuccess = () => {
      request.result.onclose = forget;
      request.result.onversionchange = () => {
        request.result.close();
        forget();
      };
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
  });
  opened.catch(forget);
  return opened;
}

/** The next transaction opens the database again. */
function forget() {
  opened = null;
}

/**
 * Runs one transaction and returns the result of its request.
 * @param {string[]} stores
 * @param {IDBTransactionMode} mode
 * @param {(transaction: IDBTransaction) => IDBRequest | void} run
 * @returns {Promise<any>}
 */
async function transact(stores, mode, run) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(stores, mode);
    const request = run(transaction);
    transaction.oncomplete = () => resolve(request ? request.result : undefined);
    transaction.onabort = () => reject(transaction.error); // also after the error of a request
  });
}

/** Returns whether the browser stores anything. */
export async function isStorageAvailable() {
  try {
    await open();
    return true;
  } catch {
    return false;
  }
}

/**
 * Returns all conversations, the latest first.
 * @returns {Promise<Conversation[]>}
 */
export async function listConversations() {
  /** @type {Conversation[]} */
  const all = await transact(["conversations"], "readonly", (transaction) =>
    transaction.objectStore("conversations").getAll(),
  );
  return all.sort((a, b) => b.updated - a.updated);
}

/** @param {Conversation} conversation */
export function saveConversation(conversation) {
  return transact(["conversations"], "readwrite", (transaction) => {
    transaction.objectStore("conversations").put(structuredClone(conversation));
  });
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
export function deleteConversation(id) {
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
