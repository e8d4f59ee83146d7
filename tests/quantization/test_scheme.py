"""Layer schemes, and quantized models compared with their dequantized copies."""

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.config import PRESETS, Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear.fused import FusedLinearSlice
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import Int4Linear
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.rtn import quantize_per_channel
from qwen2vl.quantization.scheme import (
    CPU_MODES,
    CpuQuantizationMode,
    LayerScheme,
    QuantizedLinear,
    _group_size,
    describe_quantization,
    layer_schemes,
    quantize,
)
from tests.tiny import tiny_config, tiny_model

# The description of this processor's int8 layer.
INT8 = Int8Linear(quantize_per_channel(torch.eye(2)), None).describe_quantization()


def dequantized_copy(model: Qwen2VL) -> Qwen2VL:
    """Build a plain model from the dequantized weights of a quantized one."""
    plain = Qwen2VL(model.config).eval()
    if model.lm_head is not None and plain.lm_head is None:
        text = model.config.text
        plain.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    state = {n: p.float() for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, FusedLinearSlice):
            state[f"{name}.weight"] = module.dequantize()
            if module.layer.bias_O is not None:
                state[f"{name}.bias"] = module.layer.bias_O[module.start : module.stop]
        elif isinstance(module, QuantizedLinear) and not name.endswith(".layer"):
            state[f"{name}.weight"] = module.dequantize()
            if module.bias_O is not None:
                state[f"{name}.bias"] = module.bias_O
    plain.load_state_dict(state, strict=True)
    return plain


@torch.inference_mode()
def logits_of(model: Qwen2VL, tokens: int = 40) -> Tensor:
    """Compute logits of a prompt that begins with an image of 4 tokens."""
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
        placeholder_index_M=torch.arange(4),
    )
    return model.logits(hidden_TD).float()


@pytest.mark.parametrize("tied", [True, False])
def test_layer_schemes(tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert layer_schemes(model, "int8") == dict.fromkeys(linear | {"lm_head"}, LayerScheme(8))
    int4_schemes = layer_schemes(model, "int4")
    assert set(int4_schemes) == linear | {"lm_head"}
    for name, scheme in int4_schemes.items():
        assert scheme == (LayerScheme(4, 32) if name.startswith("model.") else LayerScheme(8))


@pytest.mark.parametrize(("name", "group_size"), [("2B", 128), ("7B", 128), ("72B", 128)])
def test_official_models_have_the_official_group_size(name: str, group_size: int) -> None:
    with torch.device("meta"):
        model = Qwen2VL(PRESETS[name])
    assert layer_schemes(model, "int4")["model.layers.0.mlp.down_proj"] == LayerScheme(
        4, group_size
    )


@pytest.mark.parametrize(
    ("widths", "group_size"),
    [([192, 512], 32), ([384, 512], 64), ([768, 3072], 128), ([768, 800], 32), ([64], 32)],
)
def test_narrow_models_have_smaller_groups(widths: list[int], group_size: int) -> None:
    assert _group_size(widths) == group_size


def test_layers_that_no_group_divides_keep_8_bits() -> None:
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
        schemes = layer_schemes(Qwen2VL(config), "int4")
    assert schemes["model.layers.0.mlp.down_proj"] == LayerScheme(8)
    assert schemes["model.layers.0.mlp.up_proj"] == LayerScheme(4, 32)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="quantize 'int2' is unknown; use int8 or int4"):
        layer_schemes(tiny_model(), "int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_every_linear_layer_is_replaced_and_nothing_else(
    mode: CpuQuantizationMode, tied: bool
) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    before = dict(model.named_parameters())
    schemes = layer_schemes(model, mode)
    quantize(model, mode)
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    for name, scheme in schemes.items():
        layer = model.get_submodule(name)
        quantized_layer = layer.layer if isinstance(layer, FusedLinearSlice) else layer
        assert isinstance(quantized_layer, QuantizedLinear)
        assert isinstance(quantized_layer, Int4Linear) == (scheme.bits == 4)
    after = dict(model.named_parameters())
    assert set(after) == {n for n in before if n.rpartition(".")[0] not in schemes}
    assert all(after[name] is before[name] for name in after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_logits_equal_those_of_the_dequantized_model(
    mode: CpuQuantizationMode, dtype: torch.dtype
) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False)).to(dtype)
    quantize(model, mode)
    got_TV, want_TV = logits_of(model), logits_of(dequantized_copy(model))
    assert got_TV.isfinite().all()
    assert float((got_TV - want_TV).norm() / want_TV.norm()) < 0.03


@pytest.mark.parametrize(("mode", "tolerance"), [("int8", 0.03), ("int4", 0.25)])
def test_logits_are_near_those_of_the_unquantized_model(
    mode: CpuQuantizationMode, tolerance: float
) -> None:
    model = tiny_model()
    want_TV = logits_of(model)
    quantize(model, mode)
    assert float((logits_of(model) - want_TV).norm() / want_TV.norm()) < tolerance


def test_description_distinguishes_arithmetic() -> None:
    model = tiny_model()
    assert describe_quantization(model) == ""
    quantize(model, "int8")
    assert describe_quantization(model) == f"visual: 10 {INT8}, model: 14 {INT8}, lm_head: 1 {INT8}"
    model = tiny_model()
    quantize(model, "int4")
    assert (
        describe_quantization(model) == f"visual: 10 {INT8}, model: 14 int4/32, lm_head: 1 {INT8}"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_online_quantization_equals_quantize(mode: CpuQuantizationMode, dtype: str) -> None:
    loaded, _ = load("nano", dtype=dtype, quantize=mode)  # type: ignore[arg-type]
    quantized_model, _ = load("nano", dtype=dtype)  # type: ignore[arg-type]
    plain, _ = load("nano", dtype=dtype)  # type: ignore[arg-type]
    quantize(quantized_model, mode)
    assert describe_quantization(loaded) == describe_quantization(quantized_model)
    for name in layer_schemes(plain, mode):
        loaded_layer, quantized_layer = (
            loaded.get_submodule(name),
            quantized_model.get_submodule(name),
        )
        assert isinstance(loaded_layer, QuantizedLinear | FusedLinearSlice)
        assert isinstance(quantized_layer, QuantizedLinear | FusedLinearSlice)
        assert torch.equal(loaded_layer.quantized_weight(), quantized_layer.quantized_weight())
        assert torch.equal(loaded_layer.dequantize(), quantized_layer.dequantize())
    assert torch.equal(logits_of(loaded), logits_of(quantized_model))
    assert loaded.dtype == getattr(torch, dtype)
