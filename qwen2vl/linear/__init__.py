"""CPU layers that stand in for `torch.nn.Linear`: kernels, prepacked, fused.

`prepacked.py` and `kernel_linear.py` replace layers of a loaded model in place, where `loading.py`
asks for it. `fused.py` joins q, k, v and gate, up into one layer, prepacked or quantized.
`custom_ops.py` keeps their matrix products whole under torch.compile. `cpu/` has the kernels.
"""
