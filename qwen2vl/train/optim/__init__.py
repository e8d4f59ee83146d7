"""Optimization: parameter groups, Muon and AdamW, the LR schedule, and the loss-spike guard.

`optimizers.py` builds the groups from the ordered rules of a recipe.
"""
