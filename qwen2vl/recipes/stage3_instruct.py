"""stage3_instruct: published stage 3, instruction tuning, from stage 2's export.

    torchrun --nproc-per-node 8 -m qwen2vl train stage3_instruct model=runs/stage2_joint/model-...

The paper: instruction tuning in ChatML with the vision tower frozen; the number of tokens is not
given. Families: text dialogue, image question answering, document parsing, multi-image comparison,
video understanding, video stream dialogue, agents. Not published, so choices of this project:
weights of the datasets, learning rates, steps, and that the merger is trained with the language
model, as in Qwen's own later fine-tuning script. (Qwen2-VL sec. 2.2, 2.2.1.)
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes.stages import TRAIN_DECODER_AND_MERGER, fine_tuning_config
from qwen2vl.train.config import TrainConfig

__all__ = ["recipe"]

DATA = DataConfig(
    sources=(
        # As Tulu 3's mixture.
        SourceConfig(path="data/chat/*.parquet", name="text_dialogue", weight=0.25),
        # As LLaVA-OneVision's instructions.
        SourceConfig(path="data/image_qa/*.parquet", name="image_qa", weight=0.3),
        # Document pages with their text and layout, as Docmatix.
        SourceConfig(path="data/documents/*.parquet", name="documents", weight=0.15),
        # As M4-Instruct.
        SourceConfig(path="data/multi_image/*.jsonl", name="multi_image", weight=0.1),
        # As LLaVA-Video-178K.
        SourceConfig(path="data/video_qa/*.jsonl", name="video", weight=0.1),
        # Questions in the middle of a video, as VideoChatOnline-IT.
        SourceConfig(path="data/streaming/*.jsonl", name="streaming_video", weight=0.05),
        # Screenshots and the next action, as AITZ and GUIAct.
        SourceConfig(path="data/agent/*.jsonl", name="agent", weight=0.05),
    ),
    max_tokens=16384,
    global_batch_size=32,
)


def recipe() -> TrainConfig:
    """Train the language model and the merger on instructions.

    Hardware: any number of GPUs that divides 32; not run by this project at this size.
    """
    return fine_tuning_config(
        "stage3_instruct",
        stage="instruct",
        steps=10_000,
        data=DATA,
        rules=TRAIN_DECODER_AND_MERGER,
        lr=1e-5,
        warmup_steps=300,
        weight_decay=0.05,
        num_workers=8,
    )
