/** What the user has chosen: kept in this browser; the API key only as long as the tab is open. */

/**
 * @typedef {object} Settings
 * @property {string | null} model  null: the first one
 * @property {number | null} maxTokens  largest number of tokens of an answer; null: what fits
 * @property {number | null} temperature  null: the model's
 * @property {string} system  system prompt; empty: the model's
 * @property {"system" | "light" | "dark"} theme
 */

const SETTINGS = "qwen2vl.settings";
const KEY = "qwen2vl.key";

/** @type {Readonly<Settings>} */
export const DEFAULTS = Object.freeze({
  model: null,
  maxTokens: null,
  temperature: null,
  system: "",
  theme: "system",
});

/** Says that a setting has changed, by its event "change". */
export const settingsEvents = new EventTarget();

/** @type {Settings} */
let current = { ...DEFAULTS, ...read() };
let keyInMemory = ""; // where storage is blocked

/** @returns {Partial<Settings>} */
function read() {
  try {
    const stored = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    return Object.fromEntries(Object.entries(stored).filter(([name]) => name in DEFAULTS));
  } catch {
    return {}; // storage is blocked, or damaged
  }
}

/** @returns {Readonly<Settings>} */
export function settings() {
  return current;
}

/** @param {Partial<Settings>} changed */
export function changeSettings(changed) {
  current = { ...current, ...changed };
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(current));
  } catch {
    // Storage is blocked: they last until the page is closed.
  }
  applyTheme();
  settingsEvents.dispatchEvent(new Event("change"));
}

function applyTheme() {
  if (current.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = current.theme;
}

/** Returns the API key, or an empty string. */
export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyInMemory;
  } catch {
    return keyInMemory;
  }
}

/** @param {string} key  empty: forget it */
export function setApiKey(key) {
  keyInMemory = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage is blocked: it lasts until the page is closed.
  }
}
