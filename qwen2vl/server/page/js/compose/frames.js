/**
 * Draws the frames of a video that the server has used, from the file that the browser has: the
 * server says at which times they are, and nothing is sent again.
 */

import { count, element } from "../dom.js";
import { objectUrl } from "./media.js";

/** @typedef {import("./media.js").Media} Media */

const MAX_FRAMES = 64; // drawn; the others are counted
const HEIGHT = 96; // of a drawn frame, in pixels
const SEEK_TIMEOUT = 30_000; // milliseconds
const PRESENT_TIMEOUT = 3000; // milliseconds; without a new frame there is no callback
const HIDDEN_TIMEOUT = 200; // milliseconds, where there are no callbacks: hidden tabs, old browsers
const AFTER = 0.001; // seconds: the times are rounded, and a frame begins at its time

/** @type {Map<string, HTMLElement>} */
const strips = new Map();

/**
 * Returns the strip of the frames that were used; the same one for the same frames.
 * @param {Media} media
 * @param {import("../client/api.js").MediaUsage} usage  what the server has said about the video
 */
export function frameStrip(media, usage) {
  const key = `${media.id} ${usage.tokens} ${usage.frame_timestamps?.join()}`;
  const known = strips.get(key);
  if (known) return known;
  const strip = buildStrip(media, usage);
  strips.set(key, strip);
  return strip;
}

/** Frees the strips of a conversation that is no longer shown. */
export function releaseStrips() {
  strips.clear();
}

/**
 * @param {Media} media
 * @param {import("../client/api.js").MediaUsage} usage
 */
function buildStrip(media, { frame_timestamps, resized_size, tokens }) {
  const times = [...new Set(frame_timestamps)]; // a repeated frame is drawn once
  const shown = times.slice(0, MAX_FRAMES);
  const more = times.length > shown.length ? `, the first ${shown.length} shown` : "";
  const size = `${resized_size.width} × ${resized_size.height}`;
  const title = `${count(times.length, "frame")} of ${size} seen by the model${more} · ${count(tokens, "token")}`;
  const list = element("ol", { class: "frames", tabindex: "0", "aria-label": title });
  const strip = element(
    "div",
    { class: "strip" },
    element("p", { class: "note", text: title }),
    list,
  );
  const canvases = shown.map((seconds) => {
    const canvas = /** @type {HTMLCanvasElement} */ (element("canvas", { "aria-hidden": "true" }));
    canvas.height = HEIGHT;
    canvas.width = Math.round((HEIGHT * (media.width || 16)) / (media.height || 9));
    list.append(element("li", {}, canvas, element("span", { text: `${seconds.toFixed(1)} s` })));
    return canvas;
  });
  const draw = media.type.startsWith("image/") ? drawAnimation : drawVideo;
  draw(media, shown, canvases).catch(() => {
    list.querySelectorAll("canvas").forEach((canvas) => canvas.remove());
  });
  return strip;
}

/**
 * @param {Media} media
 * @param {number[]} times
 * @param {HTMLCanvasElement[]} canvases
 */
async function drawVideo(media, times, canvases) {
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = objectUrl(media);
  await happens(video, "loadeddata");
  for (const [index, seconds] of times.entries()) {
    const isPresented = presentsFrame(video);
    video.currentTime = seconds + AFTER;
    await happens(video, "seeked"); // the frame before may still be what is drawn
    await isPresented;
    drawScaled(video, canvases[index]);
  }
  video.removeAttribute("src");
}

/** @param {HTMLVideoElement} video */
function presentsFrame(video) {
  const isCalled = "requestVideoFrameCallback" in video && !document.hidden;
  const timeout = isCalled ? PRESENT_TIMEOUT : HIDDEN_TIMEOUT;
  return new Promise((resolve) => {
    video.requestVideoFrameCallback?.(resolve);
    video.addEventListener("seeked", () => setTimeout(resolve, timeout), { once: true });
  });
}

/**
 * @param {HTMLVideoElement} video
 * @param {string} type
 */
function happens(video, type) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(reject, SEEK_TIMEOUT);
    video.addEventListener("error", reject, { once: true });
    video.addEventListener(
      type,
      (event) => {
        clearTimeout(timer);
        resolve(event);
      },
      { once: true },
    );
  });
}

/**
 * @param {Media} media
 * @param {number[]} times
 * @param {HTMLCanvasElement[]} canvases
 */
async function drawAnimation(media, times, canvases) {
  const data = await media.blob.arrayBuffer();
  const decoder = new ImageDecoder({ data, type: media.type });
  await Promise.all([decoder.completed, decoder.tracks.ready]);
  const total = decoder.tracks.selectedTrack?.frameCount ?? 0;
  let next = 0;
  let end = 0; // seconds at which the frame ends
  for (let index = 0; index < total && next < times.length; index++) {
    const { image } = await decoder.decode({ frameIndex: index });
    end += (image.duration ?? 0) / 1e6;
    const isLast = index === total - 1;
    while (next < times.length && (isLast || times[next] + AFTER < end)) {
      drawScaled(image, canvases[next++]);
    }
    image.close();
  }
  decoder.close();
}

/**
 * @param {CanvasImageSource} source
 * @param {HTMLCanvasElement} canvas
 */
function drawScaled(source, canvas) {
  canvas.getContext("2d")?.drawImage(source, 0, 0, canvas.width, canvas.height);
}
