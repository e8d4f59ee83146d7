"""Packing formats of quantized weights: GPTQ, AWQ and compressed-tensors.

quantization_config.py parses what config.json says, with packed_format.py and config_groups.py;
packed_layers.py finds the packed layers of a folder and checks their tensors; gptq_format.py,
awq_format.py and compressed_tensors.py unpack them. compressed_tensors.py also packs: it is the
format that this library writes, and the one whose tensors the CPU kernels read as they are.
"""
