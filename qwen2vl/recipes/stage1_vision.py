"""stage1_vision: learn to see. Published stage 1, from a model just put together.

    qwen2vl init --text Qwen/Qwen2-1.5B --vision DFN-FOLDER -o start
    torchrun --nproc-per-node 8 -m qwen2vl train stage1_vision model=start
    qwen2vl train stage1_vision model=start data=pairs.jsonl stages.0.steps=1000 data.bins=8

The paper: 600 billion tokens (pictures count, the loss is on text), the vision tower alone moves,
the language model is Qwen2's and the tower DFN's. Families: image-text pairs, recognition of text,
classification. Not published, so ours: shares, rates, lengths, and that the merger moves with the
tower, since it is new. (Qwen2-VL sec. 2.2.) Next: stage2_joint.py.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.recipes import best_device
from qwen2vl.train.config import (
    FROZEN,
    OptimConfig,
    ProbeConfig,
    Stage,
    TrainConfig,
)

__all__ = ["RULES", "TOKENS", "recipe"]

TOKENS = 600e9

RULES = ((r"visual\..*", 1.0), (r".*", FROZEN))

DATA = DataConfig(
    sources=(
        # Pictures with captions or alternative texts, as Recap-DataComp-1B.
        Source(path="data/image_text/*.parquet", name="image_text", weight=0.7),
        # Lines and pages with their text, as IDL (pixparse/idl-wds) or SynthDoG.
        Source(path="data/ocr/*.parquet", name="ocr", weight=0.2),
        # Pictures with the name of what they show, as ImageNet-21k.
        Source(path="data/classification/*.parquet", name="classification", weight=0.1),
    ),
    max_tokens=8192,
    bins=256,
)


def recipe() -> TrainConfig:
    """Train the vision tower on what words can say about pictures.

    Hardware: any number of GPUs that divides 256; not run by us at this size.
    """
    return TrainConfig(
        name="stage1_vision",
        device=best_device(),
        optim=OptimConfig(method="adamw", lr=1e-4, warmup=2000, beta2=0.95, weight_decay=0.05),
        stages=(
            Stage(
                name="vision",
                steps=int(TOKENS / (DATA.bins * DATA.max_tokens)),
                data=DATA,
                rules=RULES,
                weighting="token",
            ),
        ),
        probe=ProbeConfig(every=0),
        workers=8,
        save_every=1000,
    )
