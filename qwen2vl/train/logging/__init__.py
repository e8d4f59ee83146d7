"""Training metrics: accumulated on the device, reduced over ranks, logged as JSON lines.

`metrics.py` writes the records; `loggers.py` passes them to TensorBoard or Weights & Biases.
"""
