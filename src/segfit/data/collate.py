"""Samples → batches, in a worker straight into the memory that they are handed over in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import get_worker_info

Batch: TypeAlias = dict[str, torch.Tensor]
Collate: TypeAlias = Callable[[Sequence[Any]], Any]


def stack(tensors: Sequence[torch.Tensor], fill: float = 0) -> torch.Tensor:
    """Return tensors (…, h, w) as one (B, …, H, W), padded at the bottom and right to the largest of them.

    Args:
        tensors: of one dtype; tensors of one shape may have any number of dimensions.
        fill: the value that they are padded with.

    Raises:
        RuntimeError: in a worker, if shared memory has no room.
    """
    sizes = [tuple(tensor.shape) for tensor in tensors]
    largest = tuple(map(max, *sizes)) if len(sizes) > 1 else sizes[0]
    stacked = _allocate(tensors[0], (len(tensors), *largest))
    if len(set(sizes)) == 1:
        return torch.stack(list(tensors), out=stacked)
    stacked.fill_(fill)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return stacked


def _allocate(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return an uninitialised tensor; a worker's lies in shared memory.

    torch would copy it there in a thread that hands batches over. Where /dev/shm is full, that thread loses the
    batch without a message and every process waits without end; here it is an error, and one copy less.
    """
    if get_worker_info() is None:
        return like.new_empty(shape)
    size = like.element_size() * torch.Size(shape).numel()
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # as torch's own does
    return like.new_empty(0).set_(storage).resize_(shape)
