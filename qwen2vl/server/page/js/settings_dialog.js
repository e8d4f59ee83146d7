/** The dialog of the settings. */

import { byId } from "./dom.js";
import { askForKey, loadModels } from "./client/models.js";
import { apiKey, changeSettings, setApiKey, settings } from "./client/settings.js";

/** @param {() => Promise<void>} deleteAll  deletes all conversations */
export function prepareSettings(deleteAll) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("settings-dialog"));
  const theme = /** @type {HTMLSelectElement} */ (byId("theme"));
  const system = /** @type {HTMLTextAreaElement} */ (byId("system"));
  const maxTokens = /** @type {HTMLInputElement} */ (byId("max-tokens"));
  const temperature = /** @type {HTMLInputElement} */ (byId("temperature"));
  const confirm = byId("delete-all-confirm");

  byId("settings").addEventListener("click", () => {
    theme.value = settings().theme;
    system.value = settings().system;
    for (const [field, value] of /** @type {const} */ ([
      [maxTokens, settings().maxTokens],
      [temperature, settings().temperature],
    ])) {
      field.value = value === null ? "" : String(value);
      showInvalid(field, false);
    }
    byId("forget-key").hidden = apiKey() === "";
    confirm.hidden = true;
    dialog.showModal();
  });
  theme.addEventListener("change", () =>
    changeSettings({ theme: /** @type {any} */ (theme.value) }),
  );
  system.addEventListener("change", () => changeSettings({ system: system.value.trim() }));
  /** @type {(value: number | null) => void} */
  const takeMaxTokens = (value) => changeSettings({ maxTokens: value });
  maxTokens.addEventListener("change", () => takeNumber(maxTokens, takeMaxTokens));
  /** @type {(value: number | null) => void} */
  const takeTemperature = (value) => changeSettings({ temperature: value });
  temperature.addEventListener("change", () => takeNumber(temperature, takeTemperature));
  byId("enter-key").addEventListener("click", async () => {
    dialog.close();
    if (await askForKey()) loadModels();
  });
  byId("forget-key").addEventListener("click", () => {
    setApiKey("");
    byId("forget-key").hidden = true;
  });
  byId("delete-all").addEventListener("click", () => {
    confirm.hidden = false;
    byId("delete-all-now").focus();
  });
  byId("delete-all-now").addEventListener("click", async () => {
    await deleteAll();
    confirm.hidden = true;
    byId("delete-all").focus();
  });
}

/**
 * Takes a number, or null for an empty field. A value that is not allowed changes nothing; the note
 * below the field, which has the range, then is a warning.
 * @param {HTMLInputElement} field
 * @param {(value: number | null) => void} take
 */
function takeNumber(field, take) {
  const { valid, stepMismatch } = field.validity;
  const isAllowed = valid || (stepMismatch && field.step !== "1"); // 0.25 is a temperature, too
  showInvalid(field, !isAllowed);
  if (isAllowed) take(field.value === "" ? null : field.valueAsNumber);
}

/**
 * @param {HTMLInputElement} field
 * @param {boolean} isInvalid
 */
function showInvalid(field, isInvalid) {
  field.setAttribute("aria-invalid", String(isInvalid));
  byId(`${field.id}-range`).classList.toggle("wrong", isInvalid);
}
