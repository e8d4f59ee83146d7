"""How well does Tesseract read the lines of the mini suite? python benchmarks/tesseract.py

The same pictures that `qwen2vl eval --task text` shows, doubled in size, since Tesseract likes
letters of some 30 pixels, and told that each is one line (--psm 7). Prints one JSON line; the
character error rate is computed as for a model. Needs the program: apt-get install tesseract-ocr.
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

from qwen2vl.eval.mini import build
from qwen2vl.eval.task import Messages, run_task

PROGRAM = "tesseract"
ENLARGE = 2
# Tesseract's own threads cost more than they give on pictures of one line.
ENVIRONMENT = {**os.environ, "OMP_THREAD_LIMIT": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="text", help="a part of the suite that is read")
    parser.add_argument("--limit", type=int, help="read only so many lines")
    given = parser.parse_args()
    version = find_version()
    task = build(given.task)
    task.check_fonts()
    start = time.perf_counter()
    results = run_task(task, read, limit=given.limit)
    line = {
        "program": version,
        "task": task.name,
        "count": results.count,
        "character_errors": results.error_rate,
        "interval": results.error_interval,
        "exact": results.mean,
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(line))


def find_version() -> str:
    """Return "tesseract 5.3.0", or end with what to install."""
    try:
        done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{PROGRAM} cannot be run ({error}); apt-get install tesseract-ocr")
    return done.stdout.splitlines()[0]


def read(messages: Messages) -> str:
    """Read the one picture of a prompt."""
    (picture,) = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    done = subprocess.run(
        [PROGRAM, "stdin", "stdout", "--psm", "7"],
        input=as_png(picture),
        capture_output=True,
        check=True,
        env=ENVIRONMENT,
    )
    return " ".join(done.stdout.decode("utf-8").split())


def as_png(pixels_HWC: Any) -> bytes:
    """Enlarge a picture and write it as a file that Tesseract opens."""
    picture = Image.fromarray(pixels_HWC)
    size = (ENLARGE * picture.width, ENLARGE * picture.height)
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
