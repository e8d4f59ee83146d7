"""Worker of peers.py: OpenVINO GenAI's pipeline as it comes, greedy.

It takes words and a picture, not ids and patches: the time of its tokenizer is taken off the time
to the first token, that of preparing the picture cannot be told apart and stays.
"""

from __future__ import annotations

from typing import Any

import openvino
import openvino_genai
from turns import Answer, Case, Watch, serve


class Moments(openvino_genai.StreamerBase):
    """Is shown each token, or several at once."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def write(self, token: Any) -> Any:
        for _ in [token] if isinstance(token, int) else token:
            self.watch.token()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def begin(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    pipeline = openvino_genai.VLMPipeline(
        options["model"], "CPU", INFERENCE_NUM_THREADS=options["threads"]
    )

    def answer(case: Case) -> dict[str, float]:
        wish = openvino_genai.GenerationConfig()
        wish.max_new_tokens = case.new_tokens
        wish.do_sample = False
        wish.ignore_eos = True
        wish.apply_chat_template = False
        images = [] if case.size is None else [openvino.Tensor(case.pixels()[None])]
        watch = Watch()
        done = pipeline.generate(
            case.text, images=images, generation_config=wish, streamer=Moments(watch)
        )
        spent = done.perf_metrics
        words = spent.get_tokenization_duration().mean / 1000
        return watch.figures(spent.get_num_input_tokens(), free=max(0.0, words))

    versions = {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}
    return answer, versions


if __name__ == "__main__":
    serve(begin)
