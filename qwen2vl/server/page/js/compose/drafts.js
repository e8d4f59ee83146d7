/**
 * What is written and not yet asked, of each conversation. Texts are kept until the tab is closed,
 * pictures and videos until the page is.
 */

/** @typedef {import("./media.js").Media} Media */
/** @typedef {{text: string, media: Media[], maxPixels: number | null}} Draft */

const TEXTS = "qwen2vl.drafts"; // in the sessionStorage

/** @type {Map<string, Draft>} */
const drafts = new Map(Object.entries(read()).map(([key, text]) => [key, newDraft(text)]));

/**
 * @param {string} text
 * @returns {Draft}
 */
function newDraft(text = "") {
  return { text, media: [], maxPixels: null };
}

/** @returns {Record<string, string>} */
function read() {
  try {
    return JSON.parse(sessionStorage.getItem(TEXTS) ?? "{}");
  } catch {
    return {}; // storage is blocked, or damaged
  }
}

/**
 * Returns the draft of a conversation.
 * @param {string} key
 */
export function draftOf(key) {
  return drafts.get(key) ?? newDraft();
}

/** Forgets the drafts of all conversations. */
export function forgetDrafts() {
  drafts.clear();
  write();
}

/**
 * @param {string} key
 * @param {Draft} draft
 */
export function keepDraft(key, draft = newDraft()) {
  if (draft.text === "" && draft.media.length === 0) drafts.delete(key);
  else drafts.set(key, draft);
  write();
}

function write() {
  const texts = [...drafts].filter(([, { text }]) => text).map(([one, { text }]) => [one, text]);
  try {
    sessionStorage.setItem(TEXTS, JSON.stringify(Object.fromEntries(texts)));
  } catch {
    // Storage is blocked or full: drafts last until the page is closed.
  }
}
