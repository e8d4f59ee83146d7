"""Evaluation: benchmark suites with known answers, and numerical parity with transformers.

task.py runs a task with any callable that answers messages; metrics/ scores answers, also those to
the public benchmarks, whose files public_sets/ reads; synthetic.py builds tasks from rendered
images; mini.py is the mini suite, and freeze.py is how its examples were sampled. parity.py
compares the activations of one forward pass with reference.py, which runs transformers. Nothing
here prints: cli/ does.
"""
