"""Compiled equals eager within rounding, names stay; slow, for it runs a C++ compiler."""

import pytest
import torch

from qwen2vl.adapt.compile import compile_parts
from qwen2vl.train.objective import token_loss
from qwen2vl.train.pack import pack
from tests.tiny import tiny_model
from tests.train.test_pack import conversations


@pytest.mark.slow
def test_compiled_parts_compute_the_same_loss_and_gradients() -> None:
    batch = pack(conversations(), pad_id=0)
    eager, compiled = tiny_model(seed=0), tiny_model(seed=0)
    compile_parts(compiled)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for model in (eager, compiled):
        model.requires_grad_(True)
        hidden_TD = batch.run(model)
        token_loss(hidden_TD, model.head_weight, batch, 1.0).loss.backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * float(a.grad.abs().max()))
