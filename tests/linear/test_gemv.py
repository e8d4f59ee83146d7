"""One row by the vector kernel equals the same row among others; names and ties stay."""

import pytest
import torch

from qwen2vl.linear.gemv import RowLinear, multiply_single_rows
from tests.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_is_the_row_among_others(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40, bias=bias, dtype=dtype)
    rows = RowLinear(96, 40, bias=bias, dtype=dtype)
    rows.load_state_dict(plain.state_dict())
    x_TD = torch.randn(5, 96, dtype=dtype)
    want_TD = plain(x_TD)
    assert torch.equal(rows(x_TD), want_TD)
    for t in range(5):
        alone_TD = rows(x_TD[t : t + 1])
        assert alone_TD.shape == (1, 40)
        torch.testing.assert_close(alone_TD, want_TD[t : t + 1])


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_and_its_head_are_changed_and_the_tower_is_not(tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    hidden_TD = torch.randn(3, model.config.text.hidden_size)
    want_TV = model.logits(hidden_TD)
    multiply_single_rows(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    changed = [name for name, m in model.named_modules() if isinstance(m, RowLinear)]
    assert len(changed) == 7 * model.config.text.num_hidden_layers + 1
    assert changed[-1] == "lm_head"
    assert not any(name.startswith("visual") for name in changed)
    assert torch.equal(model.logits(hidden_TD), want_TV)
    for t in range(3):
        torch.testing.assert_close(model.logits(hidden_TD[t : t + 1]), want_TV[t : t + 1])
