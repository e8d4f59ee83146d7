"""Worker of peers.py: the VLMPipeline of OpenVINO GenAI with default settings, greedy.

The pipeline takes text and an image, not ids and patches: tokenization time is subtracted from the
TTFT; image preprocessing is not reported separately and stays included.
"""

from __future__ import annotations

from typing import Any

import openvino
import openvino_genai
from protocol import Answer, Case, TokenTimer, serve


class TimingStreamer(openvino_genai.StreamerBase):
    """Streamer that times each token; tokens may arrive in groups."""

    def __init__(self, timer: TokenTimer) -> None:
        super().__init__()
        self.timer = timer

    def write(self, token: Any) -> Any:
        for _ in [token] if isinstance(token, int) else token:
            self.timer.token()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    pipeline = openvino_genai.VLMPipeline(
        options["model"], "CPU", INFERENCE_NUM_THREADS=options["threads"]
    )

    def answer(case: Case) -> dict[str, float]:
        generation_config = openvino_genai.GenerationConfig()
        generation_config.max_new_tokens = case.new_tokens
        generation_config.do_sample = False
        generation_config.ignore_eos = True
        generation_config.apply_chat_template = False
        images = [] if case.size is None else [openvino.Tensor(case.pixels()[None])]
        timer = TokenTimer()
        results = pipeline.generate(
            case.text,
            images=images,
            generation_config=generation_config,
            streamer=TimingStreamer(timer),
        )
        metrics = results.perf_metrics
        tokenization = metrics.get_tokenization_duration().mean / 1000
        return timer.figures(metrics.get_num_input_tokens(), free=max(0.0, tokenization))

    versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
    return answer, versions


if __name__ == "__main__":
    serve(load)
