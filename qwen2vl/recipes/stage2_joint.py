"""stage2_joint: published stage 2, joint pretraining of all weights, from stage 1's export.

    torchrun --nproc-per-node 8 -m qwen2vl train stage2_joint model=runs/stage1_vision/model-...

The paper: 800 billion tokens more, 1.4 trillion with stage 1; all weights are trained. Families:
more interleaved images and text, visual question answering, multitask sets, video dialogue, image
knowledge, and pure text, which preserves the language model's abilities. Not published, so choices
of this project: weights of the datasets, learning rates, lengths. (Qwen2-VL sec. 2.2.)
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes.stages import pretraining_config
from qwen2vl.train.config import TrainConfig

__all__ = ["RULES", "TOKENS", "recipe"]

TOKENS = 800e9

RULES = ((r"visual\..*", 1.0), (r".*", 0.5))

DATA = DataConfig(
    sources=(
        # Interleaved image-text articles, as OBELICS.
        SourceConfig(path="data/interleaved/*.parquet", name="interleaved", weight=0.3),
        SourceConfig(path="data/image_text/*.parquet", name="image_text", weight=0.2),
        SourceConfig(path="data/ocr/*.parquet", name="ocr", weight=0.1),
        # Visual question answering, as VQAv2 and the other sets of The Cauldron.
        SourceConfig(path="data/vqa/*.parquet", name="vqa", weight=0.1),
        # Multitask sets, as M3IT.
        SourceConfig(path="data/multitask/*.parquet", name="multitask", weight=0.05),
        # Dialogue about videos, as VideoChat2-IT.
        SourceConfig(path="data/video/*.jsonl", name="video_dialogue", weight=0.1),
        # Encyclopedic texts about images, as WIT.
        SourceConfig(path="data/knowledge/*.parquet", name="image_knowledge", weight=0.05),
        # Text only, packed by `qwen2vl pack-text`, as FineWeb.
        SourceConfig(path="data/text", name="text", weight=0.1),
    ),
    max_tokens=16384,  # the paper's limit of one video
    global_batch_size=128,
)


def recipe() -> TrainConfig:
    """Train all weights on all families.

    Hardware: any number of GPUs that divides 128; not run by this project at this size.
    """
    return pretraining_config(
        "stage2_joint",
        stage="joint",
        num_tokens=TOKENS,
        data=DATA,
        rules=RULES,
        lr=2e-5,
    )
