"""The vision tower: pixel normalization, patch embedding, blocks and merger."""

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
    normalized = normalize_pixels(patches_NP, CONFIG.vision)
    assert normalized.dtype == torch.float32
    for index in (0, 391, 392, 783, 784, 1175):
        channel = index // 392  # two frames of 14 x 14 per channel
        mean, std = CONFIG.vision.image_mean[channel], CONFIG.vision.image_std[channel]
        expected = (patches_NP[:, index].double() / 255 - mean) / std
        torch.testing.assert_close(normalized[:, index].double(), expected, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_uint8_patches_are_normalized_first() -> None:
    meta = VisionMeta.build([Grid(1, 4, 4)])
    patches_NP = pixels(16)
    expected = tower()(normalize_pixels(patches_NP, CONFIG.vision), meta)
    assert torch.equal(tower()(patches_NP, meta), expected)


@torch.inference_mode()
def test_patch_embedding_is_the_convolution_of_the_checkpoints() -> None:
    embed = PatchEmbed(CONFIG.vision)
    assert embed.proj.weight.shape == (32, 3, 2, 14, 14)
    patches_NP = torch.randn(5, 1176)
    expected = embed.proj(patches_NP.view(5, 3, 2, 14, 14)).flatten(1)
    torch.testing.assert_close(embed(patches_NP), expected, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_activation_is_the_quick_gelu() -> None:
    mlp = VisionMLP(CONFIG.vision)
    x_NE = torch.randn(4, 32)
    up = mlp.fc1(x_NE)
    torch.testing.assert_close(mlp(x_NE), mlp.fc2(up / (1 + (-1.702 * up).exp())))


@torch.inference_mode()
def test_merger_combines_four_consecutive_patches() -> None:
    merger = tower().merger
    hidden_NE = torch.randn(8, 32)
    merged = F.layer_norm(hidden_NE, (32,), merger.ln_q.weight, merger.ln_q.bias, 1e-6).view(2, 128)
    expected = F.linear(merged, merger.mlp[0].weight, merger.mlp[0].bias)  # type: ignore[arg-type]
    expected = expected * 0.5 * (1 + torch.erf(expected / 2**0.5))
    expected = F.linear(expected, merger.mlp[2].weight, merger.mlp[2].bias)  # type: ignore[arg-type]
    torch.testing.assert_close(merger(hidden_NE), expected)
    alone = merger(hidden_NE[4:])
    torch.testing.assert_close(alone, merger(hidden_NE)[1:])


@torch.inference_mode()
def test_frame_pairs_do_not_attend_to_each_other() -> None:
    # With one segment for the whole video, a common mistake, a change would spread to all frames.
    meta = VisionMeta.build([Grid(3, 4, 4)])
    patches_NP = prompts.patches(prompts.prompt([video(3, 4, 4)], CONFIG), CONFIG)
    before = tower()(patches_NP, meta)
    patches_NP[16:32] += 1.0
    changed = (tower()(patches_NP, meta) != before).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


@torch.inference_mode()
def test_patches_of_a_frame_attend_to_each_other() -> None:
    meta = VisionMeta.build([Grid(1, 4, 6)])
    patches_NP = prompts.patches(prompts.prompt([image(4, 6)], CONFIG), CONFIG)
    before = tower()(patches_NP, meta)
    patches_NP[-1] += 1.0
    assert (tower()(patches_NP, meta) != before).any(dim=1).all()


@torch.inference_mode()
def test_packed_items_equal_single_items() -> None:
    items = [image(4, 6), video(2, 4, 4), image(2, 2), image(2, 2)]
    prompt = prompts.prompt([part for item in items for part in (1, item)], CONFIG)
    patches_NP = prompts.patches(prompt, CONFIG)
    packed = tower()(patches_NP, VisionMeta.build(prompt.grids))
    sizes = [grid.t * grid.h * grid.w for grid in prompt.grids]
    alone = [
        tower()(part, VisionMeta.build([grid]))
        for part, grid in zip(patches_NP.split(sizes), prompt.grids, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_grid_affects_the_embeddings() -> None:
    # The same patches with another grid: only the rotary positions differ.
    patches_NP = prompts.patches(prompts.prompt([image(4, 8)], CONFIG), CONFIG)
    normalized = tower()(patches_NP, VisionMeta.build([Grid(1, 4, 8)]))
    from_tall_grid = tower()(patches_NP, VisionMeta.build([Grid(1, 8, 4)]))
    assert (normalized - from_tall_grid).abs().max() > 1e-3


def test_official_tower_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        official = VisionTower(VisionConfig(hidden_size=1536))
    merger = sum(p.numel() for p in official.merger.parameters())
    assert sum(p.numel() for p in official.parameters()) == 665_271_296
    assert merger == 665_271_296 - 631_183_360


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.inference_mode()
def test_tower_output_has_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    meta = VisionMeta.build([Grid(1, 4, 4)])
    expected = tower()(pixels(16), meta)
    got = tower().to(dtype)(pixels(16), meta)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item()
    )
