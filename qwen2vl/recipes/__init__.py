"""Runs by name: each file is one Python function that returns a TrainConfig.

A recipe's docstring is its command, its hardware, and what to expect of time and result. To make
your own, write a file with a function `recipe()` and pass its path instead of a name.
"""
