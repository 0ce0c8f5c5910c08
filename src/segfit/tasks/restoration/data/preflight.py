"""Pictures are looked at before the first step, and everything that is wrong with them is reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.data.files import some
from segfit.data.preflight import inspect_sources
from segfit.data.source import Source, where
from segfit.errors import SegFitError
from segfit.tasks.defaults import NothingToReport
from segfit.tasks.restoration.data.folder import PictureSource, sizes
from segfit.tasks.restoration.data.reading import Pixels, as_float, read_picture

_LOOKED_AT = 512  # pixels a side, in the middle of a pair, in which a shift is looked for
_SHIFT = 2  # pixels from which on it is a problem: blur moves edges by one
_CLEARER = 1.5  # so many times the correlation of the pair as it lies


def check_sources(
    sources: Mapping[str, Source],
    *,
    check: str,
    skip: bool,
    needs: Mapping[str, int],
    progress: Callable[[int, int], None] | None = None,
) -> NothingToReport:
    """Look at pictures before training.

    Args:
        sources: split → source; one without files has nothing to look at.
        check: "full" opens every file, "sample" a hundred of each split, "off" none.
        skip: files that cannot be read are a notice and no problem.
        needs: split → pictures that it has to have at least.
        progress: called with (done, total) pictures while files are opened.

    Raises:
        SegFitError: with every problem found: too few pictures, files without a partner, unreadable files, pictures
            that are too small, pairs of unequal size or shifted against each other.
    """
    problems = [
        f"{split} has no pictures. Add some, or change data.split."
        for split, need in needs.items()
        if split not in sources or len(sources[split]) < need
    ]
    folders = {split: one for split, one in sources.items() if isinstance(one, PictureSource)}
    problems += dict.fromkeys(text for one in folders.values() for text in one.problems)
    notices: list[str] = []
    if check != "off":
        found = [
            (folders[split], index, json.loads(text))
            for split, reports in inspect_sources(folders, check, progress=progress).items()
            for index, text in reports
        ]
        wrong, notices = _describe(found, skip=skip)
        problems += wrong
    if problems:
        raise SegFitError(problems)
    return NothingToReport(notices)


def look_at(source: PictureSource, index: int) -> str:
    """Return what is wrong with a picture or pair, as JSON: "unreadable", "size", "small", "shift"; {} if nothing."""
    try:
        pictures = [read_picture(file, source.image_mode) for file in source.files(index)]
    except SegFitError as error:
        return json.dumps({"unreadable": str(error)})
    except MemoryError as error:  # no fault of the file's, and nothing to remember
        raise SegFitError(
            f"{where(source, index)}: memory ran out while this was read. Cut large pictures into tiles."
        ) from error
    report: dict[str, Any] = {}
    height, width = pictures[0].shape[:2]
    if min(height, width) < source.smallest:
        report["small"] = f"{width}×{height}, {source.smallest} needed"
    if len(pictures) == 2:
        if pictures[0].shape != pictures[1].shape:
            report["size"] = sizes(pictures)
        elif (moved := shift(*pictures)) is not None:
            report["shift"] = moved
    return json.dumps(report)


def shift(target: Pixels, picture: Pixels) -> tuple[int, int] | None:
    """Return by how many pixels (down, right) a picture lies beside its target; None where it does not.

    The peak of the cross-correlation of their gradients, in which neither noise nor blur have a part.
    """
    one, other = (np.fft.fft2(_edges(pixels)) for pixels in (target, picture))
    correlation = np.fft.ifft2(other * one.conj()).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    down, right = (
        int(place - size if place > size // 2 else place)
        for place, size in zip(peak, correlation.shape, strict=True)
    )
    clear = correlation.max() > _CLEARER * max(correlation[0, 0], 0)
    return (down, right) if clear and max(abs(down), abs(right)) >= _SHIFT else None


def _edges(pixels: Pixels) -> NDArray[np.complex64]:
    """Return the gradient (h, w) of the middle of a picture as complex numbers, less towards the rim."""
    height, width = pixels.shape[:2]
    top, left = max(height - _LOOKED_AT, 0) // 2, max(width - _LOOKED_AT, 0) // 2
    middle = as_float(pixels[top : top + _LOOKED_AT, left : left + _LOOKED_AT]).mean(2)
    down = np.diff(middle, axis=0, prepend=middle[:1])
    right = np.diff(middle, axis=1, prepend=middle[:, :1])
    window = np.hanning(middle.shape[0])[:, None] * np.hanning(middle.shape[1])
    return np.asarray((right + 1j * down) * window, np.complex64)


def _describe(
    found: Sequence[tuple[PictureSource, int, dict[str, Any]]], *, skip: bool
) -> tuple[list[str], list[str]]:
    """Return (problems, notices), a message a kind."""

    def kind(name: str) -> list[str]:
        return [
            f"{source.files(index)[-1]} ({report[name]})"
            for source, index, report in found
            if name in report
        ]

    problems, notices = [], []
    unreadable = list(dict.fromkeys(r["unreadable"] for _, _, r in found if "unreadable" in r))
    if skip and unreadable and len(unreadable) < len(found):
        notices.append(f"data.on_bad_sample=skip leaves out {len(unreadable)}: {some(unreadable)}")
    else:
        problems += unreadable[:5]
        if len(unreadable) > 5:
            problems.append(f"… and {len(unreadable) - 5} more unreadable files.")
    small, unequal, shifted = kind("small"), kind("size"), kind("shift")
    if small:
        problems.append(
            f"{len(small)} pictures are too small: {some(small)}. Lower patch_size, or leave them out."
        )
    if unequal:
        problems.append(
            f"{len(unequal)} pairs of unequal size: {some(unequal)}. Find the right partners."
        )
    if shifted:
        problems.append(
            f"{len(shifted)} pictures lie beside their targets, by so many pixels [down, right]: {some(shifted)}. Align "
            "them, or the network learns to blur. If that is meant: data.check=off."
        )
    return problems, notices
