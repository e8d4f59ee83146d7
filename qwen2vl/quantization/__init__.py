"""Weight quantization: schemes, round-to-nearest, GPTQ, and the int8, int4, NF4 and torchao layers.

`scheme.py` maps a mode's name to one layer configuration per layer and replaces the layers of a model;
`prequantized.py` does the same from the integers of a GPTQ or AWQ folder.
"""
