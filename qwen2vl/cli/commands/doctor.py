"""`qwen2vl doctor`: environment report, and validation of a model folder.

Prints what a bug report needs: versions, device, the dtype that `auto` selects, memory, video
decoders, fonts. --check-weights reads every tensor of a model folder and lists those with NaN or
Inf. The command writes and downloads nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import click

import qwen2vl
from qwen2vl import threads
from qwen2vl.cli import terminal
from qwen2vl.errors import CheckpointError, Qwen2VLError
from qwen2vl.linear.cpu.library import describe_kernels

__all__ = ["doctor"]

PACKAGES = "torch numpy pillow tokenizers safetensors huggingface_hub av transformers".split()


@click.command()
@click.argument("folders", metavar="[FOLDER]...", nargs=-1)
@click.option("--model", metavar="DIR", help="Validate the files of a model folder (headers only).")
@click.option(
    "--check-weights", metavar="DIR", help="Read every tensor of DIR; list those with NaN or Inf."
)
@terminal.debug_option
def doctor(folders: tuple[str, ...], model: str | None, check_weights: str | None) -> None:
    """Check the installation, the device and model folders.

    FOLDER is a model folder, as for --model.
    """
    for name, value in _environment():
        terminal.echo(f"{name:<12} {value}")
    terminal.echo(f"{'nano':<12} {_nano_status()}")
    for folder in dict.fromkeys(name for name in (*folders, model, check_weights) if name):
        terminal.echo(f"{'model':<12} {_check_folder(folder)}")
    if check_weights:
        _check_tensors(check_weights)


def _environment() -> Iterator[tuple[str, str]]:
    import torch

    from qwen2vl.memory import available_memory, preferred_dtypes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "qwen2vl", qwen2vl.__version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package)
    yield "device", _device_name()
    yield "kernels", describe_kernels()
    yield "threads", _threads()
    dtypes = [str(dtype).removeprefix("torch.") for dtype in preferred_dtypes(device)]
    yield "dtype auto", " if it fits, else ".join(dtypes)
    available = available_memory(device)
    yield "memory", "unknown" if available is None else f"{available / 2**30:.1f} GiB available"
    yield "video", _decoders()
    yield "fonts", f"for training: {_fonts('all')}"
    yield "fonts", f"for evaluation: {_fonts('judge')}"
    yield (
        "output",
        f"{sys.stdout.encoding}, {'a terminal' if sys.stdout.isatty() else 'no terminal'}",
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"


def _threads() -> str:
    """Return the CPUs, torch's threads and how they wait, and whether other processes run."""
    import torch

    count = threads.available_cpus()
    chosen = "set" if threads.is_num_threads_given() else "commands that answer measure it"
    text = f"{torch.get_num_threads()} of torch ({chosen}), {count} CPUs; {threads.wait_policy()}"
    load = os.getloadavg()[0]
    return text + f"; load {load:.1f}: other processes run" if load > 0.5 else text


def _decoders() -> str:
    """Return which of the common video codecs PyAV was built with."""
    import av

    wanted = ("h264", "hevc", "vp9", "av1", "mpeg4")
    found = [name for name in wanted if name in av.codecs_available]
    return f"PyAV decodes {', '.join(found)}"


def _fonts(group: str) -> str:
    """Return the number of font files of a set, or the error that names the packages."""
    from qwen2vl.synth.fonts import FontError, files_of

    try:
        return f"{sum(len(family) for family in files_of(group))} files"
    except FontError as error:
        return str(error)


def _nano_status() -> str:
    try:
        return _check_folder("nano")
    except Qwen2VLError as error:
        return str(error)


def _check_folder(name: str) -> str:
    """Check headers, tensor names and shapes against config.json, as loading does.

    Raises:
        CheckpointError, ConfigError: the first problem found.
    """
    from qwen2vl.loading import load_processor
    from qwen2vl.weights import check_state_dict, open_tensors, resolve_model

    folder = resolve_model(name)
    processor = load_processor(folder)
    tensors = open_tensors(folder)
    check_state_dict(tensors, processor.config)
    return f"{folder}: {len(tensors)} tensors, config, tokenizer and pixel limits are consistent"


def _check_tensors(name: str) -> None:
    from qwen2vl.weights import nonfinite_tensors, open_tensors, resolve_model

    with terminal.spinner("reading every tensor"):
        nonfinite = nonfinite_tensors(open_tensors(resolve_model(name)))
    if nonfinite:
        raise CheckpointError(
            f"{name}: {len(nonfinite)} tensors hold NaN or infinity: {', '.join(nonfinite)}; "
            "download them again, or train from an earlier checkpoint"
        )
    terminal.echo(f"{'weights':<12} all tensors are finite")
