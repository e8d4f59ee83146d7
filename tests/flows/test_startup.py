"""What a first answer imports: the time from the command to its first word is mostly imports."""

from __future__ import annotations

import json
import subprocess
import sys

# Each takes more than 0.2 s to import, and an answer of an unquantized model needs none of them.
HEAVY_MODULES = ("torch._dynamo", "torch._inductor", "sympy", "transformers", "matplotlib", "av")


def test_answering_imports_no_compiler_and_no_video_decoder() -> None:
    code = f"""
import json, sys
from PIL import Image
from qwen2vl import LLM
content = [{{"image": Image.new("RGB", (56, 56), "red")}}, {{"text": "What color is it?"}}]
LLM().chat([{{"role": "user", "content": content}}])
print(json.dumps([name for name in {HEAVY_MODULES!r} if name in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == []
