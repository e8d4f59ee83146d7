"""stage2_joint: see and speak together. Published stage 2, from what stage 1 exported.

    torchrun --nproc-per-node 8 -m qwen2vl train stage2_joint model=runs/stage1_vision/model-...

The paper: 800 billion tokens more, 1.4 trillion with stage 1; everything moves. Families: more
interleaved pictures and text, question answering, sets of many tasks, talk about videos, knowledge
about pictures, and text alone, which keeps the language model able. Not published, so ours: shares,
rates, lengths. (Qwen2-VL sec. 2.2.) Next: stage3_instruct.py.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.recipes import best_device
from qwen2vl.train.config import (
    OptimConfig,
    ProbeConfig,
    Stage,
    TrainConfig,
)

__all__ = ["RULES", "TOKENS", "recipe"]

TOKENS = 800e9

RULES = ((r"visual\..*", 1.0), (r".*", 0.5))

DATA = DataConfig(
    sources=(
        # Articles with their pictures in place, as OBELICS.
        Source(path="data/interleaved/*.parquet", name="interleaved", weight=0.3),
        Source(path="data/image_text/*.parquet", name="image_text", weight=0.2),
        Source(path="data/ocr/*.parquet", name="ocr", weight=0.1),
        # Questions about pictures, as VQAv2 and the other sets of The Cauldron.
        Source(path="data/vqa/*.parquet", name="vqa", weight=0.1),
        # Many tasks in one set, as M3IT.
        Source(path="data/multitask/*.parquet", name="multitask", weight=0.05),
        # Talk about clips, as VideoChat2-IT.
        Source(path="data/video/*.jsonl", name="video_dialogue", weight=0.1),
        # What a lexicon says of its pictures, as WIT.
        Source(path="data/knowledge/*.parquet", name="image_knowledge", weight=0.05),
        # Text alone, packed by `qwen2vl pack-text`, as FineWeb.
        Source(path="data/text", name="text", weight=0.1),
    ),
    max_tokens=16384,  # the paper's limit of one video
    bins=128,
)


def recipe() -> TrainConfig:
    """Train everything on everything.

    Hardware: any number of GPUs that divides 128; not run by us at this size.
    """
    return TrainConfig(
        name="stage2_joint",
        device=best_device(),
        optim=OptimConfig(method="adamw", lr=2e-5, warmup=2000, beta2=0.95, weight_decay=0.05),
        stages=(
            Stage(
                name="joint",
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
