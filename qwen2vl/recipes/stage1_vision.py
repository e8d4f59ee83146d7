r"""stage1_vision: published stage 1, vision tower pretraining, from models just put together.

    qwen2vl init --text Qwen/Qwen2-1.5B --vision DFN-FOLDER -o start
    torchrun --nproc-per-node 8 -m qwen2vl train stage1_vision model=start
    qwen2vl train stage1_vision model=start data=pairs.jsonl stages.0.steps=1000 \
        data.global_batch_size=8

The paper: 600 billion tokens (image tokens count, the loss is on text), only the vision tower is
trained, the language model is Qwen2's and the tower DFN's. Families: image-text pairs, OCR, image
classification. Not published, so choices of this project: weights of the datasets, learning rates,
lengths, and that the merger is trained with the tower, since it is new. (Qwen2-VL sec. 2.2.)
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes.stages import TRAIN_VISION, pretraining_config
from qwen2vl.train.config import TrainConfig

__all__ = ["TOKENS", "recipe"]

TOKENS = 600e9

DATA = DataConfig(
    sources=(
        # Images with captions or alt texts, as Recap-DataComp-1B.
        SourceConfig(path="data/image_text/*.parquet", name="image_text", weight=0.7),
        # Images of lines and pages with their text, as IDL (pixparse/idl-wds) or SynthDoG.
        SourceConfig(path="data/ocr/*.parquet", name="ocr", weight=0.2),
        # Images with the name of what they show, as ImageNet-21k.
        SourceConfig(path="data/classification/*.parquet", name="classification", weight=0.1),
    ),
    max_tokens=8192,
    global_batch_size=256,
)


def recipe() -> TrainConfig:
    """Train the vision tower on image-text pairs.

    Hardware: any number of GPUs that divides 256; not run by this project at this size.
    """
    return pretraining_config(
        "stage1_vision",
        stage="vision",
        num_tokens=TOKENS,
        data=DATA,
        rules=TRAIN_VISION,
        lr=1e-4,
    )
