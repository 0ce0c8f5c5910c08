"""Windows of series: gathered by index, a whole batch at once, where the series lie."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.batches import Batch, Indices
from segfit.data.source import Arrays, SourceView
from segfit.tasks.forecasting.data.series import LazySeries, Rows, SeriesSet

_CPU = torch.device("cpu")


class Windows:
    """The windows of a part of all series: series after series, each from its oldest window on.

    A `Source`, and a `GatheringDataset` of its samples. All parts, "train", "val", "test" and "future", share the series.
    """

    def __init__(self, lazy: LazySeries, part: str, data: DictConfig) -> None:
        self.lazy, self.part = lazy, part
        self.lookback, self.horizon = int(data.lookback), int(data.horizon)
        self.place = str(data.place)
        self.source = self  # as a dataset, it is its own

    @property
    def series(self) -> SeriesSet:
        """The series themselves."""
        return self.lazy.series

    @cached_property
    def ends(self) -> Rows:
        """The number of windows up to and with each series, (series,)."""
        return np.cumsum(self.series.counts[self.part])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, indices: Indices) -> tuple[Rows, Rows, Rows]:
        """Return the series of windows, their numbers within it, and the rows at which they begin, (B,) each."""
        at = np.asarray(indices)
        which = np.searchsorted(self.ends, at, side="right")
        number = at - (self.ends[which] - self.series.counts[self.part][which])
        return which, number, self.series.first[self.part][which] + number

    def id(self, index: int) -> str:
        """Return the name of the series and the date of the last row that is seen."""
        which, _, row = self.locate([index])
        date = np.datetime64(int(self.series.table.dates[row[0] + self.lookback - 1]), "s")
        return f"{self.series.table.names[which[0]]}@{date}"

    where = id

    def files(self, index: int) -> list[Path]:
        """Return the file of the series."""
        files = self.series.table.files
        return [files[self.locate([index])[0][0]]] if files else []

    def read(self, index: int) -> Arrays:
        """Return a window, (lookback + horizon, columns) float32."""
        return (self[index]["window"].numpy(),)

    def __getitem__(self, key: Any) -> Batch:
        """Return the sample for an index, or for (index, seed)."""
        batch = self.batch([key[0] if isinstance(key, tuple) else key], _CPU)
        return {name: values[0] for name, values in batch.items()}

    def batch(self, indices: Indices, device: torch.device) -> Batch:
        """Return windows as a batch, on the device if the series lie there, else on the host."""
        place, table = self.series.on(device, self.place), self.series.table
        own = place["values"].device
        which, _, begin = (_moved(part, own) for part in self.locate(indices))
        rows = begin[:, None] + torch.arange(self.lookback + self.horizon, device=own)
        if self.part == "future":
            rows = rows.clamp(max=len(place["values"]) - 1)
        # (B, lookback + horizon, columns) float32, true values; index_select takes a third of the time of values[rows] on a
        # CPU.
        window = place["values"].index_select(0, rows.flatten()).view(*rows.shape, -1)
        if self.part == "future":
            window[:, self.lookback :, : table.layout.inputs] = 0  # what was not observed
        batch = {
            "window": window,
            **{key: place[key][which] for key in self.series.statistics},  # (B, …) float32
            "when": place["dates"][rows[:, self.lookback]],  # (B,) int64, of the first forecast row
            "index": _moved(np.asarray(indices), own),  # (B,) int64
        }
        if own != device and device.type == "cuda":
            return {key: tensor.pin_memory() for key, tensor in batch.items()}
        return batch


def _moved(values: Rows, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    # From pinned memory, so that the host does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class SingleWindows(SourceView):
    """Windows one by one."""

    source: Windows

    def __getitem__(self, key: Any) -> Batch:
        """Return the sample for an index, or for (index, seed)."""
        return self.source[key]
