/** The list of stored conversations; on narrow screens it is opened by a button. */

import { byId, element, iconButton } from "./dom.js";
import { listConversations } from "./client/store.js";

/** @typedef {import("./client/session.js").Session} Session */

const DELAY = 150; // milliseconds in which several changes are one

export class Sidebar {
  #session;
  #list = byId("conversations");
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /** @param {Session} session */
  constructor(session) {
    this.#session = session;
    session.addEventListener("list", () => this.#refreshSoon());
    document.addEventListener("visibilitychange", () => this.#refreshSoon()); // other tabs store, too
    byId("new").addEventListener("click", () => {
      this.close();
      session.startNew();
    });
    byId("menu").addEventListener("click", () => this.#toggle(true));
    byId("menu-close").addEventListener("click", () => this.close());
    byId("backdrop").addEventListener("click", () => this.close());
    addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
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
    const all = await listConversations().catch(() => []);
    const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset.id;
    const shown = this.#session.conversation.id;
    this.#list.replaceChildren(
      ...all.map((one) => {
        const open = element("button", {
          type: "button",
          class: "conversation",
          "data-id": one.id,
          "aria-current": one.id === shown ? "true" : null,
          text: one.title || "Untitled",
        });
        open.addEventListener("click", () => {
          this.close();
          if (one.id !== this.#session.conversation.id) this.#session.open(one);
        });
        const remove = iconButton("trash", `Delete the conversation ${one.title}`, () =>
          this.#session.remove(one.id),
        );
        return element("li", {}, open, remove);
      }),
    );
    byId("no-conversations").hidden = all.length > 0;
    if (focused) {
      const again = /** @type {HTMLElement | null} */ (
        this.#list.querySelector(`[data-id="${focused}"]`)
      );
      again?.focus();
    }
  }
}
