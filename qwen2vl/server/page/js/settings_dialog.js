/** The dialog of the settings. */

import { byId } from "./dom.js";
import { askForKey, loadModels } from "./client/models.js";
import { DEFAULTS, apiKey, changeSettings, setApiKey, settings } from "./client/settings.js";

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
    maxTokens.value = String(settings().maxTokens);
    temperature.value = settings().temperature === null ? "" : String(settings().temperature);
    byId("forget-key").hidden = apiKey() === "";
    confirm.hidden = true;
    dialog.showModal();
  });
  theme.addEventListener("change", () =>
    changeSettings({ theme: /** @type {any} */ (theme.value) }),
  );
  system.addEventListener("change", () => changeSettings({ system: system.value.trim() }));
  maxTokens.addEventListener("change", () => {
    const given = maxTokens.valueAsNumber;
    changeSettings({ maxTokens: given >= 1 ? Math.floor(given) : DEFAULTS.maxTokens });
    maxTokens.value = String(settings().maxTokens);
  });
  temperature.addEventListener("change", () => {
    const given = temperature.valueAsNumber;
    const isValid = given >= 0 && given <= 2;
    changeSettings({ temperature: isValid ? given : null });
    if (!isValid) temperature.value = "";
  });
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
