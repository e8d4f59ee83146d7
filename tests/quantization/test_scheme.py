"""Which layer becomes what; a quantized model answers like its dequantized self."""

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.config import PRESETS, Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear.fused import Share
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import Int4Linear
from qwen2vl.quantization.int8 import int8_linear
from qwen2vl.quantization.rtn import round_channels
from qwen2vl.quantization.scheme import (
    MODES,
    Kind,
    Mode,
    _group_size,
    describe,
    quantize,
    recipe,
)
from tests.tiny import tiny_config, tiny_model

INT8 = int8_linear(round_channels(torch.eye(2)), None).describe()  # this processor's kind


def dequantized(model: Qwen2VL) -> Qwen2VL:
    """Build an ordinary model out of the matrices that a quantized one stands for."""
    plain = Qwen2VL(model.config).eval()
    if model.lm_head is not None and plain.lm_head is None:
        text = model.config.text
        plain.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    state = {n: p.float() for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Share):
            state[f"{name}.weight"] = module.dequantized()
            if module.layer.bias_O is not None:
                state[f"{name}.bias"] = module.layer.bias_O[module.start : module.stop]
        elif isinstance(module) and not name.endswith(".layer"):
            state[f"{name}.weight"] = module.dequantized()
            if module.bias_O is not None:
                state[f"{name}.bias"] = module.bias_O
    plain.load_state_dict(state, strict=True)
    return plain


@torch.inference_mode()
def logits_of(model: Qwen2VL, tokens: int = 40) -> Tensor:
    """Answer a prompt that begins with a picture of 4 tokens."""
    grid = Grid(1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    patches_NP = torch.randint(0, 256, (16, 1176), dtype=torch.uint8, generator=generator)
    ids_T = torch.randint(0, 200, (tokens,), generator=generator)
    hidden_TD = model(
        ids_T,
        torch.arange(tokens).expand(3, -1),
        AttnMeta.build([tokens]),
        patches_NP=patches_NP,
        vision_meta=VisionMeta.build([grid]),
        pad_index_M=torch.arange(4),
    )
    return model.logits(hidden_TD).float()


@pytest.mark.parametrize("tied", [True, False])
def test_the_recipe(tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert recipe(model, "int8") == dict.fromkeys(linear | {"lm_head"}, Kind(8))
    four = recipe(model, "int4")
    assert set(four) == linear | {"lm_head"}
    for name, kind in four.items():
        assert kind == (Kind(4, 32) if name.startswith("model.") else Kind(8))


@pytest.mark.parametrize(("size", "group"), [("2B", 128), ("7B", 128), ("72B", 128)])
def test_the_official_models_have_the_official_groups(size: str, group: int) -> None:
    with torch.device("meta"):
        model = Qwen2VL(PRESETS[size])
    assert recipe(model, "int4")["model.layers.0.mlp.down_proj"] == Kind(4, group)


@pytest.mark.parametrize(
    ("widths", "group"),
    [([192, 512], 32), ([384, 512], 64), ([768, 3072], 128), ([768, 800], 32), ([64], 32)],
)
def test_narrow_models_have_smaller_groups(widths: list[int], group: int) -> None:
    assert _group_size(widths) == group


def test_layers_that_no_group_divides_keep_eight_bits() -> None:
    config = Qwen2VLConfig(
        vision=VisionConfig(depth=1, embed_dim=32, num_heads=2, hidden_size=96),
        text=TextConfig(
            hidden_size=96,
            intermediate_size=200,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=64,
            mrope_section=(2, 3, 3),
        ),
        image_token_id=1,
        video_token_id=2,
    )
    with torch.device("meta"):
        kinds = recipe(Qwen2VL(config), "int4")
    assert kinds["model.layers.0.mlp.down_proj"] == Kind(8)
    assert kinds["model.layers.0.mlp.up_proj"] == Kind(4, 32)


def test_an_unknown_mode() -> None:
    with pytest.raises(InputError, match="quantize 'int2' is unknown; use int8 or int4"):
        recipe(tiny_model(), "int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_linear_layer_is_replaced_and_nothing_else(mode: Mode, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    before = dict(model.named_parameters())
    kinds = recipe(model, mode)
    quantize(model, mode)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    for name, kind in kinds.items():
        layer = model.get_submodule(name)
        own = layer.layer if isinstance(layer, Share) else layer
        assert isinstance(own)
        assert isinstance(own, Int4Linear) == (kind.bits == 4)
    kept = dict(model.named_parameters())
    assert set(kept) == {n for n in before if n.rpartition(".")[0] not in kinds}
    assert all(kept[name] is before[name] for name in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_dequantized_model(mode: Mode, dtype: torch.dtype) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False)).to(dtype)
    quantize(model, mode)
    got_TV, want_TV = logits_of(model), logits_of(dequantized(model))
    assert got_TV.isfinite().all()
    assert float((got_TV - want_TV).norm() / want_TV.norm()) < 0.03


@pytest.mark.parametrize(("mode", "limit"), [("int8", 0.03), ("int4", 0.25)])
def test_answers_are_near_those_of_the_whole_model(mode: Mode, limit: float) -> None:
    model = tiny_model()
    want_TV = logits_of(model)
    quantize(model, mode)
    assert float((logits_of(model) - want_TV).norm() / want_TV.norm()) < limit


def test_the_description_tells_arithmetic_apart() -> None:
    model = tiny_model()
    assert describe(model) == ""
    quantize(model, "int8")
    assert describe(model) == f"visual: 10 {INT8}, model: 8 {INT8}, lm_head: 1 {INT8}"
    model = tiny_model()
    quantize(model, "int4")
    assert describe(model) == f"visual: 10 {INT8}, model: 8 int4/32, lm_head: 1 {INT8}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_loading_quantizes_as_quantize_does(mode: Mode, dtype: str) -> None:
    loaded, _ = load("nano", dtype=dtype, quantize=mode)  # type: ignore[arg-type]
    made, _ = load("nano", dtype=dtype)  # type: ignore[arg-type]
    whole, _ = load("nano", dtype=dtype)  # type: ignore[arg-type]
    quantize(made, mode)
    assert describe(loaded) == describe(made)
    for name in recipe(whole, mode):
        ours, theirs = loaded.get_submodule(name), made.get_submodule(name)
        assert isinstance(ours | Share)
        assert isinstance(theirs | Share)
        assert torch.equal(ours.integers(), theirs.integers())
        assert torch.equal(ours.dequantized(), theirs.dequantized())
    assert torch.equal(logits_of(loaded), logits_of(made))
    assert loaded.dtype == getattr(torch, dtype)
