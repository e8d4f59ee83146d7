"""nano: a Qwen2-VL of 4 M parameters that reads lines, knows shapes, boxes and motion.

    qwen2vl train nano                    from nothing, in one go
    qwen2vl train nano minutes=40         one leg; the same command again goes on

Short and aligned first, then free, then dense: trained on long proportional lines from the start,
the loss stays on a plateau; once single lines are read, pages of them and lists of shapes teach
most for their tokens. The stages are the published three behind a warm-up of the words.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
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
        vocab_size=288,  # 256 bytes, one mark, 14 special tokens, rounded up
        mrope_section=(4, 6, 6),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    # Placeholders until the tokenizer is written, which the trainer does first.
    bos_token_id=270,
    eos_token_id=271,
    vision_start_token_id=272,
    vision_end_token_id=273,
    image_token_id=274,
    video_token_id=275,
)

WORDS = ((r"visual\..*", FROZEN), (r".*", 1.0))
SEE = ((r"visual\..*", 1.0), (r".*", FROZEN))  # stage 1: tower and merger learn to see
ALL = ((r".*", 1.0),)  # stage 2: everything
ANSWER = ((r"visual\.(?!merger).*", FROZEN), (r".*", 1.0))  # stage 3: the tower is locked

CELLS = Mixture(  # one character in each vision token
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
    num_shapes=(1, 1),  # like letters, shapes are learned alone first
    canvas=(56, 84),
    questions=2,
)
FREE = replace(  # proportional letters, anywhere
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
PAGES = replace(  # many letters, and many shapes, for each question
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
    list_share=0.7,  # a truth for every name is what teaches which shape a name means
    num_shapes=(1, 4),
    canvas=(56, 140),
    questions=3,
)
WORLD = replace(  # as the mini suite asks, and larger
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
    """Train nano from nothing on 2 CPU cores."""
    return TrainConfig(
        name="nano",
        model=MODEL,
        optim=OptimConfig(lr=2e-3),
        stages=(
            Stage(
                name="words",
                steps=200,
                examples=192,
                rules=WORDS,
                mixture=Mixture(weights={"text_only": 1.0}),
                default_system=0.1,
            ),
            Stage(
                name="see",
                steps=100,
                examples=160,
                rules=SEE,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="cells",
                steps=200,
                examples=160,
                rules=ALL,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="fonts",
                steps=400,
                examples=128,
                rules=ALL,
                mixture=FONTS,
                min_pixels=784,
                default_system=0.02,
            ),
            Stage(
                name="free",
                steps=900,
                examples=96,
                rules=ALL,
                mixture=FREE,
                default_system=0.02,
            ),
            Stage(
                name="pages",
                steps=1500,
                examples=80,
                rules=ALL,
                mixture=PAGES,
                default_system=0.02,
            ),
            Stage(
                name="world",
                steps=3000,
                examples=80,
                rules=ALL,
                mixture=WORLD,
                default_system=0.1,
                decay=0.45,
            ),
            Stage(
                name="answers",
                steps=300,
                examples=80,
                rules=ANSWER,
                mixture=WORLD,
                default_system=0.8,
                decay=1.0,
            ),
        ),
    )
