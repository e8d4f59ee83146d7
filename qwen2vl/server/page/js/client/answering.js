/** Receives one answer. */

import { RequestError, isAbort, streamChat, untilAborted } from "./api.js";
import { explain } from "./explain.js";
import { currentModel, loadModels } from "./models.js";
import { prepareRequest } from "./request.js";

/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("./conversation.js").Conversation} Conversation */
/**
 * @typedef {object} Run  a request that is under way
 * @property {Conversation} conversation
 * @property {Map<string, Media>} media
 * @property {import("./conversation.js").Answer} answer
 * @property {AbortController} controller
 */

/**
 * Sends the messages before an answer, and writes into the answer what arrives, or what went wrong.
 * @param {Run} run
 * @param {import("./conversation.js").Message[]} before
 * @param {() => void} onPart  called for each part of the answer
 * @returns {Promise<boolean>}  whether the server has refused the key
 */
export async function receiveAnswer(run, before, onPart) {
  const { answer, controller } = run;
  try {
    await receive(run, before, onPart);
    return false;
  } catch (error) {
    const isStopped = isAbort(error) || controller.signal.aborted;
    answer.state = isStopped ? "stopped" : "failed";
    if (!isStopped) Object.assign(answer, describe(error, before, run));
    return error instanceof RequestError && error.status === 401;
  }
}

/**
 * @param {Run} run
 * @param {import("./conversation.js").Message[]} before
 * @param {() => void} onPart
 */
async function receive({ answer, media, controller: { signal } }, before, onPart) {
  if (!currentModel()) await untilAborted(loadModels(), signal);
  const model = currentModel();
  if (!model) throw new RequestError("The server has not said which models it has. Try again.");
  answer.model = model.id;
  const prepared = prepareRequest(before, media, answer.settings, model);
  const request = await untilAborted(prepared, signal);
  answer.paths = request.paths;
  const body = { ...request.body, stream: true, stream_options: { include_usage: true } };
  for await (const part of streamChat(body, signal)) {
    signal.throwIfAborted();
    if (part.event === "accepted") answer.state = "running";
    else if (part.event === "text") answer.text += part.text;
    else if (part.event === "grounding") answer.grounding = part.grounding;
    else if (part.event === "usage") answer.usage = part.usage;
    else answer.state = part.reason === "length" ? "cut" : "done";
    onPart();
  }
  if (answer.state === "running") answer.state = "done";
}

/**
 * @param {unknown} error
 * @param {import("./conversation.js").Message[]} before
 * @param {Run} run
 */
function describe(error, before, { answer, media }) {
  if (error instanceof RequestError) return explain(error, before, media, answer.paths);
  console.error(error);
  return {
    error: error instanceof Error ? `The page has failed: ${error.message}` : String(error),
  };
}
