/** The menu of a conversation in the list: rename, save as a file, delete. */

import { byId } from "../dom.js";

/** @typedef {import("../client/conversation.js").Conversation} Conversation */
/** @typedef {"rename" | "md" | "json" | "delete"} Choice */

const EDGE = 8; // pixels between the menu and the edge of the window

/**
 * Shows the menu below a button.
 * @param {HTMLElement} button
 * @param {(choice: Choice) => void} onChoice
 */
export function openMenu(button, onChoice) {
  const menu = byId("conversation-menu");
  menu.onclick = (event) => {
    const { choice } = /** @type {HTMLElement} */ (event.target).dataset;
    if (!choice) return;
    menu.hidePopover(); // gives the focus back to the button
    onChoice(/** @type {Choice} */ (choice));
  };
  menu.onkeydown = (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const items = [...menu.querySelectorAll("button")];
    const at = items.findIndex((one) => one === document.activeElement);
    items[(at + by + items.length) % items.length].focus();
  };
  menu.showPopover();
  const { left, top, bottom } = button.getBoundingClientRect();
  const { offsetHeight: height, offsetWidth: width } = menu;
  const isBelow = bottom + height + EDGE < innerHeight;
  menu.style.top = `${isBelow ? bottom : Math.max(EDGE, top - height)}px`;
  menu.style.left = `${Math.min(left, innerWidth - width - EDGE)}px`;
  menu.querySelector("button")?.focus();
}
