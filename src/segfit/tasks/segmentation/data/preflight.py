"""A data set is looked at before the first step, and everything that is wrong is told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.data.preflight_cache import ReportCache, default_cache_dir, report_key
from segfit.data.source import Source
from segfit.errors import SegFitError, printable
from segfit.system.cores import available_cores
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.data.dataset import read_pair
from segfit.tasks.segmentation.data.inspection import Inspectable, ItemReport
from segfit.tasks.segmentation.data.problems import Finding, describe, describe_classes

SAMPLE = 100  # items of each split that check="sample" opens
SYNTHETIC_SAMPLE = 200  # items of a source without files that are drawn to count classes
_CHUNK = 256  # items between two saves of what was found

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreflightReport:
    """What is worth knowing about a data set in which nothing is wrong.

    Args:
        notices: oddities, one complete message each.
        class_pixels: split → (num_classes,) int64, pixels of each class in the items that were looked
            at: all of them for "full", a sample otherwise. Empty for "off".
    """

    notices: list[str]
    class_pixels: dict[str, NDArray[np.int64]]


def check_sources(
    sources: Mapping[str, Source],
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
        skip: files that cannot be read are told of, but no problem, as long as there are others in their split.
        cache_dir: where findings are remembered until files change; None: `default_cache_dir()`.
        progress: called with (done, total) items while files are opened; cached ones count as done.
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
    files = {split: s for split, s in sources.items() if isinstance(s, Inspectable)}
    notices: list[str] = []
    for source in files.values():
        problems += [p for p in source.problems if p not in problems]
        notices += [n for n in source.notices if n not in notices]
    findings = _inspect(files, check, cache_dir or default_cache_dir(), progress)
    wrong, odd = describe(files, findings, skip=skip)
    if problems or wrong:
        raise SegFitError(problems + wrong)
    pixels = {
        split: _sum_pixels(findings[split], len(source.classes))
        if split in findings
        else count_class_pixels(source, SYNTHETIC_SAMPLE, skip=skip)
        for split, source in sources.items()
    }
    whole = all(len(found) == len(sources[split]) for split, found in findings.items())
    odd += describe_classes(sources, pixels, whole=whole)
    return PreflightReport([printable(notice) for notice in notices + odd], pixels)


def count_class_pixels(source: Source, limit: int, *, skip: bool = False) -> NDArray[np.int64]:
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


def spread(length: int, limit: int) -> list[int]:
    """Return at most `limit` different indices below `length`, evenly spread."""
    if length <= limit:
        return list(range(length))
    return [index * length // limit for index in range(limit)]


def _sum_pixels(findings: Sequence[Finding], num_classes: int) -> NDArray[np.int64]:
    total = np.zeros(num_classes, np.int64)
    for _, report in findings:
        total += np.array(report.pixels or [0] * num_classes, np.int64)
    return total


def _inspect(
    sources: Mapping[str, Inspectable],
    check: str,
    cache_dir: Path,
    progress: Progress | None,
) -> dict[str, list[Finding]]:
    """Return split → (index, report) by index, from the cache where the files are unchanged."""
    items = [
        (split, index)
        for split, source in sources.items()
        for index in spread(len(source), len(source) if check == "full" else SAMPLE)
    ]
    keys = {item: _key(sources[item[0]], item[1]) for item in items}
    cache = ReportCache(cache_dir)
    known = cache.get(key for key in keys.values() if key)
    reports = {item: known[key] for item, key in keys.items() if key in known}
    pending = [item for item in items if item not in reports]
    try:
        for found in _look(sources, pending):
            reports.update(found)
            cache.put({key: report for item, report in found.items() if (key := keys[item])})
            if progress is not None:
                progress(len(reports), len(items))
    finally:
        cache.close()
    return {
        split: [(index, reports[part, index]) for part, index in items if part == split]
        for split in sources
    }


def _look(
    sources: Mapping[str, Inspectable], items: Sequence[tuple[str, int]]
) -> Iterator[dict[tuple[str, int], ItemReport]]:
    """Inspect in threads (decoders let go of the interpreter's lock), a chunk at a time."""
    with ThreadPoolExecutor(min(32, max(2, available_cores()))) as pool:
        for start in range(0, len(items), _CHUNK):
            chunk = items[start : start + _CHUNK]
            found = pool.map(lambda item: sources[item[0]].inspect(item[1]), chunk)
            yield dict(zip(chunk, found, strict=True))


def _key(source: Inspectable, index: int) -> bytes:
    """Return the cache key, or b"" where a file has gone: then nothing is remembered."""
    try:
        return report_key(source.files(index), source.options)
    except OSError:
        return b""
