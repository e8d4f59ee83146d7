"""Sampling: parameters, logits processors, batched sampling on a GPU, and structured output.

`sampler.py` is the reference implementation, one request at a time; `batched.py` samples many at
once. `grammar.py` and `grammar_matcher.py` implement structured output.
"""
