/** Takes files that are chosen, dropped anywhere on the page, or pasted. */

/**
 * @param {HTMLInputElement} input
 * @param {(files: File[]) => void} onFiles
 */
export function takeFrom(input, onFiles) {
  input.addEventListener("change", () => {
    const files = [...(input.files ?? [])];
    input.value = ""; // the same file can be chosen again
    onFiles(files);
  });
}

/** @param {(files: File[]) => void} onFiles */
export function receiveFiles(onFiles) {
  let depth = 0; // of elements that the pointer has entered
  const hasFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  const show = (/** @type {number} */ value) => {
    depth = Math.max(0, value);
    document.body.classList.toggle("dropping", depth > 0);
  };
  addEventListener("dragenter", (event) => {
    if (hasFiles(event)) show(depth + 1);
  });
  addEventListener("dragleave", (event) => {
    if (hasFiles(event)) show(depth - 1);
  });
  addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(0);
    onFiles([...(event.dataTransfer?.files ?? [])]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length === 0) return;
    event.preventDefault();
    onFiles(files);
  });
}
