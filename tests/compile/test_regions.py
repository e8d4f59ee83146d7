"""Compiled equals eager within rounding, names stay; slow, for it runs a C++ compiler."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.compile import regions as room
from qwen2vl.compile.regions import compile_for_answers, compile_parts
from qwen2vl.engine import LLM
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear import prepacked
from qwen2vl.loading import load_model
from qwen2vl.model import Qwen2VL
from qwen2vl.model.text import RMSNorm, TextMLP
from qwen2vl.model.vision import VisionMLP
from qwen2vl.quantization import int8
from qwen2vl.quantization.scheme import quantize
from qwen2vl.train.loader.batch import pack
from qwen2vl.train.loss import token_loss
from qwen2vl.weights import find, read_config
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations


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


@torch.inference_mode()
def see(model: Qwen2VL, *sides: tuple[int, int]) -> Tensor:
    grids = [Grid(1, h, w) for h, w in sides]
    generator = torch.Generator().manual_seed(0)
    size = (sum(h * w for h, w in sides), model.config.vision.patch_dim)
    patches_NP = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return model.encode(patches_NP, VisionMeta.build(grids))


@torch.inference_mode()
def read(model: Qwen2VL, *lengths: int) -> Tensor:
    places = torch.cat([torch.arange(length) for length in lengths])
    return model(places % 200, places.expand(3, -1), AttnMeta.build(lengths))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nano_compiled_is_nano_for_any_shape_and_compiles_once() -> None:
    folder = find("nano")
    eager = load_model(folder, read_config(folder), dtype="float32")
    compiled = copy.deepcopy(eager)
    assert compile_for_answers(compiled)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    torch._dynamo.config.error_on_recompile = True
    try:
        for sides in ([(2, 2)], [(4, 6), (16, 16)], [(24, 32)] * 2, [(2, 192)]):
            want = see(eager, *sides)
            error = (see(compiled, *sides) - want).abs().max()
            assert error < 1e-4 * want.abs().max(), sides
        for lengths in ([1], [5], [1] * 40, [33, 1, 8], [384], [300, 300]):
            want = read(eager, *lengths)
            error = (read(compiled, *lengths) - want).abs().max()
            assert error < 1e-4 * want.abs().max(), lengths
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize(("least", "compiled"), [(32, [32, 500]), (0, [1, 31, 32, 500])])
def test_few_rows_run_as_they_are(least: int, compiled: list[int]) -> None:
    """On a CPU; a least of 0 is that of GPUs."""
    many: list[int] = []
    choose = room._by_rows(lambda x: x, lambda x: many.append(len(x)), least)
    for rows in (1, 31, 32, 500):
        choose(torch.zeros(rows, 3))
    assert many == compiled


def test_without_a_compiler_the_model_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def no_compiler(*_: Any) -> None:
        raise BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(room.torch, "compile", lambda *_, **__: no_compiler)
    model = tiny_model()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with caplog.at_level(logging.WARNING):
        assert not compile_for_answers(model)
    assert [r.getMessage() for r in caplog.records if "nothing here can compile" in r.getMessage()]
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    torch.testing.assert_close(read(model, 40), read(tiny_model(), 40))


@pytest.mark.parametrize("kind", ["int4", "wide int8"])
def test_parts_that_widen_their_weights_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(int8, "has_integer_products", lambda: kind == "int4")
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    quantize(model, "int4" if kind == "int4" else "int8")
    compiled: list[object] = []
    monkeypatch.setattr(room.torch, "compile", lambda plain, **_: compiled.append(plain) or plain)
    assert compile_for_answers(model)
    owners = {type(method.__self__) for method in compiled}  # type: ignore[attr-defined]
    assert RMSNorm in owners
    assert TextMLP not in owners
    assert (VisionMLP in owners) == (kind == "int4")  # whose tower has 8 bits, and products


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_packed_and_rounded_layers_compute_the_same_when_compiled(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(prepacked, "LARGE", 1)
    models = []
    for _ in range(2):
        model = tiny_model(config=tiny_config(tie_word_embeddings=False), seed=0)
        if kind == "int8":
            quantize(model, "int8")
        else:
            prepacked.pack_layers(model.bfloat16())
        models.append(model)
    eager, compiled = models
    assert compile_for_answers(compiled)
    limit = 2e-2 if kind == "bfloat16" else 5e-2  # a number may fall to another step of 8 bits
    for want, got in (
        (see(eager, (4, 6), (16, 16)), see(compiled, (4, 6), (16, 16))),
        (read(eager, 33, 1, 8), read(compiled, 33, 1, 8)),
    ):
        assert (got.float() - want.float()).norm() < limit * want.float().norm()


def test_nor_are_adapters_that_stay_unmerged() -> None:
    with pytest.raises(InputError, match=r"compile: .*unmerged cannot be compiled.*adapter="):
        LLM("nano", compile=True, adapters={"a": "anywhere"})
