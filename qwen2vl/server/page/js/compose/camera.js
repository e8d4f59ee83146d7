/** Takes a picture with the camera. */

import { byId } from "../dom.js";

/**
 * Shows the camera; without access to it, a phone's own camera program is opened by a file input.
 * @param {(file: File) => void} onPicture
 * @param {(sentence: string) => void} onProblem
 */
export function openCamera(onPicture, onProblem) {
  if (!navigator.mediaDevices?.getUserMedia) {
    byId("camera-file").click(); // pages that are not served by localhost or https
    return;
  }
  navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } }).then(
    (stream) => showCamera(stream, onPicture),
    (error) => onProblem(describe(error)),
  );
}

/**
 * @param {MediaStream} stream
 * @param {(file: File) => void} onPicture
 */
function showCamera(stream, onPicture) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("camera-dialog"));
  const video = /** @type {HTMLVideoElement} */ (byId("camera-video"));
  const take = /** @type {HTMLButtonElement} */ (byId("camera-take"));
  take.disabled = true; // until there is a picture
  video.onloadeddata = () => {
    take.disabled = false;
  };
  video.srcObject = stream;
  dialog.onclose = () => {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
  take.onclick = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    canvas.getContext("2d")?.drawImage(video, 0, 0);
    canvas.toBlob(
      (blob) => blob && onPicture(new File([blob], "camera.jpg", { type: "image/jpeg" })),
      "image/jpeg",
      0.92,
    );
    dialog.close();
  };
  dialog.showModal();
}

/** @param {unknown} error */
function describe(error) {
  const name = error instanceof DOMException ? error.name : "";
  if (name === "NotAllowedError")
    return "The camera is blocked. Allow it for this page in the browser.";
  if (name === "NotFoundError") return "This device has no camera.";
  return "The camera cannot be used: another program may have it open.";
}
