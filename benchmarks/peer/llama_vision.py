"""Vision tower of llama.cpp (mtmd); a separate module, so that text prompts do not load it."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
from llama_cpp import mtmd_cpp
from protocol import Case


class LlamaVision:
    """Vision tower of llama.cpp for a loaded model."""

    def __init__(self, path: str, llama: llama_cpp.Llama, threads: int) -> None:
        self.llama = llama
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = False
        params.n_threads = threads
        params.print_timings = False
        self.context = mtmd_cpp.mtmd_init_from_file(path.encode(), llama.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")

    def prepare(self, case: Case) -> Any:
        """Tokenize a prompt of one image and text to mtmd chunks."""
        pixels = case.pixels()
        height, width, _ = pixels.shape
        memory = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
        bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, memory)
        marker = mtmd_cpp.mtmd_default_marker()
        text = mtmd_cpp.mtmd_input_text()
        text.text = marker + case.text.encode()
        text.add_special = False
        text.parse_special = True
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        failed = mtmd_cpp.mtmd_tokenize(self.context, chunks, ctypes.byref(text), bitmaps, 1)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError(f"llama.cpp cannot preprocess the image: {failed}")
        return chunks

    def prefill(self, chunks: Any) -> int:
        """Encode the image and prefill the prompt; return its number of tokens."""
        past, batch = llama_cpp.llama_pos(0), self.llama.n_batch
        failed = mtmd_cpp.mtmd_helper_eval_chunks(
            self.context, self.llama.ctx, chunks, 0, 0, batch, True, ctypes.byref(past)
        )
        if failed:
            raise RuntimeError(f"llama.cpp cannot prefill the prompt: {failed}")
        num_tokens = mtmd_cpp.mtmd_helper_get_n_tokens(chunks)
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return num_tokens
