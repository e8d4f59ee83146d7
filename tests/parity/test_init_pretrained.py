"""Init from pretrained: blocks compute what those of CLIP and Qwen2 compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import vision_cos_sin
from qwen2vl.weights.init_pretrained import init_from_pretrained
from tests.parity.reference import relative_error
from tests.source_models import (
    CLIP_MODEL_CFG,
    HEADS,
    PATCH,
    WIDTH,
    OpenClipTower,
    randomize,
    text_config,
    write_open_clip,
    write_qwen2,
    write_tokenizer,
)

# The source models' norms add 1e-5 to a variance of about 1, those of Qwen2-VL 1e-6.
TOLERANCE = 2e-5

BlockFunction = Callable[[Tensor], Tensor]


def build_and_load(folder: Path) -> Qwen2VL:
    """Build a Qwen2-VL from the source models in `folder` and load it."""
    init_from_pretrained(folder / "text", folder / "vision", folder / "out", dtype=torch.float32)
    return load(folder / "out", dtype="float32")[0]


def run_block(model: Qwen2VL, number: int, hidden_NE: Tensor) -> Tensor:
    """Run one vision block on patches at position (0, 0): CLIP's blocks have no rotation."""
    config = model.config.vision
    positions_N2 = torch.zeros(len(hidden_NE), 2, dtype=torch.int64)
    cos_sin = vision_cos_sin(positions_N2, config.head_dim, config.rope_theta)
    return model.visual.blocks[number](hidden_NE, cos_sin, AttnMeta.build([len(hidden_NE)]))


def embed(model: Qwen2VL, image_3YX: Tensor) -> Tensor:
    """Embed an image of one patch, as two equal frames."""
    patch_3TYX = torch.stack([image_3YX, image_3YX], dim=1)
    return model.visual.patch_embed(patch_3TYX.reshape(1, -1))[0]


def check_blocks(model: Qwen2VL, blocks: list[BlockFunction]) -> None:
    generator = torch.Generator().manual_seed(3)
    for number, block in enumerate(blocks):
        hidden_NE = 3 * torch.randn(24, WIDTH, generator=generator)
        got, want = run_block(model, number, hidden_NE), block(hidden_NE[None])[0]
        assert relative_error(got, want) < TOLERANCE, number
        assert relative_error(want, hidden_NE) > 0.05


def check_embedding(model: Qwen2VL, conv: nn.Conv2d, norm: nn.LayerNorm) -> None:
    """Check the first block's normalized input; the bias of CLIP's pre-norm is set to zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        norm.bias.zero_()
    for _ in range(4):
        image_3YX = torch.randn(3, PATCH, PATCH, generator=generator)
        source_E = norm(conv(image_3YX[None])[0, :, 0, 0])
        want = torch.nn.functional.layer_norm(source_E, [WIDTH])
        got = torch.nn.functional.layer_norm(embed(model, image_3YX), [WIDTH])
        assert relative_error(got, want) < 2e-4


@torch.no_grad()
def test_blocks_of_a_reimplemented_open_clip_tower(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "text")
    tower = write_open_clip(tmp_path / "vision")
    assert isinstance(tower, OpenClipTower)
    model = build_and_load(tmp_path)
    check_blocks(model, list(tower.transformer.resblocks))  # type: ignore[arg-type]
    check_embedding(model, tower.conv1, tower.ln_pre)


@torch.no_grad()
def test_blocks_of_open_clip_itself(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip needs torchvision")
    torch.manual_seed(0)
    model_cfg = {name: value for name, value in CLIP_MODEL_CFG.items() if name != "quick_gelu"}
    tower = open_clip.CLIP(**model_cfg, quick_gelu=True).eval().visual
    randomize(tower)
    write_qwen2(tmp_path / "text")
    write_open_clip(tmp_path / "vision", tower)
    assert tower.state_dict().keys() == OpenClipTower().state_dict().keys()
    model = build_and_load(tmp_path)
    check_blocks(model, list(tower.transformer.resblocks))
    check_embedding(model, tower.conv1, tower.ln_pre)


@torch.no_grad()
@pytest.mark.parametrize("has_text_tower", [True, False])
def test_blocks_of_a_transformers_clip_tower(tmp_path: Path, has_text_tower: bool) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=160,  # DFN's is four times the width; others need not be
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=PATCH,
    )
    if has_text_tower:
        clip = CLIPModel(
            CLIPConfig(
                vision_config=config.to_dict(),
                text_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
            )
        )
    else:
        clip = CLIPVisionModel(config)
    randomize(clip)
    clip.eval().save_pretrained(str(tmp_path / "vision"))
    write_qwen2(tmp_path / "text")
    model = build_and_load(tmp_path)
    assert model.config.vision.mlp_ratio == 2.5
    tower = clip.vision_model if has_text_tower else clip
    check_blocks(model, [lambda x, b=b: _first_output(b(x, None)) for b in tower.encoder.layers])
    check_embedding(model, tower.embeddings.patch_embedding, tower.pre_layrnorm)


def _first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_decoder_logits_equal_those_of_the_source_model(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    raw = text_config(tie_word_embeddings=tied)
    source = Qwen2ForCausalLM(Qwen2Config(**raw)).eval()
    randomize(source)
    source.save_pretrained(str(tmp_path / "text"))
    num_tokens = write_tokenizer(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    model = build_and_load(tmp_path)
    ids = torch.randint(num_tokens, (17,), generator=torch.Generator().manual_seed(1))
    positions_3T = torch.arange(17).expand(3, -1)
    got_TV = model.logits(model(ids, positions_3T, AttnMeta.build([17])))
    want_TV = source(ids[None]).logits[0]
    # New special tokens have new embeddings; no other token's logit may differ.
    is_old_token = torch.ones(raw["vocab_size"], dtype=torch.bool)
    is_old_token[num_tokens : num_tokens + 11] = False
    assert relative_error(got_TV[:, is_old_token], want_TV[:, is_old_token]) < 1e-5
    assert (~is_old_token).sum() == 11
