"""How much memory a training takes, worked out from its own step on tensors without data; see docs/plan.md.

`planner` does not import torch by itself: a forecast that is remembered is answered at once.
"""
