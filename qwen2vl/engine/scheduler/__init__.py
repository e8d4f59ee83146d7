"""Continuous batching: which tokens of which requests and which images the next step computes.

`scheduler.py` decides, `output.py` holds the decision (vLLM's SchedulerOutput). No tensors.
"""
