"""A data set is checked before the first step, and everything that is wrong with it is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.data.preflight import Progress, inspect_sources, spread
from segfit.errors import SegFitError, printable
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.data.dataset import LabelledSource, read_pair
from segfit.tasks.segmentation.data.folder import FolderSource
from segfit.tasks.segmentation.data.inspection import ItemReport
from segfit.tasks.segmentation.data.problems import describe_classes, describe_reports

SYNTHETIC_SAMPLE = 200  # items of a source without files that are drawn to count classes


@dataclass(frozen=True)
class PreflightReport:
    """What is worth knowing about a data set in which nothing is wrong."""

    notices: list[str]  # oddities, one complete message each
    # split → (num_classes,) pixels of each class in the items that were looked at; empty for "off"
    class_pixels: dict[str, NDArray[np.int64]]


def check_sources(
    sources: Mapping[str, LabelledSource],
    *,
    check: str = "full",
    skip: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    needs: Mapping[str, int] | None = None,
) -> PreflightReport:
    """Look at a data set before training.

    Args:
        sources: split → source.
        check: "full" opens every file, "sample" a hundred of each split, spread evenly, "off" none.
        skip: files that cannot be read are a notice and no problem, as long as there are others in their split.
        cache_dir: where reports are remembered until files change; None: `default_cache_dir()`.
        progress: called with (done, total) items while files are opened; remembered ones count as done.
        needs: split → images it has to have at least.

    Raises:
        SegFitError: with every problem found: too few images, files without a partner, unreadable files,
            sizes that differ, mask values that are no class, 0/255 masks without a label_map.
    """
    problems = [
        f"{split} has {len(sources[split]) if split in sources else 0} images, but needs {need}. "
        "Add images, change the split, or take a smaller batch_size."
        for split, need in (needs or {}).items()
        if split not in sources or len(sources[split]) < need
    ]
    if check == "off":
        if problems:
            raise SegFitError(problems)
        return PreflightReport([], {})
    folders = {split: s for split, s in sources.items() if isinstance(s, FolderSource)}
    # Splits of one folder share a listing.
    problems += dict.fromkeys(p for source in folders.values() for p in source.problems)
    notices = list(dict.fromkeys(n for source in folders.values() for n in source.notices))
    reports = {
        split: [(index, ItemReport.from_json(text)) for index, text in found]
        for split, found in inspect_sources(folders, check, cache_dir, progress).items()
    }
    wrong, odd = describe_reports(folders, reports, skip=skip)
    if problems or wrong:
        raise SegFitError(problems + wrong)
    pixels = {
        split: sum(
            (np.array(report.pixels, np.int64) for _, report in reports[split] if report.pixels),
            np.zeros(len(source.classes), np.int64),
        )
        if split in reports
        else count_class_pixels(source, SYNTHETIC_SAMPLE, skip=skip)
        for split, source in sources.items()
    }
    if "train" in sources:
        whole = len(reports.get("train", ())) in (0, len(sources["train"]))
        odd += describe_classes(sources["train"].classes, pixels["train"], whole=whole)
    return PreflightReport([printable(notice) for notice in notices + odd], pixels)


def count_class_pixels(
    source: LabelledSource, limit: int, *, skip: bool = False
) -> NDArray[np.int64]:
    """Return (num_classes,) int64: pixels of each class in at most `limit` items, spread evenly.

    Raises:
        SegFitError: if one cannot be read, unless `skip`.
    """
    counts = np.zeros(IGNORE_INDEX + 1, np.int64)
    for index in spread(len(source), limit):
        try:
            mask = read_pair(source, index)[1]
        except SegFitError:
            if not skip:
                raise
            continue
        counts += np.bincount(mask.numpy().ravel(), minlength=IGNORE_INDEX + 1)
    return counts[: len(source.classes)]
