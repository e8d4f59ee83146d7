"""Numerical parity: compare the activations of this library with a reference, step by step.

A `Tracer` runs a ParityPrompt and returns a `Trace`: pixels, ids, positions, the output of each
block and the logits, under common step names. `compare` finds the first step that differs, and by
how much. Activations are recorded with forward hooks; the model code is unchanged. The reference
tracer, which runs transformers, is in reference.py. Of a quantized folder both sides
compute with the dequantized weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwen2vl.fill import fill_parameters
from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load_model
from qwen2vl.memory import choose_dtype
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor
from qwen2vl.weights import TensorFolder, check_state_dict, open_tensors

__all__ = [
    "EXACT",
    "ActivationRecorder",
    "ParityPrompt",
    "ParityReport",
    "StepComparison",
    "Trace",
    "Tracer",
    "compare",
    "model_tracer",
    "run_model",
    "synthetic_prompt",
]

# Integers, and pixels, for which both implementations do the same arithmetic in the same order.
EXACT = frozenset({"pixels", "grids", "ids", "positions", "rope_delta"})

Trace = dict[str, Tensor]  # step name -> activation, in the order of the forward pass


@dataclass(frozen=True, slots=True)
class ParityPrompt:
    """Input of both implementations: images and videos in prompt order, then text."""

    text: str
    media: tuple[tuple[str, Any], ...]  # ("image" | "video", any source the processor opens)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation of one turn."""
        content = [{"type": kind, kind: source} for kind, source in self.media]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


Tracer = Callable[[ParityPrompt], Trace]


@dataclass(frozen=True, slots=True)
class StepComparison:
    """Comparison of one step."""

    name: str
    max_abs: float  # largest absolute error
    relative: float  # the same over the largest magnitude of the reference
    limit: float  # tolerance of `relative`
    note: str = ""

    @property
    def matches(self) -> bool:
        """Whether the error is within the limit; NaN never matches."""
        return self.relative <= self.limit


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Comparison of all steps, in the order of the forward pass."""

    steps: tuple[StepComparison, ...]

    @property
    def first_divergence(self) -> StepComparison | None:
        """The first step that differs; later steps inherit its error."""
        return next((step for step in self.steps if not step.matches), None)

    @property
    def worst(self) -> StepComparison:
        """The step with the largest relative error."""
        return max(self.steps, key=lambda step: step.relative)


def compare(trace: Trace, reference: Trace, tolerance: float = 1e-5) -> ParityReport:
    """Compare each step with the reference, within `tolerance` of its largest magnitude."""
    names = [*reference, *(name for name in trace if name not in reference)]
    return ParityReport(
        tuple(_compare_step(n, trace.get(n), reference.get(n), tolerance) for n in names)
    )


def _compare_step(
    name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float
) -> StepComparison:
    limit = 0.0 if name in EXACT else tolerance
    if actual is None or expected is None:
        side = "the reference" if actual is None else "this library"
        return StepComparison(name, math.inf, math.inf, limit, f"only in {side}")
    if actual.shape != expected.shape:
        note = f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
        return StepComparison(name, math.inf, math.inf, limit, note)
    max_abs = (actual.double() - expected.double()).abs().max().item()
    magnitude = expected.double().abs().max().item()
    relative = max_abs / magnitude if magnitude else max_abs
    return StepComparison(name, max_abs, relative, limit)


# This library -----------------------------------------------------------------------------------


def model_tracer(folder: Path, processor: Processor) -> Tracer:
    """Return a tracer of this library, which loads the model for one prompt and then frees it."""

    def trace(prompt: ParityPrompt) -> Trace:
        inputs = processor(prompt.messages)
        num_patches = sum(math.prod(grid) for grid in inputs.grids)
        max_pixels = num_patches * processor.config.vision.patch_size**2
        tensors = open_tensors(folder)
        if tensors.packed_layers:
            model = _load_dequantized(tensors, processor, len(inputs.input_ids), max_pixels)
        else:
            model = load_model(
                folder,
                processor.config,
                dtype="float32",
                max_model_len=len(inputs.input_ids),
                max_pixels=max_pixels,
            )
        return run_model(model, inputs)

    return trace


def _load_dequantized(
    tensors: TensorFolder, processor: Processor, max_model_len: int, max_pixels: int
) -> Qwen2VL:
    """Load a quantized folder as an unquantized model in float32."""
    device = torch.device("cpu")
    check_state_dict(tensors, processor.config)
    choose_dtype(processor.config, device, "float32", max_model_len, max_pixels)
    model = meta_model(processor.config)
    fill_parameters(model, tensors, device, torch.float32, skip_layers=())
    return model.eval()


@torch.inference_mode()
def run_model(model: Qwen2VL, inputs: ModelInput) -> Trace:
    """Run one prompt and record the activations of every step."""
    with ActivationRecorder().recording() as recorder:
        _register_hooks(recorder, model)
        hidden_TD = model(
            torch.tensor(inputs.input_ids),
            inputs.position_ids_3T,
            AttnMeta.build([len(inputs.input_ids)]),
            patches_NP=inputs.patches_NP,
            vision_meta=inputs.vision_meta,
            placeholder_index_M=inputs.placeholder_index_M,
        )
        logits_TV = model.logits(hidden_TD)
    activations = {name: calls[0] for name, calls in recorder.activations.items()}
    pixels = {"pixels": activations.pop("pixels")} if "pixels" in activations else {}
    grids = {"grids": torch.tensor(inputs.grids)} if inputs.items else {}
    return {
        **pixels,
        **grids,
        "ids": torch.tensor(inputs.input_ids),
        "positions": inputs.position_ids_3T,
        "rope_delta": torch.tensor(inputs.rope_delta),
        **activations,
        "logits": logits_TV.float(),
    }


def _register_hooks(recorder: ActivationRecorder, model: Qwen2VL) -> None:
    tower, decoder = model.visual, model.model
    recorder.record_input("pixels", tower.patch_embed, 0)
    recorder.record_output("vision.patch_embed", tower.patch_embed)
    recorder.record_input("vision.rotary", tower.blocks[0], 1)
    for i, block in enumerate(tower.blocks):
        recorder.record_output(f"vision.block.{i}", block)
    recorder.record_output("vision.merger", tower.merger)
    recorder.record_input("text.embeddings", decoder.layers[0], 0)
    recorder.record_input("text.rotary", decoder.layers[0], 1)
    for i, layer in enumerate(decoder.layers):
        recorder.record_output(f"text.layer.{i}", layer)
    recorder.record_output("text.norm", decoder.norm)


class ActivationRecorder:
    """Records inputs and outputs of modules with forward hooks, call by call."""

    def __init__(self) -> None:
        self.activations: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def recording(self) -> Iterator[ActivationRecorder]:
        """Remove all hooks on exit, also after an exception."""
        try:
            yield self
        finally:
            for handle in self._handles:
                handle.remove()

    def record_output(
        self, name: str, module: nn.Module, select: Callable[[Any], Any] = lambda output: output
    ) -> None:
        """Record what `module` returns, or `select` of it."""
        self._handles.append(
            module.register_forward_hook(
                lambda _module, _args, output: self._store(name, select(output))
            )
        )

    def record_input(self, name: str, module: nn.Module, index: int) -> None:
        """Record one positional argument of `module`."""
        self._handles.append(
            module.register_forward_pre_hook(lambda _module, args: self._store(name, args[index]))
        )

    def _store(self, name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        """Store a copy, because the forward pass may modify the tensor in place later."""
        joined = torch.cat(value, dim=-1) if isinstance(value, tuple) else value.clone()
        self.activations.setdefault(name, []).append(joined.float())


# Default prompt ---------------------------------------------------------------------------------


def synthetic_prompt() -> ParityPrompt:
    """Return a prompt of two random images of odd sizes and a random video with t > h, w in tokens.

    In such a video the two rules for the text positions after it differ (geometry.py).
    """
    generator = torch.Generator().manual_seed(0)

    def random_pixels(*shape: int) -> Any:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()

    media = (
        ("image", random_pixels(90, 150, 3)),
        ("video", random_pixels(8, 56, 84, 3)),
        ("image", random_pixels(70, 61, 3)),
    )
    return ParityPrompt("What do you see in these?", media)
