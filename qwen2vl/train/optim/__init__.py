"""Optimizers: parameter groups by LR rules, Muon and AdamW, the LR schedule, the loss-spike guard.

`optimizers.py` builds the parameter groups from the ordered rules of a recipe's stage.
"""
