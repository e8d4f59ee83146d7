/** Writes the body of a chat request for a conversation and the settings. */

import { RequestError } from "./api.js";
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
  for (const message of messages) {
    if (message.role === "assistant") {
      if (message.text) written.push({ role: "assistant", content: message.text });
      continue; // an answer that failed is left out
    }
    /** @type {any[]} */
    const items = [];
    for (const one of message.media.map((id) => media.get(id)).filter((found) => !!found)) {
      paths[`messages[${written.length}].content[${items.length}]`] = one.id;
      items.push(toItem(one, settings, toUrl));
    }
    if (message.text) items.push({ type: "text", text: message.text });
    written.push({ role: "user", content: /** @type {any} */ (items) });
  }
  const body = {
    model,
    messages: written,
    max_tokens: settings.maxTokens,
    ...(settings.temperature === null ? {} : { temperature: settings.temperature }),
    return_grounding: true,
  };
  return { body, paths };
}

/**
 * @param {Media} media
 * @param {Settings} settings
 * @param {(media: Media) => unknown} toUrl
 */
function toItem(media, settings, toUrl) {
  const url = toUrl(media);
  if (media.kind === "video") return { type: "video_url", video_url: { url } };
  const size = settings.maxPixels === null ? {} : { max_pixels: settings.maxPixels };
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
  const ids = messages.flatMap((one) => (one.role === "user" ? one.media : []));
  const files = ids.map((id) => media.get(id)).filter((found) => !!found);
  const size = files.reduce((sum, { blob }) => sum + 4 * Math.ceil(blob.size / 3), 0); // as base64
  if (size > model.limits.max_body_bytes) throw new RequestError(tooLarge(size, model));
  /** @type {Map<string, string>} */
  const urls = new Map();
  for (const one of files) urls.set(one.id, await dataUrl(one));
  return buildRequest(messages, media, settings, model.id, (one) => urls.get(one.id));
}

/**
 * @param {number} size
 * @param {import("./api.js").Model} model
 */
function tooLarge(size, model) {
  const [given, limit] = [size, model.limits.max_body_bytes].map(
    (n) => `${(n / 1e6).toFixed(0)} MB`,
  );
  return `The pictures and videos of this conversation are too large: ${given} as they are sent, and the server takes ${limit}. Use smaller files, or begin a new conversation.`;
}
