"""Masks as a table of run-lengths, as in the UW-Madison GI-tract set.

A CSV with the columns `id`, `class` and `segmentation`: one row for an image and a class; the
segmentation is `start length start length …`, starts from 1, row by row through the image; empty for
a class that is absent.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from segfit.errors import SegFitError, nearest
from segfit.tasks.segmentation.data.masks import MaskReader

COLUMNS = ("id", "class", "segmentation")
# slice_0001_266_266_1.50_1.50: the slice, its height and width, its pixel spacing in mm
_UW_SLICE = re.compile(r"^(?P<slice>.+)_\d+_\d+_\d+\.\d+_\d+\.\d+$")
_UW_DAY = re.compile(r"^case\d+_day\d+$")

Runs: TypeAlias = Sequence[tuple[int, str]]  # (class index, segmentation) by class


@dataclass(frozen=True)
class RleMasks(MaskReader):
    """Masks painted from the rows of a CSV; class 0 where no run is, later classes over earlier ones."""

    path: Path  # the CSV
    rows: Mapping[str, tuple[str, Runs]]  # relative image name without suffix → id, runs

    def files(self, name: str) -> list[Path]:  # noqa: ARG002
        """Return the CSV."""
        return [self.path]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return class indices (H, W) at the image's `size`.

        Raises:
            SegFitError: if a segmentation is no list of runs, or leaves the image.
        """
        mask = np.zeros(size[0] * size[1], np.uint8)
        identity, rows = self.rows[name]
        for label, runs in rows:
            try:
                pairs = np.array(runs.split(), dtype=np.int64).reshape(-1, 2)
            except (ValueError, OverflowError) as error:
                raise SegFitError(
                    f"{self.path}: id {identity}: a segmentation is not pairs of start and "
                    f"length: '{runs[:40]}'."
                ) from error
            starts, lengths = pairs[:, 0] - 1, pairs[:, 1]
            ends = starts + lengths
            # Each by itself first: the sum of two large ones is negative in 64 bits.
            outside = (starts < 0) | (starts >= mask.size) | (lengths < 1) | (lengths > mask.size)
            if (outside | (ends > mask.size)).any():
                raise SegFitError(
                    f"{self.path}: id {identity}: a run leaves the image of "
                    f"{size[1]}×{size[0]} pixels. Do the rows belong to this image?"
                )
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                mask[start:end] = label
        return mask.reshape(size)


def read_table(path: Path, class_names: Sequence[str]) -> dict[str, Runs]:
    """Return id → runs, empty segmentations left out.

    Raises:
        SegFitError: if the file is no CSV, or a column or a class name is missing or unknown.
    """
    table: dict[str, list[tuple[int, str]]] = {}
    unknown: Counter[str] = Counter()
    index = {name: i for i, name in enumerate(class_names)}
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise SegFitError(
                    f"{path}: no column {', '.join(missing)}. A table of run-lengths has {', '.join(COLUMNS)}."
                )
            for row in reader:
                runs = table.setdefault(row["id"], [])
                if row["class"] not in index:
                    unknown[row["class"]] += 1
                elif row["segmentation"].strip().lower() not in ("", "nan"):
                    runs.append((index[row["class"]], row["segmentation"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SegFitError(f"{path}: not readable as a CSV in UTF-8 ({error}).") from error
    if unknown:
        raise SegFitError(
            [
                f"{path}: class '{name}' in {count} rows is none of data.class_names "
                f"({', '.join(class_names)}).{nearest(name, class_names)}"
                for name, count in unknown.items()
            ]
        )
    return {key: sorted(runs, key=lambda run: run[0]) for key, runs in table.items()}


def table_id(name: str) -> list[str]:
    """Return the ids that the image `name` (relative, without suffix) may have in a table, best first.

    Its file's name; or UW-Madison's, without size and spacing and with the folder of the day in front:
    `case1/case1_day2/scans/slice_0003_266_266_1.50_1.50` is `case1_day2_slice_0003`.
    """
    *folders, stem = name.split("/")
    ids = [stem]
    if match := _UW_SLICE.match(stem):
        days = [folder for folder in reversed(folders) if _UW_DAY.match(folder)]
        ids += [match["slice"], *(f"{day}_{match['slice']}" for day in days)]
    return ids
