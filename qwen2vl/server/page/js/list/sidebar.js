/** The list of stored conversations; on narrow screens it is opened by a button. */

import { byId, element, iconButton } from "../dom.js";
import { showNotice } from "../notice.js";
import { listConversations, listMedia, loadConversation } from "../client/store.js";
import { openMenu } from "./conversation_menu.js";
import { saveAsFile } from "./export.js";
import { forget, remove, rename, restore } from "./library.js";

/** @typedef {import("../client/session.js").Session} Session */
/** @typedef {import("../client/conversation.js").Conversation} Conversation */

const DELAY = 150; // milliseconds in which several changes are one
const SEARCHABLE = 8; // more conversations than this can be searched
const MAX_TITLE = 100;
const DOUBLE_CLICK = 400; // milliseconds

export class Sidebar {
  #session;
  #list = byId("conversations");
  #search = /** @type {HTMLInputElement} */ (byId("search"));
  /** @type {Conversation[]} */
  #all = [];
  #clicked = { id: "", at: 0 }; // the first click draws the list anew, so there is no "dblclick"
  #renaming = ""; // id of the conversation whose title is being written
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /** @param {Session} session */
  constructor(session) {
    this.#session = session;
    session.addEventListener("list", () => this.#refreshSoon());
    document.addEventListener("visibilitychange", () => this.#refreshSoon()); // other tabs store, too
    this.#search.addEventListener("input", () => this.#render());
    byId("new").addEventListener("click", () => {
      this.close();
      session.startNew();
    });
    byId("menu").addEventListener("click", () => this.#toggle(true));
    byId("menu-close").addEventListener("click", () => this.close());
    byId("backdrop").addEventListener("click", () => this.close());
    addEventListener("keydown", (event) => {
      const isTaken = event.defaultPrevented || document.querySelector(":popover-open") !== null;
      if (event.key === "Escape" && !isTaken) this.close();
    });
    this.refresh();
  }

  /** @param {boolean} isOpen */
  #toggle(isOpen) {
    document.body.classList.toggle("menu-open", isOpen);
    byId("menu").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("new").focus();
  }

  close() {
    if (!document.body.classList.contains("menu-open")) return;
    this.#toggle(false);
    byId("menu").focus();
  }

  #refreshSoon() {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.refresh();
    }, DELAY);
  }

  /** Shows what is stored now. */
  async refresh() {
    this.#all = await listConversations().catch(() => []);
    this.#render();
  }

  #render() {
    if (this.#renaming) return; // the field stays; what is stored is shown after it
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset.id;
    this.#search.hidden = this.#all.length <= SEARCHABLE && this.#search.value === "";
    const words = this.#search.value.trim().toLowerCase();
    const shown = this.#all.filter((one) => words === "" || hasText(one, words));
    const titles = this.#all.map((one) => one.title);
    this.#list.replaceChildren(
      ...shown.map((one) => {
        const isAlone = titles.filter((title) => title === one.title).length < 2;
        return this.#row(one, isAlone ? "" : dateOf(one.updated));
      }),
    );
    byId("no-conversations").hidden = this.#all.length > 0;
    byId("none-found").hidden = shown.length > 0 || this.#all.length === 0;
    if (focused) this.#button(focused)?.focus();
  }

  /** @param {string} id */
  #button(id) {
    return /** @type {HTMLElement | null} */ (this.#list.querySelector(`[data-id="${id}"]`));
  }

  /**
   * @param {Conversation} one
   * @param {string} date  of conversations with the same title
   */
  #row(one, date) {
    const title = one.title || "Untitled";
    const isAnswering = this.#session.isAnswering(one.id);
    const open = element(
      "button",
      {
        type: "button",
        class: "conversation",
        title,
        "data-id": one.id,
        "aria-current": one.id === this.#session.conversation.id ? "true" : null,
      },
      element("span", { class: "name", text: title }),
      date && element("span", { class: "date", text: date }),
      isAnswering && element("span", { class: "running", title: "Being answered" }),
      isAnswering && element("span", { class: "visually-hidden", text: ", being answered" }),
    );
    open.addEventListener("click", ({ timeStamp }) => {
      const isSecond = this.#clicked.id === one.id && timeStamp - this.#clicked.at < DOUBLE_CLICK;
      this.#clicked = { id: one.id, at: timeStamp };
      if (isSecond) return this.#rename(one);
      this.close();
      if (one.id !== this.#session.conversation.id) this.#session.open(one.id);
    });
    open.addEventListener("keydown", (event) => {
      if (event.key === "F2") this.#rename(one);
      else if (event.key === "Delete") this.#remove(one);
    });
    const more = iconButton("more", `Options of the conversation ${title}`, () =>
      openMenu(more, (choice) => {
        if (choice === "rename") this.#rename(one);
        else if (choice === "delete") this.#remove(one);
        else this.#export(one, choice);
      }),
    );
    more.setAttribute("aria-haspopup", "true");
    return element("li", {}, open, more);
  }

  /** @param {Conversation} one */
  #rename(one) {
    const row = this.#button(one.id)?.parentElement;
    if (!row) return;
    const field = /** @type {HTMLInputElement} */ (
      element("input", { "aria-label": "Title of the conversation", maxlength: MAX_TITLE })
    );
    field.value = one.title;
    this.#renaming = one.id;
    const end = async (/** @type {boolean} */ isTaken) => {
      if (!this.#renaming) return;
      const title = field.value.trim();
      const hadFocus = document.activeElement === field;
      this.#renaming = "";
      if (isTaken && title && title !== one.title) await rename(this.#session, one.id, title);
      await this.refresh();
      if (hadFocus) this.#button(one.id)?.focus();
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      end(event.key === "Enter");
    });
    row.replaceChildren(field);
    field.select();
  }

  /** @param {Conversation} one */
  async #remove({ id, title }) {
    const isShown = id === this.#session.conversation.id;
    await remove(this.#session, id);
    showNotice(`“${title}” is deleted.`, {
      label: "Undo",
      run: () => restore(this.#session, id, isShown),
      expire: () => forget(id),
    });
  }

  /**
   * @param {Conversation} one
   * @param {"md" | "json"} format
   */
  async #export(one, format) {
    const stored = await loadConversation(one.id); // the list may be older
    const media = await listMedia(one.id);
    await saveAsFile(stored ?? one, new Map(media.map((file) => [file.id, file])), format);
  }
}

/**
 * @param {Conversation} conversation
 * @param {string} words  in small letters
 */
function hasText({ title, messages }, words) {
  return [title, ...messages.map((one) => one.text)].some((text) =>
    text.toLowerCase().includes(words),
  );
}

/** @param {number} time  milliseconds since 1970 */
function dateOf(time) {
  const date = new Date(time);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday
    ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString([], { month: "short", day: "numeric" });
}
