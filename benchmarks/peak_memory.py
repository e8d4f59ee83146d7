"""Peak memory of quantizing a folder and of a first answer, each in a process of its own.

    python benchmarks/peak_memory.py quantize SRC DST int4 64     one step; prints JSON
    python benchmarks/peak_memory.py answer DST

`measure` runs both steps for int8 and int4; `quantized.py --only memory` prints its figures. The
peak is VmHWM of /proc/self/status: all resident pages, those of mapped files as well, which
processes share; RssAnon, at the end, is what a process has for itself. An answer has one picture of
448 x 448 pixels and 32 tokens, with max_model_len 4096.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["measure"]

MAX_MODEL_LEN = 4096
PICTURE_SIDE = 448
MAX_TOKENS = 32


def measure(source: Path, num_examples: int) -> dict[str, Any]:
    """Quantize `source` to int8 and int4 and let both answer; sizes in GB, times in seconds."""
    results: dict[str, Any] = {"examples": num_examples}
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        for mode in ("int8", "int4"):
            target = Path(folder) / mode
            quantized = _run("quantize", source, target, mode, num_examples)
            answered = _run("answer", target)
            size = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e9
            results[mode] = {
                "file_gb": round(size, 2),
                "quantize_peak_gb": quantized["peak_gb"],
                "quantize_s": quantized["seconds"],
                "answer_peak_gb": answered["peak_gb"],
                "answer_over_file": round(answered["peak_gb"] / size, 2),
                "answer_anonymous_gb": answered["anonymous_gb"],
                "load_s": answered["load_s"],
            }
    return results


def _run(*args: object) -> dict[str, Any]:
    command = [sys.executable, __file__, *map(str, args)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def _quantize(source: str, target: str, mode: Any, num_examples: int) -> dict[str, Any]:
    from qwen2vl.convert import quantize_folder
    from qwen2vl.loading import load_processor
    from qwen2vl.synth import Mixture, render, sample

    start = time.perf_counter()
    processor = load_processor(source)
    mixture = Mixture(max_questions=3, fonts="bundled")
    conversations = (render(sample(0, i, mixture)).messages for i in range(num_examples))
    examples = [processor(c, add_generation_prompt=False) for c in conversations]
    quantize_folder(source, target, mode, examples=examples if mode == "int4" else ())
    return {"seconds": round(time.perf_counter() - start, 1)}


def _answer(folder: str) -> dict[str, Any]:
    from PIL import Image

    from qwen2vl import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(folder, max_model_len=MAX_MODEL_LEN)
    load_seconds = time.perf_counter() - start
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), "red")
    content = [{"image": picture}, {"text": "What is this?"}]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True)
    llm.chat([{"role": "user", "content": content}], params)
    # While the model is in memory.
    return {"load_s": round(load_seconds, 1), "anonymous_gb": _status_gb("RssAnon")}


def _status_gb(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return round(int(line.split()[1]) * 1024 / 1e9, 2)


def main() -> None:
    step, *args = sys.argv[1:]
    if step == "quantize":
        figures = _quantize(args[0], args[1], args[2], int(args[3]))
    else:
        figures = _answer(args[0])
    print(json.dumps(figures | {"peak_gb": _status_gb("VmHWM")}))


if __name__ == "__main__":
    main()
