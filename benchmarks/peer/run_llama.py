"""Worker of peers.py: llama.cpp, called below its Python conveniences so that only it is timed.

With an `mmproj` it sees pictures; its own preparing of them is not timed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from turns import Answer, Case, Watch, serve

BATCH = 2048  # tokens of a prompt read at once, as an upper limit; it halves them further itself


class Eyes:
    """llama.cpp's vision tower beside a model."""

    def __init__(self, path: str, llama: llama_cpp.Llama, threads: int) -> None:
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu = False
        settings.n_threads = threads
        settings.print_timings = False
        self.context = mtmd_cpp.mtmd_init_from_file(path.encode(), llama.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot open {path}")

    def chunks(self, case: Case) -> Any:
        """Prepare picture and words."""
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


def begin(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    threads = options["threads"]
    llama = llama_cpp.Llama(
        options["model"],
        n_ctx=4096,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    eyes = Eyes(options["mmproj"], llama, threads) if options.get("mmproj") else None
    num_words = llama.n_vocab()

    def run(ids: list[int]) -> None:
        memory = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(memory, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")

    def read(chunks: Any) -> None:
        past = llama_cpp.llama_pos(0)
        failed = mtmd_cpp.mtmd_helper_eval_chunks(
            eyes.context, llama.ctx, chunks, 0, 0, BATCH, True, ctypes.byref(past)
        )
        if failed:
            raise RuntimeError(f"mtmd_helper_eval_chunks: {failed}")

    def best() -> int:
        scores = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(scores, shape=(num_words,)).argmax())

    def answer(case: Case) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        chunks = None if case.size is None else eyes.chunks(case)
        watch = Watch()
        if chunks is None:
            run(case.ids)
            prompt_tokens = len(case.ids)
        else:
            read(chunks)
            prompt_tokens = mtmd_cpp.mtmd_helper_get_n_tokens(chunks)
            mtmd_cpp.mtmd_input_chunks_free(chunks)
        token = best()
        watch.token()
        for _ in range(case.new_tokens - 1):
            run([token])
            token = best()
            watch.token()
        return watch.figures(prompt_tokens)

    return answer, {"llama-cpp-python": llama_cpp.__version__}


if __name__ == "__main__":
    serve(begin)
