"""`qwen2vl init --text QWEN2 --vision DFN -o DIR`: initialize a Qwen2-VL from pretrained models.

Combines a Qwen2 language model and a CLIP vision tower into one model folder, from which a recipe
can start (`model=DIR`). See `qwen2vl.weights.init_pretrained`.
"""

from __future__ import annotations

import click

from qwen2vl.cli import terminal

__all__ = ["init"]


@click.command()
@click.option(
    "--text", required=True, metavar="DIR_OR_REPO", help="Source of the language model: Qwen2."
)
@click.option(
    "--vision",
    required=True,
    metavar="DIR_OR_REPO",
    help="Source of the vision tower: CLIP, as DFN's.",
)
@click.option("-o", "--output", required=True, metavar="DIR", help="Model folder to create.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the new weights.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Data type of the saved weights.",
)
@terminal.debug_option
def init(text: str, vision: str, output: str, seed: int, dtype: str) -> None:
    """Initialize a Qwen2-VL from a pretrained language model and a CLIP vision tower.

    \b
    qwen2vl init --text Qwen/Qwen2-1.5B --vision dfn-vit-h-378 -o start
    qwen2vl train stage1_vision model=start data=captions.jsonl
    """
    # Imported here, so that usage errors do not wait for the import of torch.
    import torch

    from qwen2vl.weights.init_pretrained import init_from_pretrained

    with terminal.spinner("initializing"):
        config = init_from_pretrained(text, vision, output, seed=seed, dtype=getattr(torch, dtype))
    terminal.echo(
        f"model: {output} (vision tower: {config.vision.depth} blocks of width "
        f"{config.vision.embed_dim}; language model: {config.text.num_hidden_layers} layers of "
        f"width {config.text.hidden_size})"
    )
    terminal.echo("newly initialized: the merger, and embeddings of missing special tokens")
    terminal.echo(f"try:   qwen2vl train stage1_vision model={output} data=FILE.jsonl")
