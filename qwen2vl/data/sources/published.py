"""Files of packaged datasets as they were published, and the prompt of a question about an image.

The training sources of packaged datasets and the evaluation suites of their test sets share this
module, so that a model is evaluated with the prompts that it was fine-tuned on.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from qwen2vl.errors import InputError

__all__ = ["Split", "build_prompt", "read_published"]

Split = Literal["train", "test"]


def read_published(path: Path, digest: str, *, dataset: str) -> bytes:
    """Read a file of a packaged dataset, if it is the one that was published.

    Args:
        path: of the file in the fetched folder.
        digest: SHA-256 of the published file, in hexadecimal digits.
        dataset: its name in `qwen2vl fetch-data`.

    Raises:
        InputError: the file cannot be read, or is another one.
    """
    remedy = f"delete its folder and fetch the dataset again: qwen2vl fetch-data {dataset}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    found = sha256(content).hexdigest()
    if found != digest:
        raise InputError(
            f"{path}: is not the published file of {dataset}: its SHA-256 is {found:.8}..., must "
            f"be {digest:.8}...; {remedy}"
        )
    return content


def build_prompt(image: Any, question: str) -> dict[str, Any]:
    """Return the user message of an image, as a path or an array of pixels, and a question."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {"role": "user", "content": content}
