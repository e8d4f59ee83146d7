"""GEMV of one row equals the row in a GEMM; parameters and weight tying do not change."""

from typing import Any

import pytest
import torch

from qwen2vl.linear import kernel_linear
from qwen2vl.linear.cpu.library import VARIABLE
from qwen2vl.linear.kernel_linear import MAX_ROWS, KernelLinear, use_kernels
from tests.linear.cpu.test_operators import AVAILABLE
from tests.tiny import tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _no_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_linear, "MIN_GEMV_WEIGHTS", 0)


def test_small_matrices_are_multiplied_as_rows_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_linear, "MIN_GEMV_WEIGHTS", 96 * 40 + 1)
    monkeypatch.setattr(kernel_linear, "_gemv", None)
    layer = KernelLinear(96, 40)
    x_TD = torch.randn(1, 96)
    assert torch.equal(layer(x_TD), torch.nn.functional.linear(x_TD, layer.weight, layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_row_equals_the_row_in_a_batch(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=bias, dtype=dtype)
    gemv = KernelLinear(96, 40, bias=bias, dtype=dtype)
    gemv.load_state_dict(plain.state_dict())
    x_TD = torch.randn(5, 96, dtype=dtype)
    want_TD = plain(x_TD)
    assert torch.equal(gemv(x_TD), want_TD)
    for t in range(5):
        single_TD = gemv(x_TD[t : t + 1])
        assert single_TD.shape == (1, 40)
        torch.testing.assert_close(single_TD, want_TD[t : t + 1])


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_kernels_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch, instruction_set: str) -> None:
    monkeypatch.setenv(VARIABLE, instruction_set)
    model = tiny_model(config=tiny_config()).bfloat16()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    x_TD = torch.randn(40, layer.in_features).bfloat16()
    want_TD = layer(x_TD)
    use_kernels(model)
    assert isinstance(layer, KernelLinear)
    assert layer.max_kernel_rows >= (40 if instruction_set == "amx" else MAX_ROWS)
    for rows in (1, MAX_ROWS, 40):
        torch.testing.assert_close(layer(x_TD[:rows]), want_TD[:rows], rtol=1e-2, atol=1e-2)


def test_without_kernels_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    model = tiny_model(config=tiny_config()).bfloat16()
    use_kernels(model)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, KernelLinear)
    assert layer.max_kernel_rows == 0


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_the_vision_tower_is_replaced_with_tiles(
    monkeypatch: pytest.MonkeyPatch, instruction_set: str
) -> None:
    monkeypatch.setenv(VARIABLE, instruction_set)
    model = tiny_model(config=tiny_config())
    use_kernels(model)
    linears = [m for m in model.visual.modules() if isinstance(m, torch.nn.Linear)]
    has_tiles = instruction_set == "amx"
    assert [isinstance(linear, KernelLinear) for linear in linears] == [has_tiles] * len(linears)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_and_head_are_replaced(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    hidden_TD = torch.randn(3, model.config.text.hidden_size)
    want_TV = model.logits(hidden_TD)
    use_kernels(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    replaced = [name for name, m in model.named_modules() if isinstance(m, KernelLinear)]
    assert len(replaced) == 7 * model.config.text.num_hidden_layers + 1
    assert replaced[-1] == "lm_head"
    assert not any(name.startswith("visual") for name in replaced)
    assert torch.equal(model.logits(hidden_TD), want_TV)
    for t in range(3):
        torch.testing.assert_close(model.logits(hidden_TD[t : t + 1]), want_TV[t : t + 1])
