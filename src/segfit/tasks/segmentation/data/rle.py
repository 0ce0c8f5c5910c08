"""Masks as a table of run-lengths, as in the UW-Madison GI-tract set.

A CSV with the columns `id`, `class` and `segmentation`: one row for an image and a class; the
segmentation is `start length start length …`, starts from 1, row by row through the image; empty for
a class that is absent.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.errors import SegFitError, nearest
from segfit.tasks.segmentation.data.masks import MaskReader

COLUMNS = ("id", "class", "segmentation")
# slice_0001_266_266_1.50_1.50: the slice, its height and width, its pixel spacing in mm
_UW_SLICE = re.compile(r"^(?P<slice>.+)_\d+_\d+_\d+\.\d+_\d+\.\d+$")
_UW_DAY = re.compile(r"^case\d+_day\d+$")


@dataclass(frozen=True)
class RleMasks(MaskReader):
    """Masks painted from the rows of a CSV; class 0 where no run is, later classes over earlier ones."""

    path: Path  # the CSV
    rows: Mapping[str, Sequence[tuple[int, str]]]  # id → (class index, segmentation) by class
    ids: Mapping[str, str]  # relative image name without suffix → id

    def files(self, name: str) -> list[Path]:  # noqa: ARG002
        """Return the CSV."""
        return [self.path]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return class indices (H, W) at the image's `size`.

        Raises:
            SegFitError: if a segmentation is no list of runs, or leaves the image.
        """
        mask = np.zeros(size[0] * size[1], np.uint8)
        for label, runs in self.rows[self.ids[name]]:
            try:
                pairs = np.array(runs.split(), dtype=np.int64).reshape(-1, 2)
            except (ValueError, OverflowError) as error:
                raise SegFitError(
                    f"{self.path}: id {self.ids[name]}: a segmentation is not pairs of start and "
                    f"length: '{runs[:40]}'."
                ) from error
            starts, lengths = pairs[:, 0] - 1, pairs[:, 1]
            ends = starts + lengths
            # Each by itself first: the sum of two large ones is negative in 64 bits.
            outside = (starts < 0) | (starts >= mask.size) | (lengths < 1) | (lengths > mask.size)
            if (outside | (ends > mask.size)).any():
                raise SegFitError(
                    f"{self.path}: id {self.ids[name]}: a run leaves the image of "
                    f"{size[1]}×{size[0]} pixels. Do the rows belong to this image?"
                )
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                mask[start:end] = label
        return mask.reshape(size)


def read_table(path: Path, class_names: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """Return id → (class index, segmentation), sorted by class, empty segmentations left out.

    Raises:
        SegFitError: if the file, a column or a class name is missing or unknown.
    """
    if not path.is_file():
        raise SegFitError(f"{path}: no such file. data.masks names the CSV of run-lengths.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table, unknown = _sorted_by_id(path, file, class_names)
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
    for runs in table.values():
        runs.sort(key=lambda run: run[0])
    return table


def _sorted_by_id(
    path: Path, lines: Iterable[str], class_names: Sequence[str]
) -> tuple[dict[str, list[tuple[int, str]]], dict[str, int]]:
    """Return id → (class index, segmentation), and unknown class → rows."""
    table: dict[str, list[tuple[int, str]]] = {}
    unknown: dict[str, int] = {}
    index = {name: i for i, name in enumerate(class_names)}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(lines, restval="")
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise SegFitError(
            f"{path}: no column {', '.join(missing)}. A table of run-lengths has {', '.join(COLUMNS)}."
        )
    for row in reader:
        runs = table.setdefault(row["id"], [])
        if row["class"] not in index:
            unknown[row["class"]] = unknown.get(row["class"], 0) + 1
        elif row["segmentation"].strip().lower() not in ("", "nan"):
            runs.append((index[row["class"]], row["segmentation"]))
    return table, unknown


def table_id(name: str) -> list[str]:
    """Return the ids that the image `name` (relative, without suffix) may have in a table, best first.

    Its file's name; or UW-Madison's, without size and spacing and with the folder of the day in front:
    `case1/case1_day2/scans/slice_0003_266_266_1.50_1.50` is `case1_day2_slice_0003`.
    """
    *folders, stem = name.split("/")
    ids = [stem]
    match = _UW_SLICE.match(stem)
    if match:
        ids.append(match["slice"])
        ids += [
            f"{folder}_{match['slice']}" for folder in reversed(folders) if _UW_DAY.match(folder)
        ]
    return ids
