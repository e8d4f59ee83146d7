"""nano: a Qwen2-VL of 4 M parameters for OCR of lines, shapes, boxes and motion, from scratch.

    qwen2vl train nano                        from scratch, in one invocation
    qwen2vl train nano max_minutes=40         one invocation of a resumable run; repeat to continue

A curriculum of synthetic data: first short aligned text, then free, then dense. Trained on long
proportional lines from the start, the loss stays on a plateau; once single lines are read, pages
of lines and lists of shapes give the most supervision per token. The stages are the published three
after a warmup of the decoder on text.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.recipes.stages import TRAIN_ALL, TRAIN_DECODER_AND_MERGER, TRAIN_VISION
from qwen2vl.synth import Mixture
from qwen2vl.train.config import FROZEN, OptimConfig, Stage, TrainConfig

__all__ = ["MODEL", "recipe"]

MODEL = Qwen2VLConfig(
    vision=VisionConfig(depth=4, embed_dim=192, num_heads=6, hidden_size=192),
    text=TextConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=288,  # 256 bytes, one separator, 14 special tokens, rounded up
        mrope_section=(4, 6, 6),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    # Placeholders: the trainer writes the tokenizer first, and then sets these.
    bos_token_id=270,
    eos_token_id=271,
    vision_start_token_id=272,
    vision_end_token_id=273,
    image_token_id=274,
    video_token_id=275,
)

TRAIN_DECODER = ((r"visual\..*", FROZEN), (r".*", 1.0))  # the warmup on text

CELLS = Mixture(  # one character per vision token
    weights={"text": 1.0},
    layout="cells",
    fonts="mono2",
    text_length=(3, 8),
    random_share=1.0,
    plain_share=1.0,
    page_share=0.5,
    page_lines=(2, 3),
)
FONTS = replace(
    CELLS,
    weights={"text": 0.55, "shapes": 0.35, "text_only": 0.1},
    fonts="all",
    text_length=(2, 8),
    random_share=0.7,
    plain_share=0.5,
    num_shapes=(1, 1),  # single shapes first, as single letters
    canvas=(56, 84),
    max_questions=2,
)
FREE = replace(  # proportional fonts, at any position
    FONTS,
    weights={"text": 0.5, "shapes": 0.22, "grounding": 0.2, "motion": 0.06, "text_only": 0.02},
    layout="line",
    text_length=(1, 8),
    font_size=(16, 40),
    max_width=280,
    num_shapes=(1, 2),
    canvas=(56, 98),
    clip_canvas=(56, 84),
)
PAGES = replace(  # many characters and many shapes per question
    FREE,
    weights={
        "text": 0.42,
        "shapes": 0.25,
        "grounding": 0.2,
        "motion": 0.04,
        "two_pictures": 0.06,
        "text_only": 0.03,
    },
    text_length=(2, 14),
    font_size=(12, 40),
    max_width=392,
    plain_share=0.4,
    page_share=0.7,
    page_lines=(2, 4),
    list_share=0.7,  # lists give a label for every shape name, from which the names are learned
    num_shapes=(1, 4),
    canvas=(56, 140),
    max_questions=3,
)
WORLD = replace(  # the distribution of the mini suite, and larger images
    PAGES,
    weights={
        "text": 0.33,
        "shapes": 0.29,
        "grounding": 0.2,
        "motion": 0.03,
        "two_pictures": 0.13,
        "text_only": 0.02,
    },
    text_length=(1, 16),
    max_width=448,
    plain_share=0.3,
    page_share=0.4,
    list_share=0.5,
    num_shapes=(1, 5),
    canvas=(56, 210),
    clip_canvas=(56, 112),
    large_share=0.08,
    sparse_share=0.22,
)


def recipe() -> TrainConfig:
    """Train nano from scratch on 2 CPU cores."""
    return TrainConfig(
        name="nano",
        model=MODEL,
        optim=OptimConfig(lr=2e-3),
        stages=(
            Stage(
                name="words",
                steps=200,
                global_batch_size=192,
                rules=TRAIN_DECODER,
                mixture=Mixture(weights={"text_only": 1.0}),
                default_system=0.1,
            ),
            Stage(
                name="see",
                steps=100,
                global_batch_size=160,
                rules=TRAIN_VISION,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="cells",
                steps=200,
                global_batch_size=160,
                rules=TRAIN_ALL,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="fonts",
                steps=400,
                global_batch_size=128,
                rules=TRAIN_ALL,
                mixture=FONTS,
                min_pixels=784,
                default_system=0.02,
            ),
            Stage(
                name="free",
                steps=900,
                global_batch_size=96,
                rules=TRAIN_ALL,
                mixture=FREE,
                default_system=0.02,
            ),
            Stage(
                name="pages",
                steps=1500,
                global_batch_size=80,
                rules=TRAIN_ALL,
                mixture=PAGES,
                default_system=0.02,
            ),
            Stage(
                name="world",
                steps=3000,
                global_batch_size=80,
                rules=TRAIN_ALL,
                mixture=WORLD,
                default_system=0.1,
                decay_ratio=0.45,
            ),
            Stage(
                name="answers",
                steps=300,
                global_batch_size=80,
                rules=TRAIN_DECODER_AND_MERGER,
                mixture=WORLD,
                default_system=0.8,
                decay_ratio=1.0,
            ),
        ),
    )
