"""Worker of peers.py: llama.cpp through its C API, without the overhead of the Python wrapper.

With `mmproj` it runs the vision tower; preprocessing of the image is not timed.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from protocol import Answer, Case, TokenTimer, serve

BATCH = 2048  # larger than any prompt; llama.cpp splits it into micro-batches of 512


def load(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    threads = options["threads"]
    llama = llama_cpp.Llama(
        options["model"],
        n_ctx=4096,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    vision = None
    if "mmproj" in options:
        from llama_vision import LlamaVision

        vision = LlamaVision(options["mmproj"], llama, threads)
    vocab_size = llama.n_vocab()

    def decode(ids: list[int]) -> None:
        memory = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(memory, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")

    def greedy_token() -> int:
        scores = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(scores, shape=(vocab_size,)).argmax())

    def answer(case: Case) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        chunks = vision.prepare(case) if vision and case.size else None
        timer = TokenTimer()
        if chunks is None:
            decode(case.ids)
            prompt_tokens = len(case.ids)
        else:
            prompt_tokens = vision.prefill(chunks)
        token = greedy_token()
        timer.token()
        for _ in range(case.new_tokens - 1):
            decode([token])
            token = greedy_token()
            timer.token()
        return timer.figures(prompt_tokens)

    return answer, {"llama-cpp-python": llama_cpp.__version__}


if __name__ == "__main__":
    serve(load)
