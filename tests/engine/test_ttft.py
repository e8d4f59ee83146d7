"""Operations are counted as they are done; the speed is positive and scales as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl.engine.ttft import Speed, Work
from qwen2vl.geometry import AttnMeta
from qwen2vl.processor.inputs import ModelInput
from tests.tiny import tiny_config, tiny_model, tiny_processor


def prompt(*sizes: tuple[int, int]) -> ModelInput:
    content = [{"type": "image", "image": np.zeros((*size, 3), np.uint8)} for size in sizes]
    processor = tiny_processor(max_pixels=10**8)
    return processor([{"role": "user", "content": [*content, {"type": "text", "text": "Hi"}]}])


@torch.inference_mode()
def test_operations_are_those_that_torch_counts() -> None:
    made, model = prompt((280, 280), (56, 140)), tiny_model()
    assert made.patches_NP is not None
    assert made.vision_meta is not None
    work = Work.of(made, model.config)
    # torch does not count its fused attention on the CPU; the plain kernel does the same sums.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as tower:
        vision_MD = model.encode(made.patches_NP, made.vision_meta)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoder:
        model(
            torch.tensor(made.input_ids),
            made.position_ids_3T,
            AttnMeta.build([len(made.input_ids)]),
            vision_MD=vision_MD,
            pad_index_M=made.pad_index_M,
        )
    assert work.vision == pytest.approx(tower.get_total_flops(), rel=0.02)
    # torch counts the half of the causal scores that is masked, too.
    length, text = len(made.input_ids), model.config.text
    masked = 2 * text.num_hidden_layers * length * length * text.hidden_size
    assert work.text + masked == pytest.approx(decoder.get_total_flops(), rel=0.02)


def test_shrunk_pictures_cost_what_small_ones_do() -> None:
    config = tiny_config()
    large, small = prompt((560, 560), (56, 56)), prompt((280, 280), (56, 56))
    assert Work.at_most(large, config, 100) == Work.of(small, config)
    assert Work.at_most(small, config, 1000) == Work.of(small, config)


def test_seconds_are_work_over_speed() -> None:
    speed = Speed(vision=10.0, text=2.0)
    assert speed.seconds(Work(vision=30.0, text=8.0)) == 7.0


def test_a_speed_is_measured() -> None:
    speed = Speed.measure(tiny_model())
    assert speed.vision > 0
    assert speed.text > 0


def test_fewer_frames_cost_what_a_shorter_clip_does() -> None:
    def clip(frames: int) -> ModelInput:
        video = {"type": "video", "video": np.zeros((frames, 112, 112, 3), np.uint8)}
        return tiny_processor()([{"role": "user", "content": [video]}])

    config = tiny_config()
    assert Work.with_frames(clip(16), config, 0.25) == Work.of(clip(4), config)
    assert Work.with_frames(clip(2), config, 0.25) == Work.of(clip(2), config)
