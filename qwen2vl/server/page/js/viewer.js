/** Shows one picture in its full size. */

import { byId } from "./dom.js";
import { objectUrl } from "./compose/media.js";

/** @param {import("./compose/media.js").Media} media */
export function showPicture(media) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("viewer"));
  const image = /** @type {HTMLImageElement} */ (byId("viewer-image"));
  image.src = objectUrl(media);
  image.alt = `Picture ${media.name}`;
  byId("viewer-title").textContent = `${media.name}, ${media.width} × ${media.height}`;
  dialog.showModal();
}
