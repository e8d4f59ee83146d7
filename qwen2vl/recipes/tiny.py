"""tiny: a run of seconds through all stages, as a smoke test of the trainer.

    qwen2vl train tiny

One CPU core, half a minute; the loss falls from about 6 to about 3, and the model is useless.
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.config import TextConfig, VisionConfig
from qwen2vl.recipes import nano
from qwen2vl.recipes.stages import TRAIN_ALL, TRAIN_DECODER_AND_MERGER, TRAIN_VISION
from qwen2vl.synth import Mixture
from qwen2vl.train.config import OptimConfig, Stage, TrainConfig

__all__ = ["recipe"]


def recipe() -> TrainConfig:
    """Train a tiny model for a few steps of every stage."""
    model = replace(
        nano.MODEL,
        vision=VisionConfig(depth=2, embed_dim=64, num_heads=2, hidden_size=64),
        text=TextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=288,
            mrope_section=(4, 6, 6),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        ),
    )
    shapes = Mixture(weights={"shapes": 1.0}, canvas=(56, 84), num_shapes=(1, 2))
    rules_of_stage = {
        "words": nano.TRAIN_DECODER,
        "see": TRAIN_VISION,
        "world": TRAIN_ALL,
        "answers": TRAIN_DECODER_AND_MERGER,
    }
    return TrainConfig(
        name="tiny",
        model=model,
        min_pixels=56 * 56,
        optim=OptimConfig(warmup_steps=4),
        logging_steps=5,
        save_steps=10,
        stages=tuple(
            Stage(
                name=name,
                steps=10,
                global_batch_size=16,
                mixture=shapes,
                rules=rules,
                decay_ratio=0.5,
            )
            for name, rules in rules_of_stage.items()
        ),
    )
