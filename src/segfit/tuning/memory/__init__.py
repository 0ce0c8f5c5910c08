"""How much memory a training takes, worked out from its own step on tensors without data; see docs/plan.md.

`curve`, `cache` and `rules` never import torch: a forecast that is remembered is answered at once.
"""
