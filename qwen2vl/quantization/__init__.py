"""Weight quantization: schemes, round-to-nearest, GPTQ, and the int8, int4, NF4 and torchao layers.

`scheme.py` maps a mode to one LayerScheme for each layer and replaces the layers of a model;
`prequantized.py` builds the same layers from the integers of a GPTQ or AWQ folder.
"""
