/**
 * Begins here: connects the parts of the page.
 *
 *   session.js      the conversation (conversation.js) and its requests (answering.js, request.js,
 *                   api.js, explain.js), stored by saving.js (store.js, database.js, tabs.js)
 *   messages.js     shows it (question.js, answer.js, markdown.js, boxes.js, phrases.js, frames.js)
 *   composer.js     takes the next question (attachments.js, limits.js, drafts.js, media.js,
 *                   resize.js, camera.js, drop.js)
 *   sidebar.js      lists the conversations (conversation_menu.js, library.js, export.js)
 *   settings_dialog.js, models.js, viewer.js, request_code.js, notice.js
 */

import { Composer } from "./compose/composer.js";
import { announce, byId, element } from "./dom.js";
import { plainText, shapeLines } from "./answers/plain_text.js";
import { renderGrowingAnswer, renderMessages } from "./answers/messages.js";
import { loadModels } from "./client/models.js";
import { Session } from "./client/session.js";
import { prepareSettings } from "./settings_dialog.js";
import { removeAll } from "./list/library.js";
import { Sidebar } from "./list/sidebar.js";
import { showNotice } from "./notice.js";
import { isStorageAvailable } from "./client/database.js";
import { deleteMarked } from "./client/store.js";

const NEAR_END = 80; // pixels: nearer than this, the page follows a growing answer
const LAST = "qwen2vl.conversation"; // of this tab
const FULL =
  "The browser's storage for this page is full: what is new is lost when the page is closed. Delete conversations, or free space on the disk.";
const NOT_STORED =
  "This browser stores nothing for this page: conversations end when it is closed.";
const MERGED = "Another tab has asked in this conversation, too. The questions of both are kept.";

const session = new Session();
const composer = new Composer(session);
new Sidebar(session);
const list = byId("messages");
const scroller = byId("scroll");

let isFollowing = true; // until the user scrolls up
let lastTop = 0;
function showEnd() {
  isFollowing = true;
  scroller.scrollTop = scroller.scrollHeight;
  lastTop = scroller.scrollTop;
}

/** Keeps the end in view while an answer grows, pictures load, or the form changes its height. */
function followTheEnd() {
  scroller.addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = scroller;
    if (scrollHeight - scrollTop - clientHeight < NEAR_END) isFollowing = true;
    else if (scrollTop < lastTop) isFollowing = false; // what grows does not scroll up
    lastTop = scrollTop;
  });
  const observer = new ResizeObserver(() => isFollowing && showEnd());
  observer.observe(list);
  observer.observe(scroller);
}

/** @type {import("./client/conversation.js").Conversation | null} */
let shown = null;
let wasRunning = false;
function show() {
  const { conversation } = session;
  const isEmpty = conversation.messages.length === 0;
  byId("empty").hidden = !isEmpty;
  list.hidden = isEmpty;
  byId("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – qwen2vl` : "qwen2vl";
  renderMessages(session, list);
  if (conversation !== shown || (session.isRunning && !wasRunning)) showEnd();
  [shown, wasRunning] = [conversation, session.isRunning];
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
    if (session.isRunning) renderGrowingAnswer(session, list);
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

/** @param {import("./client/session.js").Run} run  that has ended */
function announceAnswer({ conversation, answer }) {
  if (conversation !== session.conversation) announce(`“${conversation.title}” is answered.`);
  else if (answer.state === "stopped") announce("Stopped.");
  else if (answer.error) announce(answer.error);
  else announce([`Answer: ${plainText(answer)}`, ...shapeLines(answer)].join(". "));
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
    const isInDialog = document.querySelector("dialog[open], :popover-open") !== null;
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
  if (id) await session.open(id);
}

session.addEventListener("change", show);
session.addEventListener("text", showGrowing);
session.addEventListener("answered", (event) =>
  announceAnswer(/** @type {CustomEvent} */ (event).detail),
);
session.addEventListener("merged", () => showNotice(MERGED));
session.addEventListener("unsaved", (event) =>
  showUnsaved(/** @type {CustomEvent} */ (event).detail),
);
byId("new").addEventListener("click", () => composer.focus());
prepareSettings(() => removeAll(session));
prepareExamples();
prepareKeys();
followTheEnd();
loadModels();
isStorageAvailable().then((isAvailable) => {
  if (!isAvailable) byId("sidebar-note").replaceChildren(element("p", { text: NOT_STORED }));
});
deleteMarked().catch(() => {});
openLast().finally(() => document.body.classList.add("ready"));
