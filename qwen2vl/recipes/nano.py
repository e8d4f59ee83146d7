"""nano: a Qwen2-VL of 9 M parameters, trained from scratch on synthetic data on two CPU cores.

    qwen2vl fetch-data named-pictures names   icons, and words in many languages
    qwen2vl train nano                        from scratch, in one invocation
    qwen2vl train nano max_minutes=150        one invocation of a resumable run; repeat to continue
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m qwen2vl train nano num_threads=1
                                              the same on two cores, faster (docs/training.md)

A curriculum of synthetic data: short aligned text, single shapes and icons, then free text and all
task families, from small pictures to large ones. Trained on long proportional lines from the start,
the loss stays on a plateau; pages, lists and grids, and several questions about one picture, give
the most supervision per token. The stages are the published three, after a warm-up on text.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.recipes.stages import TRAIN_ALL, TRAIN_DECODER_AND_MERGER, TRAIN_VISION
from qwen2vl.synth import Mixture
from qwen2vl.train.config import FROZEN, OptimConfig, Stage, TrainConfig

__all__ = ["MODEL", "recipe"]

NUM_MERGES = 600  # of the BPE: a question has 10 tokens in place of 36 bytes

MODEL = Qwen2VLConfig(
    vision=VisionConfig(depth=5, embed_dim=256, num_heads=4, hidden_size=256),
    text=TextConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1312,  # bytes, letters of Europe, merges, special tokens, rounded up
        mrope_section=(8, 12, 12),
        max_position_embeddings=8192,  # a picture of 2,000 x 2,000 pixels has 5,041 tokens
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

TRAIN_DECODER = ((r"visual\..*", FROZEN), (r".*", 1.0))  # the warm-up on text

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
    weights={"text": 0.45, "shapes": 0.2, "objects": 0.1, "named": 0.2, "text_only": 0.05},
    fonts="all",
    text_length=(2, 8),
    random_share=0.7,
    plain_share=0.5,
    num_shapes=(1, 1),  # single shapes first, as single letters
    canvas=(56, 84),
    picture_side=(56, 112),
    max_aspect=2.0,
    max_questions=3,
)
FREE = replace(  # proportional fonts, at any position
    FONTS,
    weights={
        **{"text": 0.35, "lines": 0.08, "shapes": 0.1, "grounding": 0.12, "objects": 0.14},
        **{"named": 0.16, "motion": 0.04, "text_only": 0.01},
    },
    layout="line",
    text_length=(1, 8),
    font_size=(16, 40),
    max_width=280,
    num_shapes=(1, 2),
    canvas=(56, 98),
    clip_canvas=(56, 84),
    picture_side=(56, 140),
)
NAMES = replace(  # few names at first: of all at once none is learned for hours
    FREE,
    weights={"named": 0.6, "objects": 0.1, "text": 0.15, "shapes": 0.15},
    num_names=60,
    picture_side=(40, 84),
)
MORE_NAMES = replace(NAMES, num_names=250, picture_side=(48, 112))
PAGES = replace(  # many characters, shapes and icons per question
    FREE,
    weights={
        **{"text": 0.25, "lines": 0.12, "shapes": 0.07, "grounding": 0.08, "objects": 0.18},
        **{"named": 0.14, "documents": 0.05, "refusals": 0.03, "clips": 0.02},
        **{"motion": 0.02, "two_pictures": 0.03, "text_only": 0.01},
    },
    text_length=(2, 14),
    font_size=(12, 40),
    max_width=392,
    plain_share=0.4,
    page_share=0.6,
    page_lines=(2, 4),
    list_share=0.5,  # lists give a label for every name, from which the names are learned
    num_shapes=(1, 4),
    canvas=(56, 140),
    picture_side=(56, 196),
    max_aspect=3.0,
    max_questions=4,
    scripts={"latin": 0.4, "latin_accents": 0.25, "digits": 0.1, "greek": 0.1, "cyrillic": 0.15},
)
WORLD = replace(  # all families; pictures of up to 144 tokens
    PAGES,
    weights={
        **{"text": 0.17, "lines": 0.15, "shapes": 0.05, "grounding": 0.06, "objects": 0.23},
        **{"named": 0.1, "documents": 0.06, "refusals": 0.07, "clips": 0.03},
        **{"motion": 0.02, "two_pictures": 0.05, "text_only": 0.01},
    },
    text_length=(1, 20),
    random_share=0.5,
    font_size=(10, 48),
    max_width=560,
    padding=(1, 20),
    page_lines=(2, 5),
    plain_share=0.3,
    page_share=0.4,
    list_share=0.25,
    num_shapes=(1, 5),
    canvas=(56, 210),
    clip_canvas=(56, 140),
    picture_side=(56, 336),
    max_aspect=6.0,
    large_share=0.06,
    sparse_share=0.2,
    max_questions=5,
)
SIZES = replace(WORLD, picture_side=(56, 1000), max_aspect=20.0, clip_canvas=(56, 224))


def recipe() -> TrainConfig:
    """Train nano from scratch on 2 CPU cores."""
    return TrainConfig(
        name="nano",
        model=MODEL,
        num_merges=NUM_MERGES,
        optim=OptimConfig(lr=2e-3),
        compile=True,
        stages=(
            Stage(
                name="words",
                steps=60,
                global_batch_size=192,
                rules=TRAIN_DECODER,
                mixture=Mixture(weights={"text_only": 1.0}),
                default_system=0.1,
            ),
            Stage(
                name="see",
                steps=60,
                global_batch_size=128,
                rules=TRAIN_VISION,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="cells",
                steps=160,
                global_batch_size=128,
                rules=TRAIN_ALL,
                mixture=CELLS,
                min_pixels=784,
                default_system=0.0,
            ),
            Stage(
                name="fonts",
                steps=500,
                global_batch_size=128,
                rules=TRAIN_ALL,
                mixture=FONTS,
                min_pixels=784,
                default_system=0.05,
            ),
            Stage(
                name="free",
                steps=1000,
                global_batch_size=112,
                rules=TRAIN_ALL,
                mixture=FREE,
                default_system=0.05,
            ),
            Stage(
                name="names",
                steps=300,
                global_batch_size=128,
                rules=TRAIN_ALL,
                mixture=NAMES,
                default_system=0.05,
            ),
            Stage(
                name="more_names",
                steps=400,
                global_batch_size=128,
                rules=TRAIN_ALL,
                mixture=MORE_NAMES,
                default_system=0.05,
            ),
            Stage(
                name="pages",
                steps=1600,
                global_batch_size=96,
                rules=TRAIN_ALL,
                mixture=PAGES,
                default_system=0.1,
            ),
            Stage(
                name="world",
                steps=1800,
                global_batch_size=80,
                rules=TRAIN_ALL,
                mixture=WORLD,
                default_system=0.3,
            ),
            Stage(
                name="sizes",
                steps=800,
                global_batch_size=64,
                rules=TRAIN_ALL,
                mixture=SIZES,
                default_system=0.4,
                decay_ratio=0.6,
            ),
            Stage(
                name="answers",
                steps=250,
                global_batch_size=64,
                rules=TRAIN_DECODER_AND_MERGER,
                mixture=SIZES,
                default_system=0.8,
                decay_ratio=1.0,
            ),
        ),
    )
