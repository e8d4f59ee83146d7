"""Convert nano to GGUF: python convert_llama.py LLAMA_CPP_SOURCES, then the converter's arguments.

The converter identifies a pre-tokenizer by the hash of the token ids of one fixed text, in a list
of known models, and refuses nano: its vocabulary of bytes gives other ids than the official one.
The pre-tokenizer itself is that of Qwen2 (the same expression), so that name is given.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Patch the identification of the tokenizer and run the converter."""
    sources, *arguments = sys.argv[1:]
    script = Path(sources, "convert_hf_to_gguf.py")
    sys.path[:0] = [sources, str(Path(sources, "gguf-py"))]
    from conversion import base, qwenvl  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    # Without the attempt with SentencePiece, which would need that package.
    qwenvl.Qwen2VLModel.set_vocab = base.TextModel._set_vocab_gpt2
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
