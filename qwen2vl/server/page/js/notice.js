/** One short line at the bottom of the page, with a button that undoes what it says. */

import { announce, byId, element, iconButton } from "./dom.js";

const SHOWN = 10_000; // milliseconds; longer while the pointer or the focus of a keyboard is in it

/** @type {(() => void) | null} */
let end = null;

/**
 * Shows a notice in place of the one before.
 * @param {string} text
 * @param {{label: string, run: () => void, expire?: () => void}} [action]  expire: called when the
 *   notice goes without it
 */
export function showNotice(text, action) {
  end?.();
  const notice = byId("notice");
  /** @type {ReturnType<typeof setTimeout>} */
  let timer;
  const close = (/** @type {(() => void) | undefined} */ then) => {
    clearTimeout(timer);
    end = null;
    notice.hidden = true;
    then?.();
  };
  end = () => close(action?.expire);
  const wait = () => {
    timer = setTimeout(() => (isUsed(notice) ? wait() : end?.()), SHOWN);
  };
  const undo =
    action &&
    element(
      "button",
      { type: "button", class: "link", on: { click: () => close(action.run) } },
      action.label,
    );
  notice.replaceChildren(
    element("span", { text }),
    undo ?? "",
    iconButton("close", "Close this notice", () => end?.()),
  );
  notice.hidden = false;
  announce(action ? `${text} ${action.label} is the button that has the focus.` : text);
  undo?.focus();
  wait();
}

/** @param {HTMLElement} notice */
function isUsed(notice) {
  return notice.matches(":hover") || notice.querySelector(":focus-visible") !== null;
}
