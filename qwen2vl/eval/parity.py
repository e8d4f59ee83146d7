"""One prompt, two sides, step by step: where do we part from the reference, and by how much?

A side is a function from a Question to a Trace: every intermediate result under one list of step
names. `compare` lays two traces side by side and names the first step that differs. The model
stays pure: what happens inside is overheard by hooks put on from outside.
It must not know transformers. Next room: reference.py, the other side.
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

from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load_model
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor

__all__ = [
    "EXACT",
    "Question",
    "Recorder",
    "Report",
    "Side",
    "Step",
    "Trace",
    "compare",
    "drawn_question",
    "our_side",
    "run_model",
]

# Integers, and pixels, on which both sides do the same arithmetic in the same order.
EXACT = frozenset({"pixels", "grids", "ids", "positions", "rope_delta"})

Trace = dict[str, Tensor]  # step -> result, in the order of the forward


@dataclass(frozen=True, slots=True)
class Question:
    """What both sides are asked: media in prompt order, then words."""

    text: str
    media: tuple[tuple[str, Any], ...]  # ("image" | "video", any source the processor opens)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation of one turn."""
        content = [{"type": kind, kind: source} for kind, source in self.media]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.text}]}]


Side = Callable[[Question], Trace]


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the comparison."""

    name: str
    max_abs: float  # largest deviation
    relative: float  # the same over the largest magnitude of the reference
    limit: float  # what `relative` may reach
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both sides computed the same; not-a-number agrees with nothing."""
        return self.relative <= self.limit


@dataclass(frozen=True, slots=True)
class Report:
    """All steps, in the order of the forward."""

    steps: tuple[Step, ...]

    @property
    def first_divergence(self) -> Step | None:
        """The step to look at: everything after it inherits its error."""
        return next((step for step in self.steps if not step.agrees), None)

    @property
    def worst(self) -> Step:
        """The step with the largest relative error."""
        return max(self.steps, key=lambda step: step.relative)


def compare(ours: Trace, theirs: Trace, tolerance: float = 1e-5) -> Report:
    """Hold every step of `ours` against `theirs`, within `tolerance` of the largest magnitude."""
    names = [*theirs, *(name for name in ours if name not in theirs)]
    return Report(tuple(_step(n, ours.get(n), theirs.get(n), tolerance) for n in names))


def _step(name: str, ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> Step:
    limit = 0.0 if name in EXACT else tolerance
    if ours is None or theirs is None:
        return Step(
            name, math.inf, math.inf, limit, f"only {'the reference' if ours is None else 'we'} did"
        )
    if ours.shape != theirs.shape:
        note = f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
        return Step(name, math.inf, math.inf, limit, note)
    deviation = (ours.double() - theirs.double()).abs().max().item()
    magnitude = theirs.double().abs().max().item()
    relative = deviation / magnitude if magnitude else deviation
    return Step(name, deviation, relative, limit)


# Our side -------------------------------------------------------------------------------------


def our_side(folder: Path, processor: Processor) -> Side:
    """Answer with this library; the model is loaded for one question and dropped after it."""

    def answer(question: Question) -> Trace:
        inputs = processor(question.messages)
        num_patches = sum(math.prod(grid) for grid in inputs.grids)
        model = load_model(
            folder,
            processor.config,
            dtype="float32",
            max_model_len=len(inputs.input_ids),
            max_pixels=num_patches * processor.config.vision.patch_size**2,
        )
        return run_model(model, inputs)

    return answer


@torch.inference_mode()
def run_model(model: Qwen2VL, inputs: ModelInput) -> Trace:
    """Run one prompt and keep what every step computed."""
    with Recorder().listening() as recorder:
        _overhear(recorder, model)
        hidden_TD = model(
            torch.tensor(inputs.input_ids),
            inputs.position_ids_3T,
            AttnMeta.build([len(inputs.input_ids)]),
            patches_NP=inputs.patches_NP,
            vision_meta=inputs.vision_meta,
            pad_index_M=inputs.pad_index_M,
        )
        logits_TV = model.logits(hidden_TD)
    heard = {name: parts[0] for name, parts in recorder.heard.items()}
    pixels = {"pixels": heard.pop("pixels")} if "pixels" in heard else {}
    grids = {"grids": torch.tensor(inputs.grids)} if inputs.items else {}
    return {
        **pixels,
        **grids,
        "ids": torch.tensor(inputs.input_ids),
        "positions": inputs.position_ids_3T,
        "rope_delta": torch.tensor(inputs.rope_delta),
        **heard,
        "logits": logits_TV.float(),
    }


def _overhear(recorder: Recorder, model: Qwen2VL) -> None:
    tower, decoder = model.visual, model.model
    recorder.keep_input("pixels", tower.patch_embed, 0)
    recorder.keep_output("vision.patch_embed", tower.patch_embed)
    recorder.keep_input("vision.rotary", tower.blocks[0], 1)
    for i, block in enumerate(tower.blocks):
        recorder.keep_output(f"vision.block.{i}", block)
    recorder.keep_output("vision.merger", tower.merger)
    recorder.keep_input("text.embeddings", decoder.layers[0], 0)
    recorder.keep_input("text.rotary", decoder.layers[0], 1)
    for i, layer in enumerate(decoder.layers):
        recorder.keep_output(f"text.layer.{i}", layer)
    recorder.keep_output("text.norm", decoder.norm)


class Recorder:
    """Keeps what goes in and out of modules, call by call, until the block ends."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def listening(self) -> Iterator[Recorder]:
        """Take the hooks off again at the end, whatever happens."""
        try:
            yield self
        finally:
            for handle in self._handles:
                handle.remove()

    def keep_output(
        self, name: str, module: nn.Module, of: Callable[[Any], Any] = lambda output: output
    ) -> None:
        """Keep what `module` returns, or the part of it that `of` picks."""
        self._handles.append(
            module.register_forward_hook(
                lambda _module, _args, output: self._keep(name, of(output))
            )
        )

    def keep_input(self, name: str, module: nn.Module, index: int) -> None:
        """Keep one positional argument of `module`."""
        self._handles.append(
            module.register_forward_pre_hook(lambda _module, args: self._keep(name, args[index]))
        )

    def _keep(self, name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        """Store a copy: what the forward does to the original later is not our business."""
        joined = torch.cat(value, dim=-1) if isinstance(value, tuple) else value.clone()
        self.heard.setdefault(name, []).append(joined.float())


# What to ask ----------------------------------------------------------------------------------


def drawn_question() -> Question:
    """Ask about two drawn pictures of odd shapes and a drawn clip, longer in time than in space."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()

    media = (("image", draw(90, 150, 3)), ("video", draw(8, 56, 84, 3)), ("image", draw(70, 61, 3)))
    return Question("What do you see in these?", media)
