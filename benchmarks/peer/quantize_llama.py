"""Quantize a GGUF file: python quantize_llama.py SOURCE TARGET Q8_0 | Q4_K_M."""

from __future__ import annotations

import sys

import llama_cpp

source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
    sys.exit(f"{source}: llama.cpp could not write {kind}")
