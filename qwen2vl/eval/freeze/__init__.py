"""Sampling of the frozen suites: one module each, which has written its file once.

    python -m qwen2vl.eval.freeze.honesty      writes eval/suites/frozen/honesty.jsonl

A suite is sampled by a fixed seed, before anything is trained for it. Running a module again after
it, or qwen2vl.synth, has changed gives another suite and invalidates all earlier scores; tests
check the SHA-256 of the files.
"""
