/** Writes a conversation as a file: Markdown for reading, or JSON with its pictures and videos. */

import { plainText, shapeLines } from "../answers/plain_text.js";
import { dataUrl } from "../compose/media.js";
import { element } from "../dom.js";

/** @typedef {import("../client/conversation.js").Conversation} Conversation */
/** @typedef {Map<string, import("../compose/media.js").Media>} MediaMap */

/**
 * Lets the browser save a conversation.
 * @param {Conversation} conversation
 * @param {MediaMap} media
 * @param {"md" | "json"} format
 */
export async function saveAsFile(conversation, media, format) {
  const isJson = format === "json";
  const text = isJson ? await toJson(conversation, media) : toMarkdown(conversation, media);
  const type = isJson ? "application/json" : "text/markdown";
  const url = URL.createObjectURL(new Blob([text], { type }));
  const name = conversation.title.replace(/[^\p{L}\p{N} _-]+/gu, "").trim() || "conversation";
  element("a", { href: url, download: `${name}.${format}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it later
}

/**
 * @param {Conversation} conversation
 * @param {MediaMap} media
 */
function toMarkdown({ title, messages }, media) {
  const parts = [`# ${title}`];
  for (const message of messages) {
    if (message.role === "user") {
      const files = message.media.map((id, index) => `- file ${index + 1}: ${nameOf(media, id)}`);
      parts.push("## Question", ...(files.length > 0 ? [files.join("\n")] : []), message.text);
      continue;
    }
    parts.push(`## Answer${message.model ? ` of ${message.model}` : ""}`);
    parts.push(plainText(message) || message.error || "(none)");
    const lines = shapeLines(message);
    if (lines.length > 0) parts.push(lines.map((line) => `- ${line}`).join("\n"));
  }
  return `${parts.join("\n\n")}\n`;
}

/**
 * @param {Conversation} conversation
 * @param {MediaMap} media
 */
async function toJson({ title, updated, messages }, media) {
  const written = messages.map(async (message) => {
    if (message.role === "assistant") {
      const { role, model, state, error, grounding, usage } = message;
      return { role, model, state, error, text: plainText(message), grounding, usage };
    }
    const files = message.media.map(async (id) => {
      const one = media.get(id);
      if (!one) return { name: nameOf(media, id) };
      const { name, type, width, height } = one;
      return { name, type, width, height, url: await dataUrl(one) };
    });
    const { role, text, maxPixels } = message;
    return { role, text, max_pixels: maxPixels, files: await Promise.all(files) };
  });
  const date = new Date(updated).toISOString();
  return `${JSON.stringify({ title, updated: date, messages: await Promise.all(written) }, null, 2)}\n`;
}

/**
 * @param {MediaMap} media
 * @param {string} id
 */
function nameOf(media, id) {
  return media.get(id)?.name ?? "no longer stored";
}
