"""A data set is checked before the first step, and everything that is wrong with it is reported at once.

A message a kind of problem, with a few of the files and a remedy.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.data.preflight import Preflight, Progress, Seen, inspect_sources, spread, unreadable
from segfit.data.source import some
from segfit.errors import printable, raise_all
from segfit.tasks.segmentation.classes import Classes, make_classes, sided_pairs
from segfit.tasks.segmentation.data.dataset import LabelledSource, place_image
from segfit.tasks.segmentation.data.folder import FolderSource
from segfit.tasks.segmentation.schema import size_of

SAMPLE = 200  # items that are read to count classes of what has no files

# what is odd about an image, or "hidden" and "ignored" a mask → what is said, {} being some of the files, with their values from LOW to HIGH
KINDS = {
    "size": "and mask of different size: {}. Resize the masks (nearest neighbour) or find the right ones.",
    "flat": "would reach the network as nearly one value, few of the shades that the files hold (LOW to HIGH) being left: {}.",
    "own": "with floats or numbers beyond 16 bits (LOW to HIGH), each scaled from its own least and greatest value: {}. If a "
    "number is to be the same shade in all of them: data.value_range=[LOW, HIGH].",
    "blank": "hold one value alone: {}. If that is not meant, replace them.",
    "turned": "turned or mirrored by EXIF orientation, which is applied; the masks must be upright: {}.",
    "frames": "with several frames or pages, of which the first is used (data.bands takes pages for bands): {}.",
    "transparent": "with transparency, which is dropped: {}. To keep it as a band: data.bands=[1, 2, 3, 4].",
    "hidden": "with one value alone but for their transparency, which is dropped: {}. If that holds the classes, save it as a grey PNG.",
    "ignored": "with every pixel ignored: {}.",
}


@dataclass(frozen=True)
class PreflightReport(Preflight):
    """What is worth knowing about a data set in which nothing is wrong."""

    # split → (num_classes,) pixels of each class in the items that were looked at; empty for "off"
    class_pixels: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def check_sources(
    config: DictConfig,
    sources: Mapping[str, LabelledSource],
    needs: Mapping[str, int],
    progress: Progress | None = None,
) -> PreflightReport:
    """Look at a data set before training, as `data.check` says.

    `sources` are split → source, `needs` split → images that it has to have at least; `progress` is called with (done,
    total) items while files are opened; remembered ones count as done. Raises a SegFitError with every problem found: too
    few images, files without a partner, unreadable files, sizes that differ, mask values that are no class, 0/255 masks
    without a label_map.
    """
    data, augmentation = config.data, config.augmentation
    skip = data.on_bad_sample == "skip"
    problems = [
        f"{split} has {count} images, but needs {need}. "
        "Add images, change the split, or take a smaller batch_size."
        for split, need in needs.items()
        if (count := len(sources.get(split, ()))) < need
    ]
    looked = sources if data.check != "off" else {}
    folders = {split: s for split, s in looked.items() if isinstance(s, FolderSource)}
    # Splits of one folder share a listing.
    listings = [source.listing for source in folders.values()]
    problems += dict.fromkeys(problem for one in listings for problem in one.problems)
    notices = list(dict.fromkeys(notice for one in listings for notice in one.notices))
    seen = inspect_sources(folders, data.check, progress)
    for wrong, odd in (unreadable(seen, skip=skip), _describe(seen)):
        problems += wrong
        notices += odd
    raise_all(problems)
    if data.fit != "crop":
        notices += _lost(seen, size_of(config.image_size), data.fit)
    pixels = {}
    for split, source in looked.items():
        reports = [one.report for one in seen if one.split == split]
        if split in folders:
            known = [report["pixels"] for report in reports if "pixels" in report]
            pixels[split] = np.array(known, np.int64).reshape(-1, len(source.classes)).sum(0)
        else:
            pixels[split] = class_pixels(source, sample=True).sum(0)
        whole = len(reports) in (0, len(source))
        notices += _absent(source.classes, pixels[split], split, whole=whole)
    if augmentation.name != "none":
        flips = max(augmentation.hflip, augmentation.vflip) > 0
        if flips and (sides := unswapped(config)):
            notices.append(
                f"{sides} in training, or no flips (augmentation.hflip=0 augmentation.vflip=0)."
            )
        if config.batch_size == 1 and augmentation.mixup + augmentation.cutmix > 0:
            notices.append(
                "augmentation.mixup and cutmix mix the images of a batch: batch_size=1 has none to mix."
            )
    return PreflightReport([printable(notice) for notice in notices], pixels)


def unswapped(config: DictConfig) -> str:
    """Return what to do about classes that differ by left and right and are not in `augmentation.swap`, "" without any."""
    names, swap = make_classes(config.data).names, plain(config.augmentation)["swap"] or []
    pairs = [list(pair) for pair in sided_pairs(names) if sorted(pair) not in map(sorted, swap)]
    if not pairs:
        return ""
    exchanged = "; ".join(f"{names[one]} and {names[other]}" for one, other in pairs)
    value = str(swap + pairs).replace(" ", "")
    return f"A mirror image exchanges {exchanged}, but flips do not: set augmentation.swap={value}"


def class_pixels(
    source: LabelledSource, *, sample: bool = False, skip: bool = False
) -> NDArray[np.int64]:
    """Return (N, num_classes) int64: pixels of each class in all N items, or in a sample that is spread evenly.

    What was inspected before is not read again. Raises a SegFitError if an item cannot be read; `skip` gives it no pixels.
    """
    classes = len(source.classes)
    if isinstance(source, FolderSource):
        seen = inspect_sources({"train": source}, "sample" if sample else "full")
        raise_all(unreadable(seen, skip=skip)[0])
        counts = [one.report.get("pixels", [0] * classes) for one in seen]
    else:
        masks = (source.read(i)[1] for i in spread(len(source), SAMPLE if sample else len(source)))
        counts = [np.bincount(mask.ravel(), minlength=classes)[:classes] for mask in masks]
    return np.array(counts, np.int64).reshape(-1, classes)


def _describe(seen: Sequence[Seen]) -> tuple[list[str], list[str]]:
    """Return (problems, notices) about files that can be read; a kind is one message over all splits."""
    problems, notices = _values([one for one in seen if "pixels" in one.report])
    for kind, text in KINDS.items():
        found = [one for one in seen if kind in one.report]
        if not found:
            continue
        low = min(one.report["low"] for one in found)
        high = max(one.report["high"] for one in found)
        text = text.replace("LOW", f"{low:.6g}").replace("HIGH", f"{high:.6g}")
        if kind in ("flat", "own", "blank"):
            text = f"of {len(seen)} {text}"
        wrong = kind == "size" or (kind == "flat" and 2 * len(found) > len(seen))
        if kind == "flat":
            given = found[0].source.image_reader.value_range
            ranges = [f"[{low:.6g}, {high:.6g}]"]
            ranges *= given != (float(f"{low:.6g}"), float(f"{high:.6g}"))
            ranges += ["percentiles"] * all(one.report["percentiles"] for one in found)
            remedy = ", or ".join(f"data.value_range={one}" for one in ranges)
            text += f" Say what becomes black and white: {remedy}." * bool(ranges)
            wrong = wrong and bool(ranges)
        what = "mask" if kind in ("hidden", "ignored") else "image"
        line = _finding(found, what, text, [one.report[kind] for one in found])
        (problems if wrong else notices).append(line)
    if clash := _palettes(seen):
        by_index = seen[0].source.values.label_map is None
        (problems if by_index else notices).append(clash)
    return problems, notices


def _finding(found: Sequence[Seen], what: str, text: str, said: Iterable[str]) -> str:
    """Return "3 images " and a text about them, {} in it being some of their files with what is said of each."""
    paths = [one.files[-1 if what == "mask" else 0] for one in found]
    names = [f"{path} ({one})" if one else path for path, one in zip(paths, said, strict=False)]
    return f"{len(found)} {what}{'s' if len(found) != 1 else ''} {text.replace('{}', some(names))}"


def _palettes(seen: Sequence[Seen]) -> str:
    """Return what is wrong with masks whose palettes disagree, "" if none do."""
    colors: dict[int, tuple[list[int], Path]] = {}
    clash, paths, every = "", set(), set()
    for one in seen:
        path = one.files[-1]
        for value, *color in one.report.get("palette", ()):
            every.add(tuple(color))
            first, there = colors.setdefault(value, (color, path))
            if first != color:
                paths.add(path)
                found = f"{value} is RGB {first} in {there.name} and {color} in {path.name}"
                clash = clash or found
    table = ", ".join(str(list(color)) for color in sorted(every)[:20])
    return clash and (
        f"Masks are read by index, and their palettes differ in {len(paths)} files: {clash}. If the colours are the "
        f"classes, list them in the order of the classes: 'data.colors=[{table}]'. If the indices are, name them in "
        "data.label_map."
    )


def _values(seen: Sequence[Seen]) -> tuple[list[str], list[str]]:
    """Return (problems, notices) about mask values: 0/255 masks first, they explain the rest."""
    black_white = [one for one in seen if one.report["only_0_255"]]
    unset = any(one.source.values.label_map is None for one in seen)
    # One mask may hold 0 and 255 by chance; a set in which no mask has a class but 0 cannot be meant.
    reports = [one.report for one in seen if not one.report["only_0_255"]]
    others = any(any(report["pixels"][1:]) or report["values"] for report in reports)
    problems, notices, rest = list[str](), list[str](), seen
    trained = all(one.split != "train" for one in seen)  # a run that is evaluated
    if black_white and unset and not others and trained:
        text = (
            "with nothing but 0 and 255, so no class but the first one is in them, which decides few scores: {}. If white is a "
            "class, save the masks with the values that those of the training have."
        )
        notices.append(_finding(black_white, "mask", text, repeat("")))
    elif black_white and unset and not others:
        text = (
            "with nothing but 0 and 255 (black and white pictures), so class 1 would never occur and 255 would be ignored or "
            "unknown: {}. Say what they mean: 'data.label_map={0: 0, 255: 1}'."
        )
        problems.append(_finding(black_white, "mask", text, repeat("")))
        rest = [one for one in seen if not one.report["only_0_255"]]
    wrong = [one for one in rest if one.report["values"]]
    if wrong:
        values, classes, shown = wrong[0].source.values, len(wrong[0].report["pixels"]), 8
        text = (
            f"with values that are no class (data.num_classes={classes}, so 0 to {classes - 1}), not ignored, and not in "
            "data.label_map: {}. Raise data.num_classes, set data.ignore_index, or name the values in data.label_map."
        )
        if values.colors:
            shown = 4
            text = (
                "with colours that data.colors does not list: {}. Add rows to it, [R, G, B, class], for pixels that count "
                "nowhere with data.ignore_index as the class."
            )
        said = [some(values.shown(one.report["values"]), shown) for one in wrong]
        problems.append(_finding(wrong, "mask", text, said))
    return problems, notices


def _lost(items: Iterable[Seen], size: tuple[int, int], fit: str) -> list[str]:
    """Return a notice about objects that are smaller than a pixel once images are fitted to `size`."""
    seen, lost, factor = Counter[str](), Counter[str](), 1.0
    for one in items:
        names = one.source.classes.names
        for label, high, wide, count in one.report.get("objects", ()):
            height, width = one.report["shape"]
            _, _, rows, columns = place_image(height, width, size, fit)
            needed = max(height / (high * rows), width / (wide * columns))
            seen[names[label]] += count
            lost[names[label]] += count * (needed > 1)
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


def _absent(classes: Classes, pixels: NDArray[np.int64], split: str, *, whole: bool) -> list[str]:
    """Return notices about classes without a pixel in a split: `pixels` (num_classes,) of the `whole` set or a part."""
    absent = [name for name, count in zip(classes.names, pixels, strict=True) if count == 0]
    if not absent or len(absent) == len(classes):
        return []
    where = f"the {split} masks" + ("" if whole else " that were looked at")
    so = "what it finds of them has no score, and is in no mean"
    if split == "train":
        where, so = where.replace("train", "training"), "the model cannot learn what it never sees"
    return [f"No pixel of {some(absent, 20)} in {where}: {so}."]
