"""Families of synthetic tasks: one module each, with one function `sample(rng, mixture)`.

`qwen2vl.synth.world.FAMILIES` maps their names to these functions.
"""
