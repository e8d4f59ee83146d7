/** Changes the stored conversations of the list. */

import * as store from "../client/store.js";
import { tellTabs } from "../client/tabs.js";
import { forgetDrafts, keepDraft } from "../compose/drafts.js";

/** @typedef {import("../client/session.js").Session} Session */

/**
 * Deletes a conversation; `restore` brings it back until it is forgotten.
 * @param {Session} session
 * @param {string} id
 */
export async function remove(session, id) {
  session.drop(id);
  await store.changeConversation(id, () => ({ deleted: Date.now() })).catch(() => {});
  tellTabs("deleted", { id });
  await session.reload(id);
}

/**
 * @param {Session} session
 * @param {string} id
 * @param {boolean} isOpened  whether it is shown again
 */
export async function restore(session, id, isOpened) {
  await store.changeConversation(id, () => ({ deleted: null })).catch(() => {});
  tellTabs("saved", { id });
  await (isOpened ? session.open(id) : session.reload(id));
}

/** @param {string} id  of a conversation that was removed */
export async function forget(id) {
  keepDraft(id);
  await store.deleteMarked(id).catch(() => {});
}

/**
 * Deletes all conversations for good.
 * @param {Session} session
 */
export async function removeAll(session) {
  session.drop(null);
  forgetDrafts();
  await store.deleteEverything().catch(() => {});
  tellTabs("deleted", { id: null });
  await session.reload("");
}

/**
 * @param {Session} session
 * @param {string} id
 * @param {string} title
 */
export async function rename(session, id, title) {
  await store.changeConversation(id, () => ({ title, isNamed: true })).catch(() => {});
  tellTabs("saved", { id });
  await session.reload(id);
}
