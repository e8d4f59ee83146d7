/**
 * Writes the request of an answer as a curl command and as a Python program. Both read the pictures
 * from files, and neither has the API key.
 */

import { byId, copyText, newId } from "../dom.js";
import { apiKey } from "../client/settings.js";
import { buildRequest } from "../client/request.js";

/** @typedef {import("../compose/media.js").Media} Media */
/** @typedef {import("../client/conversation.js").Message} Message */

const MARK = `code-${newId()}`; // around what is code in a value; no text holds it by chance

/** @param {string} path */
function serverUrl(path) {
  return new URL(path, document.baseURI).href;
}

/**
 * Shows the request of an answer.
 * @param {Message[]} messages  before the answer
 * @param {Map<string, Media>} media
 * @param {import("../client/conversation.js").Answer} answer
 */
export function showRequestCode(messages, media, answer) {
  /** @param {(one: Media) => string} toCode */
  const body = (toCode) =>
    buildRequest(messages, media, answer.settings, answer.model, (one) => MARK + toCode(one) + MARK)
      .body;
  const texts = {
    curl: curlCommand(
      body((one) => shellDataUrl(fileName(one), mediaType(one))),
      Boolean(apiKey()),
    ),
    python: pythonProgram(
      body((one) => pythonDataUrl(fileName(one), mediaType(one))),
      Boolean(apiKey()),
    ),
  };
  const dialog = /** @type {HTMLDialogElement} */ (byId("code-dialog"));
  const tabs = { curl: byId("code-curl"), python: byId("code-python") };
  let shown = /** @type {keyof typeof texts} */ ("curl");
  const show = (/** @type {keyof typeof texts} */ name) => {
    shown = name;
    byId("code-text").textContent = texts[name];
    for (const [one, tab] of Object.entries(tabs))
      tab.setAttribute("aria-pressed", String(one === name));
  };
  tabs.curl.onclick = () => show("curl");
  tabs.python.onclick = () => show("python");
  byId("code-copy").onclick = () => copyText(texts[shown], byId("code-copy"));
  show("curl");
  dialog.showModal();
}

/**
 * Returns a command; its body is a here-document, because pictures are too long for an argument.
 * @param {object} body
 * @param {boolean} hasKey
 */
export function curlCommand(body, hasKey) {
  const json = JSON.stringify(body, null, 2)
    .split(MARK)
    .map((part, index) => (index % 2 ? JSON.parse(`"${part}"`) : part.replace(/[\\$`]/g, "\\$&")))
    .join("");
  const lines = [
    `curl ${quoted(serverUrl("v1/chat/completions"))}`,
    ...(hasKey ? ['-H "Authorization: Bearer $QWEN2VL_API_KEY"'] : []),
    "-H 'Content-Type: application/json'",
    "-d @- <<END",
  ];
  return `${lines.join(" \\\n  ")}\n${json}\nEND\n`;
}

/**
 * Returns the name of a file for the code: a line of its own would end the here-document, and
 * characters that order the direction of writing would show another name than the shell reads.
 * @param {Media} media
 */
function fileName({ name }) {
  return name.replace(/[\p{Cc}\p{Zl}\p{Zp}\u200e\u200f\u202a-\u202e\u2066-\u2069/]/gu, "_");
}

/** @param {Media} media */
function mediaType({ type, kind }) {
  const isPlain = /^[\w.+-]+\/[\w.+-]+$/.test(type);
  return isPlain ? type : kind === "video" ? "video/mp4" : "image/png";
}

/**
 * Quotes a word for the shell, where that is needed.
 * @param {string} word
 */
function quoted(word) {
  return /^[\w.:/-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/**
 * @param {string} name  of a file
 * @param {string} type
 */
function shellDataUrl(name, type) {
  return `data:${type};base64,$(base64 < ${quoted(name)} | tr -d '\\n')`;
}

/**
 * @param {string} name
 * @param {string} type
 */
function pythonDataUrl(name, type) {
  return `data_url(${JSON.stringify(name)}, ${JSON.stringify(type)})`;
}

/**
 * @param {any} body
 * @param {boolean} hasKey
 */
export function pythonProgram(body, hasKey) {
  const { return_grounding, messages, ...options } = body;
  const key = hasKey ? 'os.environ["QWEN2VL_API_KEY"]' : '"none"';
  const named = Object.entries(options).map(
    ([name, value]) => `    ${name}=${toPython(value, 1)},`,
  );
  return `import base64
${hasKey ? "import os\n" : ""}from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(serverUrl("v1"))}, api_key=${key})


def data_url(path, media_type):
    return f"data:{media_type};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


messages = ${toPython(messages, 0)}
answer = client.chat.completions.create(
    messages=messages,
${named.join("\n")}
    extra_body={"return_grounding": ${toPython(return_grounding, 0)}},
)
message = answer.choices[0].message
print(message.content)
for shape in getattr(message, "grounding", None) or []:
    print(shape)
`;
}

/**
 * Writes a value of JSON as Python.
 * @param {unknown} value
 * @param {number} depth  of indentation
 * @returns {string}
 */
function toPython(value, depth) {
  const indent = "    ".repeat(depth + 1);
  const end = `\n${"    ".repeat(depth)}`;
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string") {
    return value.startsWith(MARK) ? value.slice(MARK.length, -MARK.length) : JSON.stringify(value);
  }
  if (Array.isArray(value)) {
    return `[\n${value.map((one) => `${indent}${toPython(one, depth + 1)},`).join("\n")}${end}]`;
  }
  if (typeof value !== "object") return String(value);
  const entries = Object.entries(value).map(
    ([key, one]) => `${JSON.stringify(key)}: ${toPython(one, depth + 1)}`,
  );
  const line = `{${entries.join(", ")}}`;
  if (!line.includes("\n") && indent.length + line.length < 96) return line;
  return `{\n${entries.map((one) => `${indent}${one},`).join("\n")}${end}}`;
}
