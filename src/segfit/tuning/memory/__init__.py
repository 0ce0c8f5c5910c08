"""How much memory a training takes, worked out from its own step on tensors without data; see docs/plan.md.

`curve`, `cache` and `planner` never import torch by themselves: a forecast that is remembered is answered at once.
"""
