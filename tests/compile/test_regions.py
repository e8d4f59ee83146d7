"""Compiled regions equal eager within rounding; the slow tests run a C++ compiler."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.compile import regions
from qwen2vl.compile.regions import compile_for_inference, compile_regions
from qwen2vl.engine import LLM
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear import prepacked
from qwen2vl.loading import load_model
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import quantize
from qwen2vl.train.loader.batch import pack_batch
from qwen2vl.train.loss import token_loss
from qwen2vl.weights import read_config, resolve_model
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations


@pytest.mark.slow
def test_compiled_regions_give_the_same_loss_and_gradients() -> None:
    batch = pack_batch(conversations(), pad_id=0)
    eager, compiled = tiny_model(seed=0), tiny_model(seed=0)
    compile_regions(compiled)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for model in (eager, compiled):
        model.requires_grad_(True)
        hidden_TD = batch.forward(model)
        token_loss(hidden_TD, model.lm_head_weight, batch, 1.0).loss.backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-5 * float(a.grad.abs().max()))


@torch.inference_mode()
def encode_images(model: Qwen2VL, *sides: tuple[int, int]) -> Tensor:
    grids = [Grid(1, h, w) for h, w in sides]
    generator = torch.Generator().manual_seed(0)
    size = (sum(h * w for h, w in sides), model.config.vision.patch_dim)
    patches_NP = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return model.encode(patches_NP, VisionMeta.build(grids))


@torch.inference_mode()
def run_decoder(model: Qwen2VL, *lengths: int) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model(positions % 200, positions.expand(3, -1), AttnMeta.build(lengths))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_nano_equals_eager_for_any_shape_without_recompiling() -> None:
    folder = resolve_model("nano")
    eager = load_model(folder, read_config(folder), dtype="float32")
    compiled = copy.deepcopy(eager)
    assert compile_for_inference(compiled)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    torch._dynamo.config.error_on_recompile = True
    try:
        for sides in ([(2, 2)], [(4, 6), (16, 16)], [(24, 32)] * 2, [(2, 192)]):
            want = encode_images(eager, *sides)
            error = (encode_images(compiled, *sides) - want).abs().max()
            assert error < 1e-4 * want.abs().max(), sides
        for lengths in ([1], [5], [1] * 40, [33, 1, 8], [384], [300, 300]):
            want = run_decoder(eager, *lengths)
            error = (run_decoder(compiled, *lengths) - want).abs().max()
            assert error < 1e-4 * want.abs().max(), lengths
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize(("min_rows", "compiled"), [(32, [32, 500]), (0, [1, 31, 32, 500])])
def test_few_rows_run_eagerly(min_rows: int, compiled: list[int]) -> None:
    """The minimum of 0 rows is that of GPUs."""
    compiled_rows: list[int] = []
    dispatch = regions._dispatch_by_rows(
        lambda x: x, lambda x: compiled_rows.append(len(x)), min_rows
    )
    for rows in (1, 31, 32, 500):
        dispatch(torch.zeros(rows, 3))
    assert compiled_rows == compiled


def test_without_a_compiler_the_model_is_unchanged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def no_compiler(*_: Any) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(regions.torch, "compile", lambda *_, **__: no_compiler)
    model = tiny_model()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with caplog.at_level(logging.WARNING):
        assert not compile_for_inference(model)
    assert [r.getMessage() for r in caplog.records if "nothing here can compile" in r.getMessage()]
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    torch.testing.assert_close(run_decoder(model, 40), run_decoder(tiny_model(), 40))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_compiled_prepacked_and_quantized_layers_equal_eager(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1)
    models = []
    for _ in range(2):
        model = tiny_model(config=tiny_config(tie_word_embeddings=False), seed=0)
        if kind in ("int8", "int4"):
            quantize(model, "int8" if kind == "int8" else "int4")
        else:
            prepacked.prepack_layers(model.bfloat16())
        models.append(model)
    eager, compiled = models
    assert compile_for_inference(compiled)
    tolerance = (
        2e-2 if kind == "bfloat16" else 5e-2
    )  # activations may be quantized to other integers
    for want, got in (
        (encode_images(eager, (4, 6), (16, 16)), encode_images(compiled, (4, 6), (16, 16))),
        (run_decoder(eager, 33, 1, 8), run_decoder(compiled, 33, 1, 8)),
    ):
        assert (got.float() - want.float()).norm() < tolerance * want.float().norm()


def test_unmerged_adapters_cannot_be_compiled() -> None:
    with pytest.raises(InputError, match=r"compile: .*unmerged cannot be compiled.*adapter="):
        LLM("nano", compile=True, adapters={"a": "anywhere"})
