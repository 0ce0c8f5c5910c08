"""Backward in Python: torch's own engine refuses CUDA tensors where there is no driver.

It keeps to the engine's order, frees what the engine frees when the engine does, and adds up gradients in
place where the engine does (torch/csrc/autograd/engine.cpp, input_buffer.cpp, accumulate_grad.h).
"""

import heapq
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Node = Any  # of the autograd graph
Slots = dict[int, Tensor]  # which result of a node → its gradient


@torch.no_grad()
def backward(roots: list[tuple[Node, Tensor]], ends: Sequence[Tensor] = ()) -> None:
    """Walk the graph from a node and the gradient of its result; gradients arrive in the leaves' `.grad`.

    `roots` is one pair; the list is emptied, so that nothing but the walk holds the graph. The leaves in `ends` take a
    gradient as it comes, whatever its strides.
    """
    root, gradient = roots.pop()
    waiting = _uses(root)
    pending: dict[Node, Slots] = {root: {0: gradient}}
    ready, count = [(_rank(root), 0, root)], itertools.count(1)
    del root, gradient
    while ready:
        node = heapq.heappop(ready)[-1]
        gradients = pending.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, gradients, ends)
            continue
        edges = node.next_functions
        results = _call(node, gradients)
        if hasattr(node, "apply"):
            node.holder = None  # see pretend.py: it holds the node
        del node, gradients
        for index, (target, slot) in enumerate(edges):
            if target is None:
                continue
            result, results[index] = results[index], None
            if result is not None:
                _add(pending.setdefault(target, {}), slot, _fitted(result, target, slot))
            del result
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, (_rank(target), next(count), target))
                del waiting[target]
        del edges, target


def _uses(root: Node) -> Counter[Node]:
    """Return how many gradients each node below the root gets."""
    uses: Counter[Node] = Counter()
    stack = [root]
    while stack:
        targets = [target for target, _ in stack.pop().next_functions if target is not None]
        stack += {target for target in targets if target not in uses}
        uses.update(targets)
    return uses


def _rank(node: Node) -> int:
    """Return a node's place in the order, the lowest first: leaves, then the nodes that forward made last."""
    return -(2**63) if hasattr(node, "variable") else -node._sequence_nr()


def _call(node: Node, gradients: Slots) -> list[Tensor | None]:
    if not gradients:
        return [None] * len(node.next_functions)
    inputs = [gradients.pop(index, None) for index in range(len(node._input_metadata))]
    call = node.apply if hasattr(node, "apply") else node
    results = call(*inputs)
    del inputs
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _fitted(gradient: Tensor, target: Node, slot: int) -> Tensor:
    """Return a gradient in the shape and type of what it belongs to (engine.cpp, validate_outputs)."""
    if hasattr(target, "variable"):
        shape, dtype = target.variable.shape, target.variable.dtype
    else:
        expected = target._input_metadata[slot]
        shape, dtype = expected.shape, expected.dtype
    if gradient.shape != shape:
        gradient = gradient.sum_to_size(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def _add(slots: Slots, slot: int, gradient: Tensor) -> None:
    if slot not in slots:
        slots[slot] = gradient
    elif slots[slot]._base is None and _is_sole_owner(slots[slot]):
        slots[slot].add_(gradient)
    else:
        slots[slot] = slots[slot] + gradient


def _accumulate(leaf: Tensor, gradients: Slots, ends: Sequence[Tensor]) -> None:
    if not gradients:
        return
    gradient = gradients.pop(0)
    if leaf.grad is not None:
        leaf.grad.add_(gradient)
    elif any(leaf is end for end in ends):
        leaf.grad = gradient
    elif gradient.stride() == leaf.stride() and _is_sole_owner(gradient):
        leaf.grad = gradient.detach()
    else:
        leaf.grad = torch.empty_like(leaf).copy_(gradient)
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)


def _is_sole_owner(tensor: Tensor) -> bool:
    """Return whether nothing but one variable or container of the caller's holds the tensor."""
    return sys.getrefcount(tensor) <= 3  # the caller's, this function's, getrefcount's
