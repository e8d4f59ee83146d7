/**
 * The form at the bottom: the next question with its pictures and videos, and the stop button. What
 * is written stays with its conversation. A question that is edited is written here, too.
 */

import { Attachments } from "./attachments.js";
import { openCamera } from "./camera.js";
import { announce, byId, showSentence } from "../dom.js";
import { draftOf, keepDraft } from "./drafts.js";
import { receiveFiles, takeFrom } from "./drop.js";
import { fileProblem, questionProblem, sentFiles } from "./limits.js";
import { readMedia } from "./media.js";
import { currentModel } from "../client/models.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").UserMessage} UserMessage */
/** @typedef {import("./media.js").Media} Media */

const NO_TEXT = "Write a question about it first.";
const ELSEWHERE = "Another tab is receiving an answer in this conversation.";

export class Composer {
  #session;
  #attachments = new Attachments();
  #form = /** @type {HTMLFormElement} */ (byId("composer"));
  #text = /** @type {HTMLTextAreaElement} */ (byId("question"));
  #problem = ""; // of what was done last; others are found by #standingProblem
  #opening = 0; // files that are being opened
  #isSendWanted = false; // Enter was pressed meanwhile
  #shown = ""; // key of the draft in the form
  /** @type {UserMessage | null} */
  #edited = null; // the question that is edited; the draft waits

  /** @param {Session} session */
  constructor(session) {
    this.#session = session;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#text.addEventListener("keydown", (event) => this.#onKey(event));
    this.#text.addEventListener("input", () => {
      this.#isSendWanted = false;
      if (this.#problem === NO_TEXT) this.#problem = "";
      this.#onChange();
    });
    this.#attachments.addEventListener("change", () => this.#onChange());
    session.addEventListener("edit", (event) => this.#edit(/** @type {any} */ (event).detail));
    byId("edit-cancel").addEventListener("click", () => this.#endEdit());
    byId("stop").addEventListener("click", () => session.stop());
    byId("attach").addEventListener("click", () => byId("file").click());
    byId("camera").addEventListener("click", () =>
      openCamera(
        (file) => this.addFiles([file]),
        (sentence) => this.showProblem(sentence),
      ),
    );
    for (const id of ["file", "camera-file"]) takeFrom(byId(id), (files) => this.addFiles(files));
    receiveFiles((files) => this.addFiles(files));
    this.update();
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (event.isComposing) return;
    if (event.key === "Escape" && this.#edited) {
      event.preventDefault(); // an answer that runs goes on
      this.#endEdit();
    }
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    this.#send();
  }

  /**
   * Adds files to the question, in their order. The question is not sent before they are open; if
   * another conversation is shown by then, they are added to the draft of theirs.
   * @param {File[]} files
   * @returns {Promise<boolean>}  whether all were added
   */
  async addFiles(files) {
    this.showProblem("");
    const key = this.#shown;
    this.#opening += files.length;
    this.update();
    const opened = await Promise.allSettled(files.map(readMedia));
    this.#opening -= files.length;
    const isAdded = this.#add(opened, key);
    if (!isAdded) this.#isSendWanted = false;
    this.update();
    if (this.#isSendWanted && this.#opening === 0) this.#send();
    return isAdded;
  }

  /**
   * @param {PromiseSettledResult<Media>[]} opened
   * @param {string} key  of the draft
   * @returns {boolean}  whether all are in the question that is shown
   */
  #add(opened, key) {
    /** @type {Media[]} */
    const media = [];
    /** @type {string[]} */
    const problems = [];
    for (const one of opened) {
      const problem =
        one.status === "fulfilled" ? fileProblem(one.value, currentModel()) : one.reason.message;
      if (problem) problems.push(problem);
      else if (one.status === "fulfilled") media.push(one.value);
    }
    if (key !== this.#shown) {
      const draft = draftOf(key);
      keepDraft(key, { ...draft, media: [...draft.media, ...media] });
      return false;
    }
    this.#attachments.add(media);
    this.showProblem(problems.join(" "));
    if (media.length > 0) announce(`Added ${media.map((one) => one.name).join(", ")}.`);
    this.#text.focus();
    return problems.length === 0;
  }

  /** Returns why what is written cannot be sent now, or an empty string. */
  #standingProblem() {
    const { conversation, isAnsweredElsewhere, media } = this.#session;
    if (isAnsweredElsewhere) return ELSEWHERE;
    const { items, maxPixels } = this.#attachments;
    const end = conversation.messages.findIndex((one) => one.id === this.#edited?.id);
    const before = conversation.messages.slice(0, end < 0 ? undefined : end);
    return questionProblem({ media: items, maxPixels }, sentFiles(before, media), currentModel());
  }

  /** @param {string} sentence  empty: none */
  showProblem(sentence) {
    this.#problem = sentence;
    this.update();
  }

  /**
   * Writes a question into the form.
   * @param {string} text
   */
  write(text) {
    this.#text.value = text;
    this.#onChange();
    this.focus();
  }

  focus() {
    this.#text.focus();
  }

  #send() {
    const text = this.#text.value.trim();
    const { items, maxPixels } = this.#attachments;
    if (this.#session.isRunning && !this.#edited) return;
    if (!text && items.length > 0) return this.showProblem(NO_TEXT);
    if (!text || this.#standingProblem()) return;
    this.#isSendWanted = this.#opening > 0;
    if (this.#isSendWanted) return;
    this.#problem = "";
    const edited = this.#edited;
    if (edited && this.#isUnchanged(edited)) return this.#endEdit();
    if (edited) this.#endEdit(false);
    else this.#fill("", [], null);
    const sending = edited
      ? this.#session.edit(edited.id, text, items, maxPixels)
      : this.#session.ask(text, items, maxPixels);
    sending.catch((error) => {
      console.error(error);
      this.showProblem(`The question could not be sent: ${error.message}`);
    });
    this.update();
  }

  /** @type {(text: string, media: Media[], maxPixels: number | null) => void} */
  #fill(text, media, maxPixels) {
    this.#text.value = text;
    this.#attachments.replace(media, maxPixels);
  }

  /** Keeps what is written as the draft of its conversation. */
  #onChange() {
    const { items: media, maxPixels } = this.#attachments;
    if (!this.#edited) keepDraft(this.#shown, { text: this.#text.value, media, maxPixels });
    this.update();
  }

  #showDraft() {
    const { text, media, maxPixels } = draftOf(this.#shown);
    this.#fill(text, media, maxPixels);
  }

  /** @param {UserMessage} message */
  #edit(message) {
    this.#edited = message;
    const files = message.media.map((id) => this.#session.media.get(id));
    this.#fill(
      message.text,
      files.filter((one) => one !== undefined),
      message.maxPixels,
    );
    this.focus();
  }

  /** @param {UserMessage} message */
  #isUnchanged({ text, media, maxPixels }) {
    const { items, maxPixels: chosen } = this.#attachments;
    const isSame = items.map((one) => one.id).join() === media.join() && chosen === maxPixels;
    return isSame && this.#text.value.trim() === text;
  }

  /** @param {boolean} isCancelled  whether the focus goes back to where the edit began */
  #endEdit(isCancelled = true) {
    const index = this.#session.conversation.messages.findIndex((m) => m.id === this.#edited?.id);
    this.#edited = null;
    this.#showDraft();
    const item = byId("messages").children[index];
    const button = item?.querySelector("[aria-label='Edit the question']");
    if (isCancelled) /** @type {HTMLElement | null} */ (button)?.focus();
  }

  /** Shows the draft of the conversation that is shown, and the buttons that can be used now. */
  update() {
    const { isRunning, conversation } = this.#session;
    const { id, messages } = conversation;
    const key = messages.length > 0 ? id : "new";
    const index = messages.findIndex((one) => one.id === this.#edited?.id);
    if (key !== this.#shown || (this.#edited && index < 0)) {
      this.#shown = key;
      this.#edited = null;
      this.#isSendWanted = false;
      this.#problem = "";
      return this.#showDraft(); // updates again
    }
    const standing = this.#standingProblem();
    showSentence(byId("composer-problem"), [this.#problem, standing].filter(Boolean).join(" "));
    byId("editing").hidden = !this.#edited;
    [...byId("messages").children].forEach((item, i) =>
      item.classList.toggle("replaced", index >= 0 && i > index),
    );
    byId("send").hidden = isRunning && !this.#edited;
    byId("stop").hidden = !isRunning || this.#edited !== null;
    const isReady = this.#opening === 0 && this.#text.value.trim() !== "" && standing === "";
    /** @type {HTMLButtonElement} */ (byId("send")).disabled = !isReady;
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }
}
