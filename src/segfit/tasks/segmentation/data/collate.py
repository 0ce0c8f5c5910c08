"""Samples → batches of images and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from segfit.data.collate import Batch, stack
from segfit.tasks.segmentation.classes import IGNORE_INDEX


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
    return {
        key: stack(tensors, IGNORE_INDEX if key == "mask" else 0) for key, tensors in values.items()
    }
