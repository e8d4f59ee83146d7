"""llama.cpp's vision tower; apart, since its library is loaded only where pictures are asked."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
from llama_cpp import mtmd_cpp
from turns import Case


class Eyes:
    """llama.cpp's vision tower beside a model."""

    def __init__(self, path: str, llama: llama_cpp.Llama, threads: int) -> None:
        self.llama = llama
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu = False
        settings.n_threads = threads
        settings.print_timings = False
        self.context = mtmd_cpp.mtmd_init_from_file(path.encode(), llama.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")

    def prepare(self, case: Case) -> Any:
        """Make chunks of picture and words."""
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
            raise RuntimeError(f"llama.cpp cannot read the picture: {failed}")
        return chunks

    def read(self, chunks: Any) -> int:
        """Encode the picture and read the whole prompt; give its number of tokens."""
        past, batch = llama_cpp.llama_pos(0), self.llama.n_batch
        failed = mtmd_cpp.mtmd_helper_eval_chunks(
            self.context, self.llama.ctx, chunks, 0, 0, batch, True, ctypes.byref(past)
        )
        if failed:
            raise RuntimeError(f"llama.cpp cannot read the prompt: {failed}")
        num_tokens = mtmd_cpp.mtmd_helper_get_n_tokens(chunks)
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        return num_tokens
