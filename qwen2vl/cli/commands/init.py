"""`qwen2vl init --text QWEN2 --vision DFN -o DIR`: build the model that training starts from.

A Qwen2 language model and a CLIP vision tower become one folder that every recipe starts from
(`init=DIR`). It must not know how a transplant is done. Next room: weights/init_pretrained.py.
"""

from __future__ import annotations

import click

from qwen2vl.cli import terminal

__all__ = ["init"]


@click.command()
@click.option("--text", required=True, metavar="DIR_OR_REPO", help="A Qwen2 language model.")
@click.option("--vision", required=True, metavar="DIR_OR_REPO", help="A CLIP model, as DFN's.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder to make.")
@click.option("--seed", default=0, show_default=True, help="Of the merger, which is drawn.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="What the weights are stored as.",
)
@terminal.debug_option
def init(text: str, vision: str, output: str, seed: int, dtype: str) -> None:
    """Build a Qwen2-VL out of a language model and a vision tower.

    \b
    qwen2vl init --text Qwen/Qwen2-1.5B --vision dfn-vit-h-378 -o start
    qwen2vl train stage1_vision model=start data=captions.jsonl
    """
    # Imported here: torch takes a second, and a misspelled option should not cost that.
    import torch

    from qwen2vl.weights.init_pretrained import transplant

    with terminal.waiting("building"):
        config = transplant(text, vision, output, seed=seed, dtype=getattr(torch, dtype))
    terminal.say(
        f"model: {output} ({config.vision.depth} blocks of width {config.vision.embed_dim} see, "
        f"{config.text.num_hidden_layers} of width {config.text.hidden_size} speak)"
    )
    terminal.say("fresh: the merger, and the rows of special tokens that the donor did not have")
    terminal.say(f"try:   qwen2vl train stage1_vision model={output} data=FILE.jsonl")
