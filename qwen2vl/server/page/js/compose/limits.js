/** Why a question cannot be sent: compared with the limits of the server before anything is. */

import { newQuestion, sentMessages } from "../client/conversation.js";
import { encodedSize, megabytes, sizeProblem } from "../client/request.js";
import { count, formatNumber } from "../dom.js";
import { resizedSize, tokensOf, withMaxPixels } from "./resize.js";

/** @typedef {import("./media.js").Media} Media */
/** @typedef {import("../client/api.js").Model} Model */
/** @typedef {{media: Media[], maxPixels: number | null}} Files  of one question */

/**
 * Returns the tokens of a picture; 0 for a video, of which the server chooses the frames.
 * @param {Media} media
 * @param {Model} model
 * @param {number | null} maxPixels
 */
export function pictureTokens(media, { limits }, maxPixels) {
  if (media.kind === "video") return 0;
  const { resize_factor: factor, min_pixels: minPixels, max_pixels } = limits;
  const bounds = withMaxPixels({ factor, minPixels, maxPixels: max_pixels }, maxPixels);
  const size = resizedSize(media.width, media.height, bounds);
  return size ? tokensOf(size, factor) : 0;
}

/**
 * Returns the files of the questions that are sent again with a question after `before`.
 * @param {import("../client/conversation.js").Message[]} before
 * @param {Map<string, Media>} media
 * @returns {Files[]}
 */
export function sentFiles(before, media) {
  const questions = sentMessages([...before, newQuestion("", [], null)]);
  return questions
    .filter((one) => one.role === "user")
    .map(({ media: ids, maxPixels }) => ({
      media: ids.map((id) => media.get(id)).filter((one) => one !== undefined),
      maxPixels,
    }));
}

/**
 * Returns why one file cannot be sent, or an empty string.
 * @param {Media} media
 * @param {Model | null} model
 */
export function fileProblem({ name, kind, blob, width, height }, model) {
  if (!model) return "";
  const { max_body_bytes: bytes, max_image_pixels: pixels } = model.limits;
  if (encodedSize(blob.size) > bytes) {
    const most = megabytes(Math.floor((bytes * 3) / 4 / 1e5) * 1e5);
    return `${name} has ${megabytes(blob.size)}, and a file may have ${most}: sending adds a third, and the server takes ${megabytes(bytes)}. Use a smaller one.`;
  }
  if (kind === "image" && width * height > pixels)
    return `${name} has ${formatNumber(width * height)} pixels, and the server takes ${formatNumber(pixels)}. Use a smaller one.`;
  return "";
}

/**
 * Returns why a question cannot be sent with its files and those of the questions before, which
 * are sent again; an empty string where it can.
 * @param {Files} own
 * @param {Files[]} earlier
 * @param {Model | null} model
 */
export function questionProblem(own, earlier, model) {
  if (!model || own.media.length === 0) return "";
  const all = [...earlier, own];
  const { max_images, max_videos, max_body_bytes } = model.limits;
  return (
    countProblem(own, earlier, "image", "picture", max_images) ||
    countProblem(own, earlier, "video", "video", max_videos) ||
    sizeProblem(
      all.flatMap((one) => one.media),
      max_body_bytes,
    ) ||
    tokensProblem(all, earlier, model)
  );
}

/**
 * @param {Files} own
 * @param {Files[]} earlier
 * @param {Media["kind"]} kind
 * @param {string} noun
 * @param {number | null} limit
 */
function countProblem(own, earlier, kind, noun, limit) {
  const countOf = (/** @type {Files} */ { media }) => media.filter((m) => m.kind === kind).length;
  const before = earlier.reduce((sum, one) => sum + countOf(one), 0);
  const total = before + countOf(own);
  if (limit === null || countOf(own) === 0 || total <= limit) return "";
  const takes = `The server takes ${count(limit, noun)} in one request`;
  if (before === 0) return `${takes}, and these are ${total}. Remove ${total - limit}.`;
  const again = `those of earlier questions are sent again, which makes ${total}`;
  return `${takes}, and ${again}. Remove some, or begin a new conversation.`;
}

/**
 * @param {Files[]} all
 * @param {Files[]} earlier
 * @param {Model} model
 */
function tokensProblem(all, earlier, model) {
  const tokens = all.reduce(
    (sum, { media, maxPixels }) =>
      sum + media.reduce((part, one) => part + pictureTokens(one, model, maxPixels), 0),
    0,
  );
  if (tokens < model.max_model_len) return "";
  const which = earlier.some((one) => one.media.length > 0)
    ? "The pictures of this conversation"
    : "The pictures";
  return `${which} have ${formatNumber(tokens)} tokens, and the context of the model has ${formatNumber(model.max_model_len)} for them, the texts and the answer. Lower “Picture size”, or remove pictures.`;
}
