/** The form at the bottom: the next question with its pictures and videos, and the stop button. */

import { Attachments } from "./attachments.js";
import { openCamera } from "./camera.js";
import { announce, byId } from "../dom.js";
import { receiveFiles } from "./drop.js";
import { readMedia } from "./media.js";
import { currentModel } from "../client/models.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("./media.js").Media} Media */

export class Composer {
  #session;
  #attachments = new Attachments();
  #form = /** @type {HTMLFormElement} */ (byId("composer"));
  #text = /** @type {HTMLTextAreaElement} */ (byId("question"));
  #problem = byId("composer-problem");
  #opening = 0; // files that are being opened
  #isSendWanted = false; // Enter was pressed meanwhile

  /** @param {Session} session */
  constructor(session) {
    this.#session = session;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    this.#text.addEventListener("input", () => {
      this.#isSendWanted = false;
      this.update();
    });
    this.#attachments.addEventListener("change", () => this.update());
    byId("stop").addEventListener("click", () => session.stop());
    byId("attach").addEventListener("click", () => byId("file").click());
    byId("camera").addEventListener("click", () =>
      openCamera(
        (file) => this.addFiles([file]),
        (sentence) => this.showProblem(sentence),
      ),
    );
    for (const id of ["file", "camera-file"]) this.#takeFrom(byId(id));
    receiveFiles((files) => this.addFiles(files));
    this.update();
  }

  /** @param {HTMLInputElement} input */
  #takeFrom(input) {
    input.addEventListener("change", () => {
      const files = [...(input.files ?? [])];
      input.value = "";
      this.addFiles(files);
    });
  }

  /**
   * Adds files to the question, in their order. The question is not sent before they are open, and
   * nothing is added if another conversation is shown by then.
   * @param {File[]} files
   * @returns {Promise<boolean>}  whether all were added
   */
  async addFiles(files) {
    this.showProblem("");
    const { conversation } = this.#session;
    this.#opening += files.length;
    this.update();
    const opened = await Promise.allSettled(files.map(readMedia));
    this.#opening -= files.length;
    const isAdded = conversation === this.#session.conversation && this.#add(opened);
    if (!isAdded) this.#isSendWanted = false;
    this.update();
    if (this.#isSendWanted && this.#opening === 0) this.#send();
    return isAdded;
  }

  /**
   * @param {PromiseSettledResult<Media>[]} opened
   * @returns {boolean}  whether nothing is wrong with them
   */
  #add(opened) {
    /** @type {Media[]} */
    const media = [];
    /** @type {string[]} */
    const problems = [];
    for (const one of opened) {
      if (one.status === "fulfilled") media.push(one.value);
      else problems.push(one.reason.message);
    }
    this.#attachments.add(media);
    const tooMany = this.#overLimit();
    if (tooMany) problems.push(tooMany);
    this.showProblem(problems.join(" "));
    if (media.length > 0) announce(`Added ${media.map((one) => one.name).join(", ")}.`);
    this.#text.focus();
    return problems.length === 0;
  }

  /** Returns what is wrong with the number of pictures and videos, or an empty string. */
  #overLimit() {
    const limits = currentModel()?.limits;
    if (!limits) return "";
    const images = this.#attachments.items.filter((one) => one.kind === "image").length;
    const videos = this.#attachments.items.length - images;
    if (images > limits.max_images)
      return `The server takes ${limits.max_images} pictures in one request, and these are ${images}.`;
    if (videos > limits.max_videos)
      return `The server takes ${limits.max_videos} videos in one request, and these are ${videos}.`;
    return "";
  }

  /** @param {string} sentence  empty: none */
  showProblem(sentence) {
    this.#problem.textContent = sentence;
    this.#problem.hidden = sentence === "";
  }

  /**
   * Writes a question into the form.
   * @param {string} text
   */
  write(text) {
    this.#text.value = text;
    this.update();
    this.focus();
  }

  focus() {
    this.#text.focus();
  }

  #send() {
    const text = this.#text.value.trim();
    if (!text || this.#session.isRunning) return;
    this.#isSendWanted = this.#opening > 0;
    if (this.#isSendWanted) return;
    this.showProblem("");
    this.#text.value = "";
    this.#session.ask(text, this.#attachments.take()).catch((error) => {
      console.error(error);
      this.showProblem(`The question could not be sent: ${error.message}`);
    });
    this.update();
  }

  /** Shows the buttons that can be used now. */
  update() {
    const { isRunning } = this.#session;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    const isReady = this.#opening === 0 && this.#text.value.trim() !== "";
    /** @type {HTMLButtonElement} */ (byId("send")).disabled = !isReady;
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }
}
