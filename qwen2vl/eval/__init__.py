"""What is measured: this library against the reference, step by step, and answers against truth.

parity.py compares two sides of one forward; reference.py is the other side, run by transformers.
metrics.py says how right an answer is, task.py walks through questions with any callable that
answers, drawn.py makes questions of drawn pictures, mini.py is the suite of this house, and
freeze.py how its specs were drawn. Nothing here prints: cli/ does.
"""
