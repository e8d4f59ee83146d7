"""stage3_instruct: answer. Published stage 3, from what stage 2 exported.

    torchrun --nproc-per-node 8 -m qwen2vl train stage3_instruct model=runs/stage2_joint/model-...

The paper: instruction tuning in ChatML with the vision tower locked; how many tokens, it does not
say. Families: dialogue in text alone, questions about pictures, parsing of documents, comparison of
several pictures, understanding of videos, talk about a stream of video, agents at work. Not
published, so ours: shares, rates, steps, and that the merger moves with the language model, as in
Qwen's own later fine-tuning script. (Qwen2-VL sec. 2.2, 2.2.1.) Next: full_finetune.py, lora.py.
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

__all__ = ["RULES", "recipe"]

RULES = ((r"visual\.(?!merger).*", FROZEN), (r".*", 1.0))

DATA = DataConfig(
    sources=(
        # As Tulu 3's mixture.
        Source(path="data/chat/*.parquet", name="text_dialogue", weight=0.25),
        # As LLaVA-OneVision's instructions.
        Source(path="data/image_qa/*.parquet", name="image_qa", weight=0.3),
        # Pages to be read and laid out, as Docmatix.
        Source(path="data/documents/*.parquet", name="documents", weight=0.15),
        # As M4-Instruct.
        Source(path="data/multi_image/*.jsonl", name="multi_image", weight=0.1),
        # As LLaVA-Video-178K.
        Source(path="data/video_qa/*.jsonl", name="video", weight=0.1),
        # Questions in the middle of a video, as VideoChatOnline-IT.
        Source(path="data/streaming/*.jsonl", name="streaming_video", weight=0.05),
        # Screens and what to do next, as AITZ and GUIAct.
        Source(path="data/agent/*.jsonl", name="agent", weight=0.05),
    ),
    max_tokens=16384,
    bins=32,
)


def recipe() -> TrainConfig:
    """Train the language model and the merger to answer.

    Hardware: any number of GPUs that divides 32; not run by us at this size.
    """
    return TrainConfig(
        name="stage3_instruct",
        device=best_device(),
        optim=OptimConfig(
            method="adamw", lr=1e-5, warmup=300, beta2=0.95, weight_decay=0.05, fall="cosine"
        ),
        stages=(
            Stage(
                name="instruct",
                steps=10_000,
                data=DATA,
                rules=RULES,
                decay=1.0,
                weighting="sample",
            ),
        ),
        probe=ProbeConfig(every=0),
        workers=8,
    )
