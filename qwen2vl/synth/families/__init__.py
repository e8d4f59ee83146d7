"""Families of synthetic tasks: one module each, with one function `sample(rng, mixture)`.

`qwen2vl.synth.world` lists them by name.
"""
