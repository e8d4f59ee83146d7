"""What is measured: this library against the reference, step by step, and answers against truth.

parity.py compares two sides of one forward; reference.py is the other side, run by transformers.
Nothing here prints: cli/ does.
"""
