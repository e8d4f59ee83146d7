/** The browser's IndexedDB: opens it, and runs transactions. */

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

/** @typedef {(listener: () => void) => () => void} Guard */

/**
 * Runs one transaction and returns the result of its request.
 * @param {string[]} stores
 * @param {IDBTransactionMode} mode
 * @param {(transaction: IDBTransaction, guard: Guard) => IDBRequest | void} run  guard: wraps a
 *   listener, whose error then ends the transaction
 * @returns {Promise<any>}
 */
export async function transact(stores, mode, run) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(stores, mode);
    /** @type {Guard} */
    const guard = (listener) => () => {
      try {
        listener();
      } catch (error) {
        reject(error);
        transaction.abort();
      }
    };
    const request = run(transaction, guard);
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
