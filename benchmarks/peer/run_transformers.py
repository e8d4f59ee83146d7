"""Worker of peers.py: transformers in bf16, its default attention, `generate` with a streamer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Answer, Case, TokenTimer, serve
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class TimingStreamer(BaseStreamer):
    """Streamer that times each token; the first call has the prompt."""

    def __init__(self, timer: TokenTimer) -> None:
        self.timer = timer
        self.calls = 0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls > 1:
            self.timer.token()

    def end(self) -> None:
        pass


def load(options: dict[str, Any]) -> tuple[Answer, dict[str, str]]:
    torch.set_num_threads(options["threads"])
    folder = options["model"]
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    config = model.config

    def inputs(case: Case) -> dict[str, Any]:
        if case.size is None:
            ids_1T = torch.tensor([case.ids])
            return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}
        image_inputs = image_processor(images=[case.pixels()], return_tensors="pt")
        count = int(image_inputs["image_grid_thw"].prod()) // 4
        marks = (config.vision_start_token_id, config.vision_end_token_id)
        ids_1T = torch.tensor([[marks[0], *[config.image_token_id] * count, marks[1], *case.ids]])
        return {
            "input_ids": ids_1T,
            "attention_mask": torch.ones_like(ids_1T),
            "mm_token_type_ids": (ids_1T == config.image_token_id).int(),
            "pixel_values": image_inputs["pixel_values"],
            "image_grid_thw": image_inputs["image_grid_thw"],
        }

    def answer(case: Case) -> dict[str, float]:
        prompt = inputs(case)
        timer = TokenTimer()
        with torch.inference_mode():
            model.generate(
                **prompt,
                max_new_tokens=case.new_tokens,
                do_sample=False,
                streamer=TimingStreamer(timer),
            )
        return timer.figures(prompt["input_ids"].shape[1])

    return answer, {"transformers": transformers.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(load)
