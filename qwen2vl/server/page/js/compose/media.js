/** Pictures and videos of the user: opens files, measures them, and writes them as data URLs. */

import { newId } from "../dom.js";

/**
 * @typedef {object} Media
 * @property {string} id
 * @property {"image" | "video"} kind  an animated picture is a video
 * @property {string} name  of the file
 * @property {string} type  media type, such as image/png
 * @property {Blob} blob  the file, unchanged
 * @property {number} width  upright, in pixels; 0: the browser cannot show it
 * @property {number} height
 */

const ANIMATED_TYPES = ["image/gif", "image/webp", "image/png"];

const SAVE_AS = "which the server cannot read. Save it as JPEG or PNG.";
/** @type {[string[], string][]} */
const UNREADABLE = [
  [
    ["heic", "heif", "image/heic", "image/heif"],
    `a HEIC photo, ${SAVE_AS} An iPhone takes JPEG with Settings > Camera > Formats > Most Compatible.`,
  ],
  [["svg", "image/svg+xml"], `an SVG drawing, ${SAVE_AS}`],
  [["avif", "image/avif"], `an AVIF picture, ${SAVE_AS}`],
  [["jxl", "image/jxl"], `a JPEG XL picture, ${SAVE_AS}`],
  [["jp2", "image/jp2"], `a JPEG 2000 picture, ${SAVE_AS}`],
  [["psd", "image/vnd.adobe.photoshop"], `a Photoshop document, ${SAVE_AS}`],
  [
    ["pdf", "application/pdf"],
    "a PDF document, which the server cannot read. Save its pages as PNG.",
  ],
];

const MEASURE_TIMEOUT = 5000; // milliseconds, for a video

/** @type {Map<string, string>} */
const objectUrls = new Map();
/** @type {Map<string, Promise<string>>} */
const dataUrls = new Map();

/**
 * Opens a file.
 * @param {File} file
 * @returns {Promise<Media>}
 * @throws {Error} with a sentence, if it is neither a picture nor a video
 */
export async function readMedia(file) {
  const name = file.name || "picture.png"; // what is pasted has no name
  const media = {
    id: newId(),
    kind: /** @type {const} */ ("image"),
    name,
    type: file.type,
    blob: file,
  };
  if (file.type.startsWith("video/")) {
    return { ...media, kind: "video", ...(await measureVideo(file)) };
  }
  const format = unreadableFormat(file);
  if (format) throw new Error(`${name} is ${format}`);
  if (!file.type.startsWith("image/")) {
    throw new Error(`${name} is neither a picture nor a video.`);
  }
  const size = await measureImage(file, name);
  return { ...media, kind: (await isAnimated(file)) ? "video" : "image", ...size };
}

/**
 * Returns what a file is that the server cannot read, and the remedy; an empty string for others.
 * The browser may not know its type, so the end of its name counts, too.
 * @param {File} file
 */
function unreadableFormat({ name, type }) {
  const ending = name.slice(name.lastIndexOf(".") + 1).toLowerCase();
  const found = UNREADABLE.find(([types]) => types.includes(ending) || types.includes(type));
  return found ? found[1] : "";
}

/**
 * @param {Blob} blob
 * @param {string} name
 */
async function measureImage(blob, name) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    throw new Error(
      `${name} cannot be opened: it is damaged, or of a format that this browser does not know. Use PNG or JPEG.`,
    );
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/**
 * Returns the size of a video; 0 x 0 if this browser cannot play it, which the server may still do.
 * @param {Blob} blob
 * @returns {Promise<{width: number, height: number}>}
 */
function measureVideo(blob) {
  const video = document.createElement("video");
  video.preload = "metadata";
  video.src = URL.createObjectURL(blob);
  return new Promise((resolve) => {
    const finish = () => {
      clearTimeout(timer);
      resolve({ width: video.videoWidth, height: video.videoHeight });
      URL.revokeObjectURL(video.src);
    };
    const timer = setTimeout(finish, MEASURE_TIMEOUT);
    video.onloadedmetadata = finish;
    video.onerror = finish;
  });
}

/** @param {Blob} blob */
async function isAnimated(blob) {
  if (!ANIMATED_TYPES.includes(blob.type)) return false;
  if (!("ImageDecoder" in window)) return blob.type === "image/gif"; // needs localhost or https
  const decoder = new ImageDecoder({ data: await blob.arrayBuffer(), type: blob.type });
  try {
    await Promise.all([decoder.completed, decoder.tracks.ready]);
    return (decoder.tracks.selectedTrack?.frameCount ?? 1) > 1;
  } catch {
    return false;
  } finally {
    decoder.close();
  }
}

/**
 * Returns a URL under which this page shows a file.
 * @param {Media} media
 */
export function objectUrl(media) {
  const known = objectUrls.get(media.id);
  if (known) return known;
  const url = URL.createObjectURL(media.blob);
  objectUrls.set(media.id, url);
  return url;
}

/**
 * Returns a file as a data URL.
 * @param {Media} media
 * @returns {Promise<string>}
 */
export function dataUrl(media) {
  const known = dataUrls.get(media.id) ?? readAsDataUrl(media);
  dataUrls.set(media.id, known);
  known.catch(() => dataUrls.delete(media.id)); // "Try again" reads it again
  return known;
}

/**
 * @param {Media} media
 * @returns {Promise<string>}
 */
function readAsDataUrl(media) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(/** @type {string} */ (reader.result));
    reader.onerror = () => reject(new Error(`${media.name} cannot be read. Choose it again.`));
    reader.readAsDataURL(media.blob);
  });
}

/** Frees what was made of the files of a conversation that is no longer shown. */
export function releaseMedia() {
  for (const url of objectUrls.values()) URL.revokeObjectURL(url);
  objectUrls.clear();
  dataUrls.clear();
}
