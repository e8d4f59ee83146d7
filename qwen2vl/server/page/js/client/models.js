/** The models of the server: loaded once; asks for the API key where the server wants one. */

import { RequestError, getModels } from "./api.js";
import { byId, element } from "../dom.js";
import { apiKey, changeSettings, setApiKey, settings } from "./settings.js";

/** @typedef {import("./api.js").Model} Model */

const UNREADABLE = "The response to /v1/models is not a list of models. Check the address.";

/** Says that the models are known, by its event "load". */
export const modelEvents = new EventTarget();

/** @type {Model[]} */
let models = [];
/** @type {Promise<boolean> | null} */
let loading = null;
/** @type {Promise<boolean> | null} */
let asking = null;

/**
 * Returns the chosen model, or null before the models are known.
 * @returns {Model | null}
 */
export function currentModel() {
  return models.find((one) => one.id === settings().model) ?? models[0] ?? null;
}

/**
 * Loads the models; shows in the bar which one answers, or why there is none. Calls at the same
 * time wait for the same response.
 * @returns {Promise<boolean>}  whether it has succeeded
 */
export function loadModels() {
  loading ??= load().finally(() => {
    loading = null;
  });
  return loading;
}

/** @returns {Promise<boolean>} */
async function load() {
  const problem = byId("problem");
  try {
    models = await getModels();
  } catch (error) {
    if (error instanceof RequestError && error.status === 401) {
      if (await askForKey()) return load();
      showProblem(problem, "This server needs an API key.", "Enter the key");
    } else {
      const isRefused = error instanceof RequestError;
      showProblem(problem, isRefused ? error.message : UNREADABLE, "Try again");
    }
    return false;
  }
  problem.hidden = true;
  showModels();
  modelEvents.dispatchEvent(new Event("load"));
  return true;
}

/**
 * @param {HTMLElement} problem
 * @param {string} message
 * @param {string} remedy
 */
function showProblem(problem, message, remedy) {
  const retry = element("button", { type: "button", on: { click: loadModels } }, remedy);
  problem.replaceChildren(element("span", { text: message }), retry);
  problem.hidden = false;
}

function showModels() {
  const name = currentModel()?.id ?? "";
  byId("model-name").textContent = name;
  byId("model-name").hidden = models.length > 1;
  const select = /** @type {HTMLSelectElement} */ (byId("model"));
  select.hidden = models.length < 2;
  select.replaceChildren(
    ...models.map((one) => element("option", { value: one.id, text: one.id })),
  );
  select.value = name;
  select.onchange = () => {
    changeSettings({ model: select.value });
    modelEvents.dispatchEvent(new Event("load"));
  };
}

/**
 * Asks for the API key. Calls while the dialog is open wait for the same answer.
 * @returns {Promise<boolean>}  whether one was given
 */
export function askForKey() {
  asking ??= showKeyDialog().finally(() => {
    asking = null;
  });
  return asking;
}

/** @returns {Promise<boolean>} */
function showKeyDialog() {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  const input = /** @type {HTMLInputElement} */ (byId("key"));
  byId("key-wrong").hidden = !apiKey();
  setApiKey("");
  input.value = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      const isGiven = dialog.returnValue === "use" && input.value.trim() !== "";
      if (isGiven) setApiKey(input.value.trim());
      input.value = "";
      dialog.returnValue = "";
      resolve(isGiven);
    };
  });
}
