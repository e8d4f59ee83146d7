"""TTFT estimate: FLOPs agree with torch's counter, the throughput is positive."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl.engine.ttft import PromptFlops, Throughput
from qwen2vl.geometry import AttnMeta
from qwen2vl.processor.inputs import ModelInput
from tests.tiny import tiny_config, tiny_model, tiny_processor


def prompt(*sizes: tuple[int, int]) -> ModelInput:
    content = [{"type": "image", "image": np.zeros((*size, 3), np.uint8)} for size in sizes]
    processor = tiny_processor(max_pixels=10**8)
    return processor([{"role": "user", "content": [*content, {"type": "text", "text": "Hi"}]}])


@torch.inference_mode()
def test_flops_equal_those_that_torch_counts() -> None:
    prompt_input, model = prompt((280, 280), (56, 140)), tiny_model()
    assert prompt_input.patches_NP is not None
    assert prompt_input.vision_meta is not None
    flops = PromptFlops.from_prompt(prompt_input, model.config)
    # torch does not count fused attention on the CPU; the math backend does the same operations.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as vision_counter:
        vision_MD = model.encode(prompt_input.patches_NP, prompt_input.vision_meta)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as text_counter:
        model(
            torch.tensor(prompt_input.input_ids),
            prompt_input.position_ids_3T,
            AttnMeta.build([len(prompt_input.input_ids)]),
            vision_MD=vision_MD,
            placeholder_index_M=prompt_input.placeholder_index_M,
        )
    assert flops.vision == vision_counter.get_total_flops()
    # torch also counts the masked half of the causal attention scores.
    length, text = len(prompt_input.input_ids), model.config.text
    masked = 2 * text.num_hidden_layers * length * (length - 1) * text.hidden_size
    assert flops.text + masked == text_counter.get_total_flops()


def test_resized_images_cost_as_much_as_small_ones() -> None:
    config = tiny_config()
    large, small = prompt((560, 560), (56, 56)), prompt((280, 280), (56, 56))
    assert PromptFlops.with_max_image_tokens(large, config, 100) == PromptFlops.from_prompt(
        small, config
    )
    assert PromptFlops.with_max_image_tokens(small, config, 1000) == PromptFlops.from_prompt(
        small, config
    )


def test_ttft_is_flops_over_throughput() -> None:
    throughput = Throughput(vision=10.0, text=2.0)
    assert throughput.estimate_ttft(PromptFlops(vision=30.0, text=8.0)) == 7.0


def test_throughput_is_measured() -> None:
    throughput = Throughput.measure(tiny_model())
    assert throughput.vision > 0
    assert throughput.text > 0


def test_fewer_frames_cost_as_much_as_a_shorter_video() -> None:
    def video_prompt(frames: int) -> ModelInput:
        video = {"type": "video", "video": np.zeros((frames, 112, 112, 3), np.uint8)}
        return tiny_processor()([{"role": "user", "content": [video]}])

    config = tiny_config()
    assert PromptFlops.with_frame_fraction(
        video_prompt(16), config, 0.25
    ) == PromptFlops.from_prompt(video_prompt(4), config)
    assert PromptFlops.with_frame_fraction(
        video_prompt(2), config, 0.25
    ) == PromptFlops.from_prompt(video_prompt(2), config)
