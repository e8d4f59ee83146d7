"""What the model is fed: pixels and words become one ModelInput, on the CPU.

The same path serves training and answering, so the two cannot drift apart. This floor knows no
network and no weights. Start at processor.py; the struct that leaves this room is in inputs.py.
"""
