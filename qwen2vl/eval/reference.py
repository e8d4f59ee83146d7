"""Reference for parity: the same checkpoint folder, processed and run by transformers.

Uses its tokenizer and chat template, its image processor and its model in fp32 with eager
attention. Only decoded RGB images and the sampled frames of videos come from this library
(transformers' own video processor needs torchvision), and the dequantized weights of a quantized
folder, for which transformers needs further packages. This is the only module that imports
transformers, an extra: `pip install 'qwen2vl[parity]'`.
(HF: Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from qwen2vl.errors import CheckpointError
from qwen2vl.eval.parity import ActivationRecorder, ParityPrompt, Trace, Tracer
from qwen2vl.processor.image import unpatchify
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.weights import expected_shapes, open_tensors
from qwen2vl.weights.config_files import CHAT_TEMPLATE, read_json

__all__ = ["ReferenceInputs", "prepare", "reference_tracer", "run_reference"]

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """A prompt as preprocessed by transformers; one entry per item, in prompt order."""

    ids: list[int]
    kinds: tuple[str, ...]
    patches: tuple[Tensor, ...]
    grids: tuple[tuple[int, int, int], ...]


def reference_tracer(folder: Path, processor: Processor) -> Tracer:
    """Return a tracer of transformers, which loads the model for one prompt and then frees it.

    `processor` is that of this library, and only decodes videos.
    """

    def trace(prompt: ParityPrompt) -> Trace:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        inputs = prepare(folder, processor, prompt)
        with _errors_of_transformers(folder, "the model"):
            model = _load_model(folder, processor)
        return run_reference(model.eval(), inputs)

    return trace


def _load_model(folder: Path, processor: Processor) -> Qwen2VLForConditionalGeneration:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    tensors = open_tensors(folder)
    if not tensors.packed_layers:
        return Qwen2VLForConditionalGeneration.from_pretrained(folder, **options)
    config = Qwen2VLConfig.from_pretrained(folder)
    del config.quantization_config  # type: ignore[attr-defined]
    shapes = expected_shapes(processor.config)
    state = {name: tensors[name].view(shape).float() for name, shape in shapes.items()}
    return Qwen2VLForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, **options
    )


@contextmanager
def _errors_of_transformers(folder: Path, what: str) -> Iterator[None]:
    """Convert exceptions of transformers, which opens fewer folders than this library.

    Raises:
        CheckpointError: with what could not be opened, and the first line of the reason.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder}: transformers cannot open {what}: {type(error).__name__}: {reason}; parity "
            "needs a folder that transformers opens: fetch the missing file from the model's "
            "repository, or run `qwen2vl doctor` to check this library alone"
        ) from error


# Preparing ------------------------------------------------------------------------------------


def prepare(folder: Path, processor: Processor, prompt: ParityPrompt) -> ReferenceInputs:
    """Convert a prompt to pixels, grids and ids with transformers' own classes."""
    with _errors_of_transformers(folder, "the image processor"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    kinds = tuple(kind for kind, _ in prompt.media)
    items = [
        _process_image(image_processor, source, processor.limits)
        if kind == "image"
        else _process_video(image_processor, _decode_frames(processor, source))
        for kind, source in prompt.media
    ]
    grids = tuple(grid for _, grid in items)
    counts = [t * h * w // image_processor.merge_size**2 for t, h, w in grids]
    ids = _tokenize(folder, prompt, kinds, counts)
    return ReferenceInputs(ids, kinds, tuple(patches for patches, _ in items), grids)


def _process_image(
    image_processor: Qwen2VLImageProcessorPil, source: Any, limits: MediaLimits
) -> tuple[Tensor, tuple[int, int, int]]:
    rgb = open_image(source, limits, "image").image
    features = image_processor(rgb, return_tensors="pt")
    t, h, w = features["image_grid_thw"][0].tolist()
    return features["pixel_values"], (t, h, w)


def _process_video(
    image_processor: Qwen2VLImageProcessorPil, frames_FHWC: np.ndarray
) -> tuple[Tensor, tuple[int, int, int]]:
    """Interleave frames processed as images: a patch of frames a and b holds a, then b.

    The image processor repeats each frame in time; of every pair of frames, the first one supplies
    the first half of a patch and the second one the second half.
    """
    features = image_processor(list(frames_FHWC), do_resize=False, return_tensors="pt")
    _, h, w = features["image_grid_thw"][0].tolist()
    t = len(frames_FHWC) // image_processor.temporal_patch_size
    frames = features["pixel_values"].view(t, 2, h * w, 3, 2, -1)
    interleaved = torch.stack((frames[:, 0, :, :, 0], frames[:, 1, :, :, 1]), dim=3)
    return interleaved.flatten(2).flatten(0, 1), (t, h, w)


def _decode_frames(processor: Processor, source: Any) -> np.ndarray:
    """Return the sampled frames of a video: an even number, already resized."""
    content = [{"type": "video", "video": source}]
    item = processor([{"role": "user", "content": content}]).items[0]
    frames_FCHW = unpatchify(item.patches_NP, item.grid, processor.config.vision)
    return frames_FCHW.permute(0, 2, 3, 1).numpy()


def _tokenize(
    folder: Path, prompt: ParityPrompt, kinds: Sequence[str], counts: Sequence[int]
) -> list[int]:
    """Apply the folder's chat template and expand placeholders, as HF's Qwen2VLProcessor does."""
    with _errors_of_transformers(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": prompt.text}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=tokenizer.chat_template or _read_chat_template(folder),
        tokenize=False,
        add_generation_prompt=True,
    )
    expanded = str(text)
    for kind, count in zip(kinds, counts, strict=True):
        expanded = expanded.replace(f"<|{kind}_pad|>", f"<|{kind}_done|>" * count, 1)
    return tokenizer(expanded.replace("_done|>", "_pad|>"))["input_ids"]


def _read_chat_template(folder: Path) -> str:
    """Return the template of chat_template.json, where released models have it; else theirs.

    Processors of transformers read that file, its tokenizers do not.
    """
    path = folder / "chat_template.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else CHAT_TEMPLATE


# Running --------------------------------------------------------------------------------------


@torch.inference_mode()
def run_reference(model: Qwen2VLForConditionalGeneration, inputs: ReferenceInputs) -> Trace:
    """Run one prompt and record its activations, with the names and the order of parity.py."""
    positions, rope_delta = _positions(model, inputs)
    with ActivationRecorder().recording() as recorder:
        _register_hooks(recorder, model)
        output = model(
            input_ids=torch.tensor([inputs.ids]),
            attention_mask=torch.ones(1, len(inputs.ids), dtype=torch.int64),
            position_ids=positions[:, None],
            use_cache=False,
            **_media_arguments(inputs),
        )
    activations = {
        name: _in_prompt_order(calls, inputs) if name.startswith("vision.") else calls[0][0]
        for name, calls in recorder.activations.items()
    }
    visual: Trace = {}
    if inputs.patches:
        visual = {"pixels": torch.cat(inputs.patches), "grids": torch.tensor(inputs.grids)}
    return {
        **visual,
        "ids": torch.tensor(inputs.ids),
        "positions": positions,
        "rope_delta": torch.tensor(rope_delta),
        **activations,
        "logits": output.logits[0].float(),
    }


def _positions(
    model: Qwen2VLForConditionalGeneration, inputs: ReferenceInputs
) -> tuple[Tensor, int]:
    """Return transformers' M-RoPE positions, with text resuming after a video's last frame.

    transformers 5.23 resumes at max(h, w) / 2 for any t; the paper, transformers 4.x and Qwen's
    own training code take t into account. The two differ only if t > max(h, w) / 2.
    """
    if not inputs.kinds:
        return torch.arange(len(inputs.ids)).expand(3, -1), 0
    config: Any = model.config
    placeholders = {config.image_token_id: 1, config.video_token_id: 2}
    tensors = _media_arguments(inputs)
    ids: Any = torch.tensor([inputs.ids])
    types: Any = torch.tensor([[placeholders.get(token, 0) for token in inputs.ids]])
    batched, delta = model.model.get_rope_index(
        ids, types, tensors.get("image_grid_thw"), tensors.get("video_grid_thw")
    )
    positions, total_shift = batched[:, 0].clone(), 0
    ends = [i + 1 for i in range(len(inputs.ids)) if types[0, i] and not types[0, i + 1]]
    for end, (t, h, w) in zip(ends, inputs.grids, strict=True):
        shift = max(0, t - max(h, w) // config.vision_config.spatial_merge_size)
        positions[:, end:] += shift
        total_shift += shift
    return positions, int(delta) + total_shift


def _media_arguments(inputs: ReferenceInputs) -> dict[str, Any]:
    """Split the stream of items into the model's arguments for images and for videos."""
    arguments: dict[str, Any] = {}
    for kind in dict.fromkeys(inputs.kinds):
        indices = [i for i, other in enumerate(inputs.kinds) if other == kind]
        arguments[_PIXELS[kind]] = torch.cat([inputs.patches[i] for i in indices])
        arguments[_GRIDS[kind]] = torch.tensor([inputs.grids[i] for i in indices])
    return arguments


def _in_prompt_order(calls: list[Tensor], inputs: ReferenceInputs) -> Tensor:
    """Reorder activations of the vision tower: all images, then all videos -> prompt order."""
    sizes = [t * h * w for t, h, w in inputs.grids]
    merge = sum(sizes) // sum(len(call) for call in calls)  # 1 before the merger, 4 after it
    by_kind: dict[str, Iterator[Tensor]] = {}
    for kind, call in zip(sorted(set(inputs.kinds)), calls, strict=True):  # images come first
        lengths = [n // merge for n, k in zip(sizes, inputs.kinds, strict=True) if k == kind]
        by_kind[kind] = iter(call.split(lengths))
    return torch.cat([next(by_kind[kind]) for kind in inputs.kinds])


def _register_hooks(recorder: ActivationRecorder, model: Qwen2VLForConditionalGeneration) -> None:
    tower, decoder = model.model.visual, model.model.language_model
    recorder.record_output("vision.patch_embed", tower.patch_embed)
    recorder.record_output("vision.rotary", tower.rotary_pos_emb, _first_halves)
    for i, block in enumerate(tower.blocks):
        recorder.record_output(f"vision.block.{i}", block)
    recorder.record_output("vision.merger", tower.merger)
    recorder.record_input("text.embeddings", decoder.layers[0], 0)
    recorder.record_output("text.rotary", decoder.rotary_emb, _first_halves)
    for i, layer in enumerate(decoder.layers):
        recorder.record_output(f"text.layer.{i}", layer)
    recorder.record_output("text.norm", decoder.norm)


def _first_halves(cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the first half of cos and sin: the second repeats it, and is not stored here."""
    return tuple(part[..., : part.shape[-1] // 2] for part in cos_sin)
