"""Samples → batches, in a worker straight into the memory that they are handed over in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.utils.data import get_worker_info

from segfit.tasks.segmentation.classes import IGNORE_INDEX

Batch: TypeAlias = dict[str, torch.Tensor]

_FILL = {"mask": IGNORE_INDEX}


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return samples as one batch.

    Images are padded at the bottom and right with 0, masks with `IGNORE_INDEX`, to the largest of the
    batch. "shape": (B, 2) int64 holds each sample's original H and W: those of its mask, unless it says
    so itself. All else is stacked; numbers become int64.

    Raises:
        RuntimeError: in a worker, if shared memory has no room.
    """
    values = {key: [torch.as_tensor(sample[key]) for sample in samples] for key in samples[0]}
    if "shape" not in values:
        values["shape"] = [torch.tensor(sample["mask"].shape) for sample in samples]
    return {key: _stack(tensors, _FILL.get(key, 0)) for key, tensors in values.items()}


def _stack(tensors: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    """Return (B, …, h, w), h and w the largest of all."""
    sizes = [tuple(tensor.shape) for tensor in tensors]
    largest = tuple(map(max, *sizes)) if len(sizes) > 1 else sizes[0]
    stacked = _room(tensors[0], (len(tensors), *largest))
    if len(set(sizes)) == 1:
        return torch.stack(list(tensors), out=stacked)
    stacked.fill_(fill)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return stacked


def _room(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of uncertain content; a worker's lies in shared memory.

    torch would copy it there in a thread that hands batches over. Where /dev/shm is full, that thread loses the
    batch without a word and everybody waits for ever; here it is an error like any other, and one copy less.
    """
    if get_worker_info() is None:
        return like.new_empty(shape)
    size = like.element_size() * torch.Size(shape).numel()
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # as torch's own does
    return like.new_empty(0).set_(storage).resize_(shape)
