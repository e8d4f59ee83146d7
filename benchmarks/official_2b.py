"""Build a folder of the official 2B shape with random weights: 4.4 GB in bfloat16, seeded.

    python benchmarks/official_2b.py [--folder build/official_2b] [--tokenizer DIR]

All files have the official content except the values of the tensors. parity_2b.py uses it, and
`qwen2vl parity --model build/official_2b` compares it step by step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.config import PRESETS
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import GenerationDefaults, expected_shapes, save_folder

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "official_2b"
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"

CONFIG = PRESETS["2B"]
INITIALIZER_RANGE = 0.02  # config.json's own

# preprocessor_config.json and generation_config.json of Qwen2-VL-2B-Instruct.
PIXELS = PixelLimits(min_pixels=3136, max_pixels=12845056)
GENERATION = GenerationDefaults(
    do_sample=True,
    temperature=0.01,
    top_p=0.001,
    top_k=1,
    repetition_penalty=1.0,
    eos_token_ids=(151645, 151643),
)


def random_weights(seed: int) -> dict[str, Tensor]:
    """Draw every tensor in bfloat16; norms begin at one, as in training."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in expected_shapes(CONFIG).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        tensor.normal_(0.0, INITIALIZER_RANGE, generator=generator)
        if name.endswith("weight") and tensor.ndim == 1:
            tensor += 1.0
        weights[name] = tensor
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    save_folder(
        args.folder,
        config=CONFIG,
        state_dict=random_weights(args.seed),
        tokenizer_folder=args.tokenizer,
        pixels=PIXELS,
        generation=GENERATION,
        dtype=torch.bfloat16,
    )
    note = "" if (args.tokenizer / "tokenizer.json").is_file() else ", without a tokenizer"
    print(f"wrote {args.folder}{note}")


if __name__ == "__main__":
    main()
