/**
 * Begins here: connects the parts of the page.
 *
 *   session.js      the conversation (conversation.js) and its requests (request.js, api.js), stored
 *                   by store.js
 *   messages.js     shows it (question.js, answer.js, markdown.js, boxes.js, phrases.js, frames.js)
 *   composer.js     takes the next question (attachments.js, media.js, resize.js, camera.js, drop.js)
 *   sidebar.js, settings_dialog.js, models.js, viewer.js, request_code.js
 */

import { Composer } from "./compose/composer.js";
import { byId, element } from "./dom.js";
import { renderGrowingAnswer, renderMessages } from "./answers/messages.js";
import { loadModels } from "./client/models.js";
import { Session } from "./client/session.js";
import { prepareSettings } from "./settings_dialog.js";
import { Sidebar } from "./sidebar.js";
import { isStorageAvailable, listConversations } from "./client/store.js";

const NEAR_END = 80; // pixels: nearer than this, the page follows a growing answer
const LAST = "qwen2vl.conversation"; // of this tab
const FULL =
  "The browser's storage for this page is full: what is new is lost when the page is closed. Delete conversations, or free space on the disk.";
const NOT_STORED =
  "This browser stores nothing for this page: conversations end when it is closed.";

const session = new Session();
const composer = new Composer(session);
new Sidebar(session);
const list = byId("messages");
const scroller = byId("scroll");

/** @param {() => void} update */
function followingTheEnd(update) {
  const wasAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
  update();
  if (wasAtEnd) scroller.scrollTop = scroller.scrollHeight;
}

function show() {
  const { conversation } = session;
  const isEmpty = conversation.messages.length === 0;
  byId("empty").hidden = !isEmpty;
  list.hidden = isEmpty;
  byId("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – qwen2vl` : "qwen2vl";
  followingTheEnd(() => renderMessages(session, list));
  if (session.isRunning) scroller.scrollTop = scroller.scrollHeight;
  composer.update();
  try {
    if (isEmpty) sessionStorage.removeItem(LAST);
    else sessionStorage.setItem(LAST, conversation.id);
  } catch {
    // Storage is blocked: a reload begins a new conversation.
  }
}

let isDrawing = false;
function showGrowing() {
  if (isDrawing) return; // at most once a frame
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    if (session.isRunning) followingTheEnd(() => renderGrowingAnswer(session, list));
  });
}

function prepareExamples() {
  for (const button of /** @type {NodeListOf<HTMLElement>} */ (
    document.querySelectorAll(".example")
  )) {
    let isLoading = false;
    button.addEventListener("click", async (event) => {
      if (isLoading || event.detail > 1) return; // the second click of a double click
      isLoading = true;
      await takeExample(button.dataset).catch(() =>
        composer.showProblem("The example cannot be loaded. Check the server, then try again."),
      );
      isLoading = false;
    });
  }
}

/** @param {DOMStringMap} example */
async function takeExample({ file = "", question = "" }) {
  const { conversation } = session;
  const response = await fetch(file);
  if (!response.ok) throw new Error(`status ${response.status}`);
  const blob = await response.blob();
  if (conversation !== session.conversation) return;
  const name = file.slice(file.lastIndexOf("/") + 1);
  if (await composer.addFiles([new File([blob], name, { type: blob.type })]))
    composer.write(question);
}

let isUnsavedTold = false;

/** @param {unknown} error */
function showUnsaved(error) {
  if (isUnsavedTold) return;
  isUnsavedTold = true;
  const isFull = error instanceof DOMException && error.name === "QuotaExceededError";
  composer.showProblem(isFull ? FULL : NOT_STORED);
  byId("sidebar-note").replaceChildren(element("p", { text: isFull ? FULL : NOT_STORED }));
}

function prepareKeys() {
  addEventListener("keydown", (event) => {
    const isInDialog = document.querySelector("dialog[open]") !== null;
    if (isInDialog || event.defaultPrevented) return;
    if (event.key === "Escape" && session.isRunning) session.stop();
    if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      session.startNew();
      composer.focus();
    }
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      const isCloseButton = /** @type {Element} */ (event.target).closest("[data-close]") !== null;
      if (isCloseButton || event.target === dialog) dialog.close(); // the dialog itself: beside it
    });
  }
}

async function openLast() {
  let id = null;
  try {
    id = sessionStorage.getItem(LAST);
  } catch {
    return;
  }
  const found = id && (await listConversations().catch(() => [])).find((one) => one.id === id);
  if (found) await session.open(found);
}

session.addEventListener("change", show);
session.addEventListener("text", showGrowing);
session.addEventListener("unsaved", (event) =>
  showUnsaved(/** @type {CustomEvent} */ (event).detail),
);
byId("new").addEventListener("click", () => composer.focus());
prepareSettings(() => session.removeAll());
prepareExamples();
prepareKeys();
loadModels();
isStorageAvailable().then((isAvailable) => {
  if (!isAvailable) byId("sidebar-note").replaceChildren(element("p", { text: NOT_STORED }));
});
openLast().finally(() => document.body.classList.add("ready"));
