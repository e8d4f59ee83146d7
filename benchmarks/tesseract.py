"""OCR baseline: Tesseract on the text lines of the mini suite. python benchmarks/tesseract.py

Uses the images of `qwen2vl eval --task text`, doubled in size, because Tesseract is most accurate
for letters of about 30 pixels, in single-line mode (--psm 7). Prints one JSON line; the character
error rate is computed as for a model. Needs the program: apt-get install tesseract-ocr.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from typing import Any

from PIL import Image

from qwen2vl.eval.mini import build_task
from qwen2vl.eval.task import Messages, run_task

PROGRAM = "tesseract"
UPSCALE = 2
# On images of one line Tesseract is slower with its own threads.
ENVIRONMENT = {**os.environ, "OMP_THREAD_LIMIT": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="text", help="part of the suite with text recognition")
    parser.add_argument("--limit", type=int, help="run only the first LIMIT lines")
    args = parser.parse_args()
    version = find_version()
    task = build_task(args.task)
    task.check_fonts()
    start = time.perf_counter()
    results = run_task(task, recognize, limit=args.limit)
    line = {
        "program": version,
        "task": task.name,
        "count": results.num_examples,
        "character_errors": results.character_error_rate,
        "interval": results.character_error_interval,
        "exact": results.accuracy,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(line))


def find_version() -> str:
    """Return "tesseract 5.3.0", or exit with the package to install."""
    try:
        done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{PROGRAM} cannot be run ({error}); apt-get install tesseract-ocr")
    return done.stdout.splitlines()[0]


def recognize(messages: Messages) -> str:
    """Recognize the text in the only image of a prompt."""
    (pixels_HWC,) = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    done = subprocess.run(
        [PROGRAM, "stdin", "stdout", "--psm", "7"],
        input=as_png(pixels_HWC),
        capture_output=True,
        check=True,
        env=ENVIRONMENT,
    )
    return " ".join(done.stdout.decode("utf-8").split())


def as_png(pixels_HWC: Any) -> bytes:
    """Upscale an image and encode it as PNG."""
    image = Image.fromarray(pixels_HWC)
    size = (UPSCALE * image.width, UPSCALE * image.height)
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
