"""A data set is checked before the first step, and everything that is wrong with it is reported at once.

A message a kind of problem, with a few of the files and a remedy.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from segfit.data.files import some
from segfit.data.preflight import Progress, inspect_sources, spread
from segfit.errors import SegFitError, printable
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import LabelledSource, place_image, read_tensors
from segfit.tasks.segmentation.data.folder import FolderSource, ItemReport

SAMPLE = 200  # items that are read to count classes where no report has them

Report: TypeAlias = tuple[int, ItemReport]  # index, what was found
Item: TypeAlias = tuple[FolderSource, int, ItemReport]


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
    size: tuple[int, int] | None = None,
    fit: str = "crop",
) -> PreflightReport:
    """Look at a data set before training.

    Args:
        sources: split → source.
        check: "full" opens every file, "sample" a hundred of each split, spread evenly, "off" none.
        skip: files that cannot be read are a notice and no problem, as long as there are others in their split.
        cache_dir: where reports are remembered until files change; None: `default_cache_dir()`.
        progress: called with (done, total) items while files are opened; remembered ones count as done.
        needs: split → images it has to have at least.
        size: (h, w) that images are fitted to.
        fit: how, as `TrainDataset`.

    Raises:
        SegFitError: with every problem found: too few images, files without a partner, unreadable files,
            sizes that differ, mask values that are no class, 0/255 masks without a label_map.
    """
    problems = [
        f"{split} has {count} images, but needs {need}. "
        "Add images, change the split, or take a smaller batch_size."
        for split, need in (needs or {}).items()
        if (count := len(sources.get(split, ()))) < need
    ]
    if check == "off":
        if problems:
            raise SegFitError(problems)
        return PreflightReport([], {})
    folders = {split: s for split, s in sources.items() if isinstance(s, FolderSource)}
    # Splits of one folder share a listing.
    listings = [source.listing for source in folders.values()]
    problems += dict.fromkeys(problem for one in listings for problem in one.problems)
    notices = list(dict.fromkeys(notice for one in listings for notice in one.notices))
    reports = {
        split: [(index, ItemReport(**json.loads(text))) for index, text in found]
        for split, found in inspect_sources(
            folders, check, cache_dir, progress, notices.append
        ).items()
    }
    wrong, odd = _describe_reports(folders, reports, skip=skip)
    if problems or wrong:
        raise SegFitError(problems + wrong)
    pixels = {
        split: sum(
            (np.array(report.pixels, np.int64) for _, report in reports[split] if report.pixels),
            np.zeros(len(source.classes), np.int64),
        )
        if split in reports
        else class_pixels(source, SAMPLE, skip=skip).sum(0)
        for split, source in sources.items()
    }
    if size is not None and fit != "crop":
        looked_at = [(one, *found) for part, one in folders.items() for found in reports[part]]
        odd += _lost(looked_at, size, fit)
    for split, source in sources.items():
        whole = len(reports.get(split, ())) in (0, len(source))
        odd += _describe_classes(source.classes, pixels[split], split, whole=whole)
    return PreflightReport([printable(notice) for notice in notices + odd], pixels)


def class_pixels(
    source: LabelledSource, limit: int | None = None, *, skip: bool = False
) -> NDArray[np.int64]:
    """Return (N, num_classes) int64: pixels of each class in all N items, or in at most `limit`, spread evenly.

    What was inspected before is not read again. Raises a SegFitError if an item cannot be read; `skip` gives it no pixels.
    """
    indices, classes = spread(len(source), limit or len(source)), len(source.classes)
    counts = np.zeros((len(indices), classes), np.int64)
    known = {}
    if limit is None and isinstance(source, FolderSource):
        known = dict(inspect_sources({"": source}, "full")[""])
    for row, index in zip(counts, indices, strict=True):
        if pixels := json.loads(known.get(index, "{}")).get("pixels"):
            row[:] = pixels
            continue
        try:
            _, mask = read_tensors(source, index)
        except SegFitError:
            if not skip:
                raise
            continue
        row[:] = np.bincount(mask.numpy().ravel(), minlength=classes)[:classes]
    return counts


def _describe_reports(
    sources: Mapping[str, FolderSource], reports: Mapping[str, list[Report]], *, skip: bool
) -> tuple[list[str], list[str]]:
    """Return (problems, notices) of the reports of each split; kinds are gathered over all splits.

    With `skip`, files that cannot be read are only a notice, as long as others can.
    """
    items = [
        (source, index, report)
        for split, source in sources.items()
        for index, report in reports[split]
    ]
    unreadable = list(dict.fromkeys(r.unreadable for _, _, r in items if r.unreadable))
    problems, notices = [], _notices(items)
    if skip and unreadable:
        problems = [
            f"{split}: none of the images can be read; data.on_bad_sample=skip has nothing to take their place."
            for split, found in reports.items()
            if found and all(report.unreadable for _, report in found)
        ]
        notices.append(
            f"data.on_bad_sample=skip leaves out {_count(unreadable, 'image')}: {some(unreadable)}"
        )
    if problems or not skip:
        problems += unreadable[:5]
        if len(unreadable) > 5:
            problems.append(f"… and {len(unreadable) - 5} more unreadable files.")
    turned = "; the image is turned by its EXIF orientation, its mask is not"
    sizes = [
        f"{source.files(index)[0].as_posix()} ({r.size}{turned if r.orientation >= 5 else ''})"
        for source, index, r in items
        if r.size
    ]
    if sizes:
        problems.append(
            f"{_count(sizes, 'image')} and mask of different size: {some(sizes)}. Resize the masks "
            "(nearest neighbour) or find the right ones."
        )
    problems += _values(items)
    for wrong, text in (*_shades(items), *_palettes(items)):
        (problems if wrong else notices).append(text)
    return problems, notices


def _shades(items: Sequence[Item]) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is a problem, what is wrong) about images of which the network would see little."""
    for kind in ("flat", "own", "blank"):
        found = [(source.files(index)[0], r) for source, index, r in items if r.shades == kind]
        if not found:
            continue
        low, high = min(r.low for _, r in found), max(r.high for _, r in found)
        who = f"{_count(found, 'image')} of {len(items)}"
        files, given = (
            some([path for path, _ in found]),
            f"data.value_range=[{low:.6g}, {high:.6g}]",
        )
        if kind == "flat":
            yield (
                2 * len(found) > len(items),
                f"{who} would reach the network as nearly one value, few of the shades that the files hold ({low:.6g} to "
                f"{high:.6g}) being left: {files}. Say what becomes black and white: {given}, or data.value_range=percentiles.",
            )
        elif kind == "own":
            yield (
                False,
                f"{who} with floats or numbers beyond 16 bits ({low:.6g} to {high:.6g}), each scaled from its own least and "
                f"greatest value: {files}. If a number is to be the same shade in all of them: {given}.",
            )
        else:
            yield False, f"{who} hold one value alone: {files}. If that is not meant, replace them."


def _palettes(items: Sequence[Item]) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is a problem, what is wrong) about masks whose palettes disagree."""
    colors: dict[int, tuple[list[int], Path]] = {}
    indices: dict[tuple[int, ...], int] = {}
    clash, paths = "", []
    for source, index, report in items:
        for value, *color in report.palette:
            path = source.files(index)[-1]
            first, there = colors.setdefault(value, (color, path))
            other = indices.setdefault(tuple(color), value)
            if first != color or other != value:
                paths.append(path)
                clash = clash or (
                    f"{value} is RGB {first} in {there.name} and {color} in {path.name}"
                    if first != color
                    else f"RGB {color} is {other} in one and {value} in {path.name}"
                )
    if clash:
        table = ", ".join(str(list(color)) for color in sorted(indices)[:20])
        yield (
            items[0][0].values.label_map is None,
            f"Masks are read by index, and their palettes differ in {len(set(paths))} files: {clash}. If the colours are the "
            f"classes, list them in the order of the classes: 'data.colors=[{table}]'. If the indices are, name them in "
            "data.label_map.",
        )


def _values(items: Iterable[Item]) -> list[str]:
    """Return what is wrong with mask values: 0/255 masks first, they explain the rest."""
    items = [item for item in items if item[2].pixels]
    problems = []
    black_white = [item for item in items if item[2].only_0_255]
    unset = any(source.values.label_map is None for source, _, _ in items)
    # One mask may hold 0 and 255 by chance; a set in which no mask has a class but 0 cannot be meant.
    others = any(not r.only_0_255 and (any(r.pixels[1:]) or r.values) for _, _, r in items)
    zero_one = bool(black_white) and unset and not others
    if zero_one:
        paths = [source.files(index)[-1] for source, index, _ in black_white]
        problems.append(
            f"{_count(paths, 'mask')} with nothing but 0 and 255 (black and white pictures), so class 1 "
            f"would never occur and 255 would be ignored or unknown: {some(paths)}. "
            "Say what they mean: 'data.label_map={0: 0, 255: 1}'."
        )
    wrong = [item for item in items if item[2].values and not (zero_one and item[2].only_0_255)]
    if wrong and wrong[0][0].values.colors is not None:
        names = [f"{s.files(i)[-1]} ({some(s.values.shown(r.values), 4)})" for s, i, r in wrong]
        problems.append(
            f"{_count(names, 'mask')} with colours that data.colors does not list: {some(names)}. Add rows to it, "
            "[R, G, B, class], for pixels that count nowhere with data.ignore_index as the class."
        )
    elif wrong:
        names = [f"{s.files(i)[-1]} ({some(s.values.shown(r.values), 8)})" for s, i, r in wrong]
        classes = len(wrong[0][2].pixels)
        problems.append(
            f"{_count(names, 'mask')} with values that are no class (data.num_classes={classes}, so 0 to "
            f"{classes - 1}), not ignored, and not in data.label_map: {some(names)}. Raise "
            "data.num_classes, set data.ignore_index, or name the values in data.label_map."
        )
    return problems


def _notices(items: Sequence[Item]) -> list[str]:
    notices = []
    turned = [source.files(index)[0] for source, index, r in items if r.orientation != 1]
    if turned:
        notices.append(
            f"{_count(turned, 'image')} turned or mirrored by EXIF orientation, which is applied; the masks "
            f"must be upright: {some(turned)}."
        )
    several = [f"{s.files(i)[0]} ({r.frames})" for s, i, r in items if r.frames > 1]
    if several:
        notices.append(
            f"{_count(several, 'image')} with several frames or pages, of which the first is used (data.bands takes pages for bands): {some(several)}."
        )
    clear = [source.files(index)[0] for source, index, r in items if r.alpha]
    if clear:
        notices.append(
            f"{_count(clear, 'image')} with transparency, which is dropped: {some(clear)}. To keep it as a band: "
            "data.bands=[1, 2, 3, 4]."
        )
    empty = [s.files(i)[-1] for s, i, r in items if r.ignored and not any(r.pixels)]
    if empty:
        notices.append(f"{_count(empty, 'mask')} with every pixel ignored: {some(empty)}.")
    return notices


def _lost(items: Iterable[Item], size: tuple[int, int], fit: str) -> list[str]:
    """Return a notice about objects that are smaller than a pixel once images are fitted to `size`."""
    seen, lost, factor = Counter[str](), Counter[str](), 1.0
    for source, _, report in items:
        for label, high, wide, count in report.objects:
            height, width = report.shape
            _, _, rows, columns = place_image(height, width, size, fit)
            needed = max(height / (high * rows), width / (wide * columns))
            seen[source.classes.names[label]] += count
            lost[source.classes.names[label]] += count * (needed > 1)
            factor = max(factor, needed)
    described = [f"{lost[name]} of {seen[name]} of {name}" for name in lost if lost[name]]
    if not described:
        return []
    sides = [math.ceil(side * factor - 1e-9) for side in size]
    keeps = sides[0] if sides[0] == sides[1] else str(sides).replace(" ", "")
    return [
        f"Objects smaller than a pixel at image_size={size[0]}×{size[1]} (data.fit={fit}), which mostly vanish: {some(described, 20)}. "
        f"image_size={keeps} keeps them, and so does data.fit=crop."
    ]


def _describe_classes(
    classes: Classes, pixels: NDArray[np.int64], split: str, *, whole: bool
) -> list[str]:
    """Return notices about classes without a pixel in a split: `pixels` (num_classes,) of the `whole` set or a part."""
    absent = [name for name, count in zip(classes.names, pixels, strict=True) if count == 0]
    if not absent or len(absent) == len(classes):
        return []
    where = f"the {split} masks" + ("" if whole else " that were looked at")
    so = "what it finds of them has no score, and is in no mean"
    if split == "train":
        where, so = where.replace("train", "training"), "the model cannot learn what it never sees"
    return [f"No pixel of {some(absent, 20)} in {where}: {so}."]


def _count(items: Sequence[object], what: str) -> str:
    return f"{len(items)} {what}{'s' if len(items) != 1 else ''}"
