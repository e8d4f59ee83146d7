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

/** @typedef {{item: HTMLElement, open: HTMLElement, more: HTMLElement, shown: string}} Row */

export class Sidebar {
  #session;
  #list = byId("conversations");
  #search = /** @type {HTMLInputElement} */ (byId("search"));
  /** @type {Conversation[]} */
  #all = [];
  /** @type {Map<string, Row>} */
  #rows = new Map(); // by id: an element stays, so that no click on it and no focus in it is lost
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
    const focused = /** @type {HTMLElement | null} */ (document.activeElement);
    this.#search.hidden = this.#all.length <= SEARCHABLE && this.#search.value === "";
    const words = this.#search.value.trim().toLowerCase();
    const shown = this.#all.filter((one) => words === "" || hasText(one, words));
    const titles = this.#all.map((one) => one.title);
    this.#place(
      shown.map((one) => {
        const isAlone = titles.filter((title) => title === one.title).length < 2;
        return this.#update(one, isAlone ? "" : dateOf(one.updated));
      }),
    );
    byId("no-conversations").hidden = this.#all.length > 0;
    byId("none-found").hidden = shown.length > 0 || this.#all.length === 0;
    const isLost = focused !== document.activeElement; // by an element that was moved
    if (isLost && this.#list.contains(focused)) focused?.focus();
  }

  /** @param {HTMLElement[]} items  what the list has from now on; those that are in place stay */
  #place(items) {
    for (const there of [...this.#list.children])
      if (!items.includes(/** @type {HTMLElement} */ (there))) there.remove();
    items.forEach((item, index) => {
      const there = this.#list.children[index];
      if (there !== item) this.#list.insertBefore(item, there ?? null);
    });
    const ids = new Set(this.#all.map((one) => one.id));
    for (const id of this.#rows.keys()) if (!ids.has(id)) this.#rows.delete(id);
  }

  /**
   * Returns the element of a conversation as it is now.
   * @param {Conversation} one
   * @param {string} date  of conversations with the same title
   */
  #update(one, date) {
    const row = this.#rows.get(one.id) ?? this.#newRow(one.id);
    this.#rows.set(one.id, row);
    const { item, open, more } = row;
    if (!item.contains(open)) item.replaceChildren(open, more); // after the field of its title
    const title = one.title || "Untitled";
    const isAnswering = this.#session.isAnswering(one.id);
    const isCurrent = one.id === this.#session.conversation.id;
    const shown = JSON.stringify([title, date, isAnswering, isCurrent]);
    if (shown === row.shown) return item;
    row.shown = shown;
    open.title = title;
    if (isCurrent) open.setAttribute("aria-current", "true");
    else open.removeAttribute("aria-current");
    const parts = [
      element("span", { class: "name", text: title }),
      date && element("span", { class: "date", text: date }),
      isAnswering && element("span", { class: "running", title: "Being answered" }),
      isAnswering && element("span", { class: "visually-hidden", text: ", being answered" }),
    ];
    open.replaceChildren(...parts.filter((part) => part instanceof Node));
    more.title = `Options of the conversation ${title}`;
    more.setAttribute("aria-label", more.title);
    return item;
  }

  /**
   * @param {string} id
   * @returns {Row}
   */
  #newRow(id) {
    const open = element("button", { type: "button", class: "conversation", "data-id": id });
    open.addEventListener("click", () => {
      this.close();
      if (id !== this.#session.conversation.id) this.#session.open(id);
    });
    open.addEventListener("dblclick", () => this.#rename(id));
    open.addEventListener("keydown", (event) => {
      if (event.key === "F2") this.#rename(id);
      else if (event.key === "Delete") this.#remove(id);
    });
    const more = iconButton("more", "", () =>
      openMenu(more, (choice) => {
        if (choice === "rename") this.#rename(id);
        else if (choice === "delete") this.#remove(id);
        else this.#export(id, choice);
      }),
    );
    more.setAttribute("aria-haspopup", "true");
    return { item: element("li", {}, open, more), open, more, shown: "" };
  }

  /** @param {string} id  of a conversation of the list */
  #find(id) {
    return this.#all.find((one) => one.id === id);
  }

  /** @param {string} id */
  #rename(id) {
    const row = this.#rows.get(id);
    const before = this.#find(id)?.title;
    if (!row || before === undefined) return;
    const field = /** @type {HTMLInputElement} */ (
      element("input", { "aria-label": "Title of the conversation", maxlength: MAX_TITLE })
    );
    field.value = before;
    this.#renaming = id;
    const end = (/** @type {boolean} */ isTaken) => {
      if (!this.#renaming) return;
      const title = field.value.trim();
      const hadFocus = document.activeElement === field;
      const one = this.#find(id);
      const isChanged = isTaken && title !== "" && title !== before;
      this.#renaming = "";
      if (isChanged && one) one.title = title; // shown at once: storing it may take time
      this.#render();
      if (hadFocus) row.open.focus();
      if (isChanged) rename(this.#session, id, title);
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      end(event.key === "Enter");
    });
    row.item.replaceChildren(field);
    field.select();
  }

  /** @param {string} id */
  async #remove(id) {
    const one = this.#find(id);
    if (!one) return; // the key was pressed twice: the notice of the first press restores it
    this.#all = this.#all.filter((other) => other !== one);
    this.#render();
    const isShown = id === this.#session.conversation.id;
    await remove(this.#session, id);
    showNotice(`“${one.title}” is deleted.`, {
      label: "Undo",
      run: () => restore(this.#session, id, isShown),
      expire: () => forget(id),
    });
  }

  /**
   * @param {string} id
   * @param {"md" | "json"} format
   */
  async #export(id, format) {
    const conversation = (await loadConversation(id)) ?? this.#find(id); // the list may be older
    if (!conversation) return;
    const media = await listMedia(id);
    await saveAsFile(conversation, new Map(media.map((file) => [file.id, file])), format);
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
