"""Worker of peers.py: qwen2vl, through the engine of `LLM`."""

from __future__ import annotations

from typing import Any

import torch
from protocol import IMAGE, Answer, Case, TokenTimer, serve

from qwen2vl import LLM, SamplingParams, __version__


def load(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    torch.set_num_threads(options["threads"])
    precision, _, compiled = options["precision"].partition(" ")
    llm = LLM(
        options["model"],
        dtype="bfloat16",
        quantize=None if precision == "bf16" else precision,
        compile=bool(compiled),
        max_model_len=4096,
    )

    def answer(case: Case) -> dict[str, float]:
        if case.size is None:
            prompt = llm.processor.from_text(case.text)
        else:
            prompt = llm.processor.from_text(IMAGE + case.text, [case.pixels()])
        params = SamplingParams(temperature=0, max_tokens=case.new_tokens, ignore_eos=True)
        timer = TokenTimer()
        (request,) = llm.create_requests(prompt, params)
        llm.engine_core.scheduler.add_request(request)
        while request.finish_reason is None:
            known = len(request.output_token_ids)
            llm.step()
            if len(request.output_token_ids) > known:
                timer.token()
        return timer.figures(len(prompt.input_ids))

    return answer, {"qwen2vl": __version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
