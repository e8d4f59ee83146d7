/** Calls the server's API. URLs are relative, so that the page works behind a path of a proxy. */

import { createParser } from "../../vendor/eventsource-parser.js";
import { apiKey } from "./settings.js";

/** A refusal or a failure; its message is a sentence for the user. */
export class RequestError extends Error {
  /**
   * @param {string} message
   * @param {number} [status]  of HTTP; 0: there was no response
   * @param {{code?: string, param?: string, message?: string}} [details]  of the server
   */
  constructor(message, status = 0, details = {}) {
    super(message);
    this.name = "RequestError";
    this.status = status;
    this.code = details.code ?? "";
    this.param = details.param ?? ""; // path of what is wrong in the request
    this.original = details.message ?? message; // in the words of the API
  }
}

const NO_ANSWER =
  "The server cannot be reached. Check that it is running and that the network works, then try again.";
const BROKEN_OFF = "The connection ended before the answer was complete. Try again.";

/**
 * @typedef {object} Limits  of /v1/models
 * @property {number} max_images
 * @property {number} max_videos
 * @property {number} max_image_pixels
 * @property {number} min_pixels
 * @property {number} max_pixels
 * @property {number} resize_factor
 * @property {number} max_body_bytes
 */
/** @typedef {{id: string, max_model_len: number, limits: Limits}} Model */

/**
 * @typedef {{event: "accepted"} | {event: "text", text: string}
 *   | {event: "grounding", grounding: import("../answers/boxes.js").Shape[]}
 *   | {event: "finish", reason: string} | {event: "usage", usage: Usage}} StreamEvent
 */

/**
 * @typedef {object} MediaUsage
 * @property {string} param
 * @property {"image" | "video"} type
 * @property {{width: number, height: number}} original_size
 * @property {{width: number, height: number}} resized_size
 * @property {number} tokens
 * @property {number[]} [frame_timestamps]
 * @property {string[]} notes
 */
/**
 * @typedef {object} Usage
 * @property {number} prompt_tokens
 * @property {number} completion_tokens
 * @property {{image_tokens: number, video_tokens: number}} [prompt_tokens_details]
 * @property {MediaUsage[]} [media]
 * @property {Record<string, number>} [timings_ms]
 */

/**
 * Returns the models that the server has.
 * @returns {Promise<Model[]>}
 */
export async function getModels() {
  const response = await call("v1/models", {});
  return (await response.json()).data;
}

/**
 * Sends a chat request and yields what the server streams.
 * @param {object} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<StreamEvent>}
 */
export async function* streamChat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  yield { event: "accepted" };
  let isComplete = false;
  for await (const data of readEvents(response)) {
    if (data === "[DONE]") {
      isComplete = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestError(toSentence(chunk.error.message), 200, chunk.error);
    for (const choice of chunk.choices) yield* eventsOf(choice);
    if (chunk.usage) yield { event: "usage", usage: chunk.usage };
  }
  if (!isComplete) throw new RequestError(BROKEN_OFF);
}

/**
 * @param {any} choice  of a chunk
 * @returns {Generator<StreamEvent>}
 */
function* eventsOf({ delta, finish_reason }) {
  if (delta.content) yield { event: "text", text: delta.content };
  if (delta.grounding?.length) yield { event: "grounding", grounding: delta.grounding };
  if (finish_reason) yield { event: "finish", reason: finish_reason };
}

/**
 * Yields the data of each server-sent event.
 * @param {Response} response
 * @returns {AsyncGenerator<string>}
 */
async function* readEvents(response) {
  /** @type {string[]} */
  const received = [];
  const parser = createParser({
    onEvent: (/** @type {{data: string}} */ event) => received.push(event.data),
  });
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body)
    .pipeThrough(/** @type {any} */ (new TextDecoderStream()))
    .getReader();
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      parser.feed(value);
      yield* received.splice(0);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {ReadableStreamDefaultReader<any>} reader */
async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw isAbort(error) ? error : new RequestError(BROKEN_OFF);
  }
}

/**
 * @param {string} path
 * @param {RequestInit} options
 */
async function call(path, options) {
  const headers = new Headers(options.headers);
  const key = apiKey();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    throw isAbort(error) ? error : new RequestError(NO_ANSWER);
  }
  if (!response.ok) throw await toError(response);
  return response;
}

/** @param {Response} response */
async function toError(response) {
  try {
    const { error } = await response.json();
    return new RequestError(toSentence(error.message), response.status, error);
  } catch {
    const { status } = response; // not of this server
    return new RequestError(`The server answered with the status ${status}.`, status);
  }
}

/**
 * Returns an error's text with a capital letter and a period.
 * @param {unknown} message
 */
export function toSentence(message) {
  const text = String(message).trim();
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

/**
 * Waits for a promise, but not longer than until the signal is aborted.
 * @template T
 * @param {Promise<T>} promise
 * @param {AbortSignal} signal
 * @returns {Promise<T>}
 */
export function untilAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    promise.then(resolve, reject);
    if (signal.aborted) reject(signal.reason);
    else signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** @param {unknown} error */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}
