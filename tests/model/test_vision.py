"""The eyes: pixels, patches, blocks and merger, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qwen2vl.config import VisionConfig
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.model.vision import PatchEmbed, VisionMLP, VisionTower, normalize_pixels
from tests import prompts
from tests.prompts import image, video
from tests.tiny import tiny_config, tiny_model

CONFIG = tiny_config()


def tower() -> VisionTower:
    return tiny_model().visual


def pixels(num_patches: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_patches, CONFIG.vision.patch_dim)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_pixels_are_scaled_and_normalized_by_channel() -> None:
    patches_NP = pixels(3)
    wide = normalize_pixels(patches_NP, CONFIG.vision)
    assert wide.dtype == torch.float32
    for index in (0, 391, 392, 783, 784, 1175):
        channel = index // 392  # two frames of 14 x 14 a channel
        mean, std = CONFIG.vision.image_mean[channel], CONFIG.vision.image_std[channel]
        want = (patches_NP[:, index].double() / 255 - mean) / std
        torch.testing.assert_close(wide[:, index].double(), want, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_uint8_patches_are_normalized_first() -> None:
    meta = VisionMeta.build([Grid(1, 4, 4)])
    patches_NP = pixels(16)
    want = tower()(normalize_pixels(patches_NP, CONFIG.vision), meta)
    assert torch.equal(tower()(patches_NP, meta), want)


@torch.inference_mode()
def test_patch_embedding_is_the_convolution_of_the_checkpoints() -> None:
    embed = PatchEmbed(CONFIG.vision)
    assert embed.proj.weight.shape == (32, 3, 2, 14, 14)
    patches_NP = torch.randn(5, 1176)
    want = embed.proj(patches_NP.view(5, 3, 2, 14, 14)).flatten(1)
    torch.testing.assert_close(embed(patches_NP), want, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_activation_is_the_quick_gelu() -> None:
    mlp = VisionMLP(CONFIG.vision)
    x_NE = torch.randn(4, 32)
    up = mlp.fc1(x_NE)
    torch.testing.assert_close(mlp(x_NE), mlp.fc2(up / (1 + (-1.702 * up).exp())))


@torch.inference_mode()
def test_merger_joins_four_neighbors_of_the_stream() -> None:
    merger = tower().merger
    hidden_NE = torch.randn(8, 32)
    rows = F.layer_norm(hidden_NE, (32,), merger.ln_q.weight, merger.ln_q.bias, 1e-6).view(2, 128)
    want = F.linear(rows, merger.mlp[0].weight, merger.mlp[0].bias)  # type: ignore[arg-type]
    want = want * 0.5 * (1 + torch.erf(want / 2**0.5))
    want = F.linear(want, merger.mlp[2].weight, merger.mlp[2].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(merger(hidden_NE), want)
    alone = merger(hidden_NE[4:])
    torch.testing.assert_close(alone, merger(hidden_NE)[1:])


@torch.inference_mode()
def test_pairs_of_frames_never_see_each_other() -> None:
    # One segment for the whole clip is the classic mistake: then a change would spread.
    meta = VisionMeta.build([Grid(3, 4, 4)])
    patches_NP = prompts.patches(prompts.prompt([video(3, 4, 4)], CONFIG), CONFIG)
    before = tower()(patches_NP, meta)
    patches_NP[16:32] += 1.0
    changed = (tower()(patches_NP, meta) != before).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@torch.inference_mode()
def test_every_patch_of_a_frame_sees_the_others() -> None:
    meta = VisionMeta.build([Grid(1, 4, 6)])
    patches_NP = prompts.patches(prompts.prompt([image(4, 6)], CONFIG), CONFIG)
    before = tower()(patches_NP, meta)
    patches_NP[-1] += 1.0
    assert (tower()(patches_NP, meta) != before).any(dim=1).all()


@torch.inference_mode()
def test_a_stream_of_items_equals_each_alone() -> None:
    items = [image(4, 6), video(2, 4, 4), image(2, 2), image(2, 2)]
    prompt = prompts.prompt([part for item in items for part in (1, item)], CONFIG)
    patches_NP = prompts.patches(prompt, CONFIG)
    together = tower()(patches_NP, VisionMeta.build(prompt.grids))
    sizes = [grid.t * grid.h * grid.w for grid in prompt.grids]
    alone = [
        tower()(part, VisionMeta.build([grid]))
        for part, grid in zip(patches_NP.split(sizes), prompt.grids, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_turning_a_picture_is_not_invisible() -> None:
    # The same patches under another grid: only the rotary positions can tell.
    patches_NP = prompts.patches(prompts.prompt([image(4, 8)], CONFIG), CONFIG)
    wide = tower()(patches_NP, VisionMeta.build([Grid(1, 4, 8)]))
    tall = tower()(patches_NP, VisionMeta.build([Grid(1, 8, 4)]))
    assert (wide - tall).abs().max() > 1e-3


def test_official_tower_has_its_published_size() -> None:
    with torch.device("meta"):
        official = VisionTower(VisionConfig(hidden_size=1536))
    merger = sum(p.numel() for p in official.merger.parameters())
    assert sum(p.numel() for p in official.parameters()) == 665_271_296
    assert merger == 665_271_296 - 631_183_360


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_tower_answers_in_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    meta = VisionMeta.build([Grid(1, 4, 4)])
    want = tower()(pixels(16), meta)
    got = tower().to(dtype)(pixels(16), meta)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.05 * want.abs().max().item())
