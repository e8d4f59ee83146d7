"""Worker of peers.py: llama.cpp, called below its Python conveniences so that only it is timed.

With an `mmproj` it sees pictures; its own preparing of them is not timed.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from turns import Answer, Case, Watch, serve

BATCH = 2048  # more than any prompt has; llama.cpp takes it in parts of 512


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
    eyes = None
    if "mmproj" in options:
        from llama_eyes import Eyes

        eyes = Eyes(options["mmproj"], llama, threads)
    num_words = llama.n_vocab()

    def run(ids: list[int]) -> None:
        memory = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(memory, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")

    def best() -> int:
        scores = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(scores, shape=(num_words,)).argmax())

    def answer(case: Case) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        picture = eyes.prepare(case) if eyes and case.size else None
        watch = Watch()
        if picture is None:
            run(case.ids)
            prompt_tokens = len(case.ids)
        else:
            prompt_tokens = eyes.read(picture)
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
