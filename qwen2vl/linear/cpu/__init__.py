"""CPU kernels of this package: matrix products with bf16, int8 and int4 weights.

`kernels/` is their C++ source, `build.py` compiles it with the system's compiler at first use,
`library.py` loads it and chooses the instruction set, `operators.py` has the products as functions
of tensors. Weights stay in row-major order, as files store them.
"""
