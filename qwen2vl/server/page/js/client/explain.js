/** Says what the server has refused in the words of the page: its pictures and its settings. */

import { toSentence } from "./api.js";
import { formatNumber } from "../dom.js";

/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").Remedies} Remedies */

const PATH = /messages\[\d+\](?:\.content(?:\[\d+\])?)?/g;
const NEEDS_KEY = "This server needs an API key: enter it.";

/**
 * Returns the sentence for an error, and what the page can do about it.
 * @param {import("./api.js").RequestError} error
 * @param {Message[]} before  the messages of the request
 * @param {Map<string, Media>} media
 * @param {Record<string, string>} paths  of the request: path of a picture -> its id
 * @returns {{error: string, remedies: Remedies}}
 */
export function explain(error, before, media, paths) {
  if (error.status === 401) return { error: NEEDS_KEY, remedies: { key: true } };
  if (error.code === "context_length_exceeded") return explainContext(error, before);
  const named = (/** @type {string} */ path) => nameOf(paths[path], before, media);
  const own = named(error.param);
  const text = error.original
    .replace(/^(?:image|video) \d+\b/, (same) => own || same)
    .replace(/^messages\S*: the request/, "the request") // counts name the first one over
    .replace(new RegExp(`^(${PATH.source}): `), (_, path) => prefix(named(path)))
    .replace(PATH, (path) => named(path) || "the conversation")
    .replace(/ \(--[\w-]+\)/g, "")
    .replaceAll("max_tokens", "“Longest answer”")
    .replaceAll("max_pixels", "“Picture size”");
  return { error: toSentence(text), remedies: {} };
}

/** @param {string} name */
function prefix(name) {
  return name ? `${name}: ` : "";
}

/**
 * Returns the name of a picture or video: its place in its question, and its file.
 * @param {string} id
 * @param {Message[]} before
 * @param {Map<string, Media>} media
 */
function nameOf(id, before, media) {
  const one = media.get(id);
  const questions = before.filter((message) => message.role === "user");
  const at = questions.findIndex((message) => message.media.includes(id));
  if (!one || at < 0) return "";
  const place = questions[at].media.indexOf(id) + 1;
  const where = at < questions.length - 1 ? ` of question ${at + 1}` : "";
  return `${one.kind === "video" ? "Video" : "Picture"} ${place}${where} (${one.name})`;
}

/**
 * @param {import("./api.js").RequestError} error
 * @param {Message[]} before
 * @returns {{error: string, remedies: Remedies}}
 */
function explainContext({ original }, before) {
  const [, total, limit] =
    /= ([\d,]+) > ([\d,]+), the context/.exec(original) ??
    /prompt has ([\d,]+)\b.*? more than (\d[\d,]*\d)/.exec(original) ??
    [];
  const counts = total ? `: ${total} tokens, and the context of the model has ${limit}` : "";
  const longest = /\+ ([\d,]+) of the output/.exec(original)?.[1];
  const pixels = Number(/lower max_pixels to ([\d,]+)/.exec(original)?.[1].replaceAll(",", ""));
  const advice = longest
    ? ` ${longest} of them are kept free for the answer (“Longest answer” in the settings).`
    : pixels
      ? " Make the pictures smaller (“Picture size”), or begin a new conversation."
      : " Shorten the question, or begin a new conversation.";
  const isLimitable = pixels && onlyInLast(before);
  return {
    error: `The conversation does not fit into the model${counts}.${advice}`,
    remedies: { ...(longest ? { tokens: true } : {}), ...(isLimitable ? { pixels } : {}) },
  };
}

/**
 * Returns whether all pictures are in the last question, whose size the page may then change.
 * @param {Message[]} before
 */
function onlyInLast(before) {
  return before.slice(0, -1).every((one) => one.role !== "user" || one.media.length === 0);
}

/**
 * Returns what the button of a smaller size says.
 * @param {number} pixels
 * @param {number} factor  sides of a resized picture are multiples of it
 */
export function smallerText(pixels, factor) {
  return `Ask with at most ${formatNumber(Math.floor(pixels / factor ** 2))} tokens a picture`;
}
