/** Writes the body of a chat request for a conversation and the settings. */

import { RequestError } from "./api.js";
import { sentMessages } from "./conversation.js";
import { dataUrl } from "../compose/media.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./settings.js").Settings} Settings */

/**
 * @typedef {object} ChatRequest
 * @property {object} body
 * @property {Record<string, string>} paths  path of each picture or video in the body -> its id
 */

/**
 * Builds the request for the answer that follows `messages`.
 * @param {Message[]} messages
 * @param {Map<string, Media>} media
 * @param {Settings} settings
 * @param {string} model
 * @param {(media: Media) => unknown} toUrl  what stands for the content of a file
 * @returns {ChatRequest}
 */
export function buildRequest(messages, media, settings, model, toUrl) {
  /** @type {Record<string, string>} */
  const paths = {};
  const written = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const message of sentMessages(messages)) {
    if (message.role === "assistant") {
      written.push({ role: "assistant", content: message.text });
      continue;
    }
    /** @type {any[]} */
    const items = [];
    for (const one of message.media.map((id) => media.get(id)).filter((found) => !!found)) {
      paths[`messages[${written.length}].content[${items.length}]`] = one.id;
      items.push(toItem(one, message.maxPixels, toUrl));
    }
    if (message.text) items.push({ type: "text", text: message.text });
    written.push({ role: "user", content: /** @type {any} */ (items) });
  }
  const body = {
    model,
    messages: written,
    ...(settings.maxTokens === null ? {} : { max_tokens: settings.maxTokens }),
    ...(settings.temperature === null ? {} : { temperature: settings.temperature }),
    return_grounding: true,
  };
  return { body, paths };
}

/**
 * @param {Media} media
 * @param {number | null} maxPixels
 * @param {(media: Media) => unknown} toUrl
 */
function toItem(media, maxPixels, toUrl) {
  const url = toUrl(media);
  if (media.kind === "video") return { type: "video_url", video_url: { url } };
  const size = maxPixels === null ? {} : { max_pixels: maxPixels };
  return { type: "image_url", image_url: { url }, ...size };
}

/**
 * Builds a request with the content of all files.
 * @param {Message[]} messages
 * @param {Map<string, Media>} media
 * @param {Settings} settings
 * @param {import("./api.js").Model} model
 * @returns {Promise<ChatRequest>}
 */
export async function prepareRequest(messages, media, settings, model) {
  const ids = sentMessages(messages).flatMap((one) => (one.role === "user" ? one.media : []));
  const files = ids.map((id) => media.get(id)).filter((found) => !!found);
  const problem = sizeProblem(files, model.limits.max_body_bytes);
  if (problem) throw new RequestError(problem);
  /** @type {Map<string, string>} */
  const urls = new Map();
  for (const one of files) urls.set(one.id, await dataUrl(one));
  return buildRequest(messages, media, settings, model.id, (one) => urls.get(one.id));
}

/**
 * Returns why files cannot be sent in one request, or an empty string.
 * @param {Media[]} files
 * @param {number} limit  of the request, in bytes
 */
export function sizeProblem(files, limit) {
  const size = files.reduce((sum, { blob }) => sum + encodedSize(blob.size), 0);
  if (size <= limit) return "";
  const which =
    files.length > 1 ? "The pictures and videos of this conversation have" : `${files[0].name} has`;
  return `${which} ${megabytes(size)} as they are sent, a third more than their files, and the server takes ${megabytes(limit)}. Use smaller files, or begin a new conversation.`;
}

/**
 * Returns the size of a file as base64.
 * @param {number} bytes
 */
export function encodedSize(bytes) {
  return 4 * Math.ceil(bytes / 3);
}

/** @param {number} bytes */
export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1).replace(/\.0$/, "")} MB`;
}
