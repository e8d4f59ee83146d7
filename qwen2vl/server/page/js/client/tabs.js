/**
 * Tells the other tabs of this browser what is stored, so that two of them can show the same
 * conversation. `tabEvents` has what they tell, with the `detail` that they give:
 *
 *   "saved" {id}      a conversation has changed
 *   "deleted" {id}    a conversation, or all of them (null), were deleted
 *   "opened" {id}     a tab shows it, and asks whether another one receives an answer for it
 *   "answering" {id}  the reply to that
 *   "left" {ids}      the tab that received answers for these was closed
 */

export const tabEvents = new EventTarget();

const channel = "BroadcastChannel" in window ? new BroadcastChannel("qwen2vl") : null;

channel?.addEventListener("message", ({ data: { type, detail } }) =>
  tabEvents.dispatchEvent(new CustomEvent(type, { detail })),
);

/**
 * @param {"saved" | "deleted" | "opened" | "answering" | "left"} type
 * @param {object} detail
 */
export function tellTabs(type, detail) {
  channel?.postMessage({ type, detail });
}
