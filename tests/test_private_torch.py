"""Missing private modules of torch break neither imports nor eager computation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in a process of its own, so that every module of the package is imported anew.
PROGRAM = """
import builtins
import logging
from collections import Counter

import torch

import_module = builtins.__import__
blocked = Counter()

def block_private_modules(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    in_c = isinstance(fromlist, list)  # torch's own imports from C have the globals of the caller
    is_private = name.startswith(("torch._", "torch.utils._"))
    if importer.startswith("qwen2vl") and is_private and not in_c:
        blocked[importer] += 1
        raise ImportError(f"No module named {name!r}")
    return import_module(name, globals, locals, fromlist, level)

builtins.__import__ = block_private_modules
logging.basicConfig(level=logging.WARNING, format="%(message)s")

import qwen2vl.cli.main
import qwen2vl.train.loop
from qwen2vl import LLM, SamplingParams

def answer(compile):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM("nano", dtype="float32", compile=compile)
    return llm.chat([{"role": "user", "content": "Hi"}], params)[0].token_ids

def broken(*args):
    raise RuntimeError("broken backend")

eager = answer(compile=False)
torch.compile = lambda function, **_: function
assert answer(compile=True) == eager
torch.compile = lambda function, **_: broken
assert answer(compile=True) == eager
print(*sorted(blocked))
"""


def test_without_private_modules_of_torch_everything_runs_eagerly() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["qwen2vl.compile.regions"]
    warnings = [line for line in result.stderr.splitlines() if line.startswith("compile:")]
    assert len(warnings) == 1
    assert "nothing here can compile (broken backend)" in warnings[0]
