"""Continuous batching: which tokens and which image and video frames the next step computes.

`scheduler.py` makes the decision, `output.py` defines its result. No tensors are involved.
"""
