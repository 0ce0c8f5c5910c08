"""Picture files with all of their 8 or 16 bits, alone or in pairs, in folders; and all that is wrong with them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.data.formats import read_values
from segfit.data.images import luminance, only_images
from segfit.data.preflight import Preflight, inspect_sources, unreadable
from segfit.data.source import Named, Source, files_by_name, list_files, some
from segfit.data.splits import SPLITS, find_splits, listed, split_names
from segfit.errors import SegFitError, raise_all

Pixels: TypeAlias = NDArray[Any]  # (H, W, C) uint8 or uint16, C 1 or 3

_SHALLOW = 8192  # of 65536, below which nearly all of 16 bits is unused
_LOOKED_AT = 512  # pixels a side, in the middle of a pair, in which a shift is looked for
_SHIFT = 2  # pixels from which on it is a problem: blur moves edges by one
_CLEARER = 1.5  # so many times the correlation of the pair as it lies
# What `PictureSource.inspect` may report of a picture → the message, with how many there are, and some of them.
_MESSAGES = {
    "small": "{} pictures are too small: {}. Lower patch_size, or leave them out.",
    "shallow": "{} pictures of 16 bits use few of them, so that all is nearly black (their greatest values): {}. Save them with "
    "65535 as white. If that is meant: data.check=off.",
    "size": "{} pairs of unequal size: {}. Find the right partners.",
    "shift": "{} pictures lie beside their targets, by so many pixels [down, right]: {}. Align them, or the network learns to "
    "blur. If that is meant: data.check=off.",
}


def read_picture(path: Path, image_mode: str) -> Pixels:
    """Return a picture (H, W, C), upright, C-contiguous: uint8, or uint16 where the file has 16 bits.

    Alpha is dropped; palettes and CMYK are converted. `image_mode` is "gray" for one channel, the luminance of colour
    files, or "rgb" for three. Raises a SegFitError if the file cannot be read, or holds other than 8 or 16 bits, or other
    than one band or three, or several pictures.
    """
    values, *_, frames = read_values(path)
    if frames > 1:
        raise SegFitError(f"{path}: holds {frames} pictures (frames, pages). Save each as a file.")
    pixels = values.reshape(*values.shape[:2], -1)
    if pixels.shape[2] not in (1, 3):
        raise SegFitError(f"{path}: holds {pixels.shape[2]} bands; a picture has 1 or 3.")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise SegFitError(f"{path}: neither 8 nor 16 bits a value. Save it as a 16-bit PNG.")
        pixels = pixels.astype(np.uint16)
    if image_mode == "rgb":
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    gray = luminance(pixels) if pixels.shape[2] == 3 else pixels
    return np.ascontiguousarray(gray.reshape(*pixels.shape[:2], 1))


def is_shallow(pixels: Pixels) -> bool:
    """Say whether a picture of 16 bits uses few of them."""
    return pixels.dtype == np.uint16 and int(pixels.max()) < _SHALLOW


def png(pixels: Pixels) -> bytes:
    """Return a picture (H, W, C) uint8 or uint16 as a PNG file of that depth; Pillow writes no 16-bit colours."""
    import imagecodecs

    # Run-lengths of differences from the row above: several times as fast as a search for matches, and about as small.
    how = {"filter": imagecodecs.PNG.FILTER.UP, "strategy": imagecodecs.PNG.STRATEGY.RLE}
    rows = np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
    return bytes(imagecodecs.png_encode(rows, **how))


def as_float(pixels: Pixels) -> NDArray[np.float32]:
    """Return a picture as float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


@dataclass
class PictureSource(Named):
    """A `Source` of picture files: clean ones, or clean ones with degraded partners."""

    image_mode: str  # "rgb" or "gray"
    names: Sequence[str]  # relative, without suffix, in the order of the indices
    sides: Sequence[Mapping[str, Path]]  # the clean file of each name; of pairs the degraded one
    problems: Sequence[str] = ()  # what listing the files found
    notices: Sequence[str] = ()
    smallest: int = 0  # pixels that a side has to have, for the pre-flight
    options: str = ""  # what a report depends on
    contents: dict[str, str] = field(default_factory=dict)  # name → key, by the pre-flight

    @property
    def pool(self) -> Mapping[str, Path]:
        """Pictures by name, those of other splits that were drawn from the same ones included."""
        return self.sides[0]

    def files(self, index: int) -> list[Path]:
        """Return the clean file, then its degraded partner if there is one."""
        return [side[self.names[index]] for side in self.sides]

    def read(self, index: int) -> tuple[Pixels, ...]:
        """Return the clean picture (H, W, C) uint8 or uint16, then the degraded one if there is one.

        Raises a SegFitError if a file cannot be read, or a pair has two sizes.
        """
        files = self.files(index)
        pictures = tuple(read_picture(file, self.image_mode) for file in files)
        if pictures[0].shape != pictures[-1].shape:
            raise SegFitError(f"{files[1]}: {_sizes(pictures)}.")
        return pictures

    def inspect(self, index: int) -> dict[str, Any]:
        """Return what is wrong with a picture or pair: "small", "shallow", "size", "shift" → [[which of `files`, what], …].

        Raises a SegFitError if it is unreadable.
        """
        pictures = [read_picture(file, self.image_mode) for file in self.files(index)]
        report: dict[str, Any] = {}
        height, width = pictures[0].shape[:2]
        if min(height, width) < self.smallest:
            report["small"] = [[0, f"{width}×{height}, {self.smallest} needed"]]
        if dark := [[i, int(one.max())] for i, one in enumerate(pictures) if is_shallow(one)]:
            report["shallow"] = dark
        if pictures[0].shape != pictures[-1].shape:
            report["size"] = [[-1, _sizes(pictures)]]
        elif len(pictures) == 2 and (moved := shift(*pictures)) is not None:
            report["shift"] = [[-1, moved]]
        return report


def _sizes(pictures: Sequence[Pixels]) -> str:
    """Return "target 640×480, input 320×240"."""
    words = zip(("target", "input"), pictures, strict=True)
    return ", ".join(f"{name} {one.shape[1]}×{one.shape[0]}" for name, one in words)


def shift(target: Pixels, picture: Pixels) -> tuple[int, int] | None:
    """Return by how many pixels (down, right) a picture lies beside its target; None where it does not.

    The peak of the cross-correlation of their gradients, in which neither noise nor blur have a part.
    """
    one, other = (np.fft.fft2(_edges(pixels)) for pixels in (target, picture))
    correlation = np.fft.ifft2(other * one.conj()).real
    clear = correlation.max() > _CLEARER * max(correlation[0, 0], 0)
    around = np.fft.fftshift(correlation)  # no shift in the middle
    peak = np.unravel_index(around.argmax(), around.shape)
    down, right = (int(place) - side // 2 for place, side in zip(peak, around.shape, strict=True))
    return (down, right) if clear and max(abs(down), abs(right)) >= _SHIFT else None


def _edges(pixels: Pixels) -> NDArray[np.complex64]:
    """Return the gradient (h, w) of the middle of a picture as complex numbers, less towards the rim."""
    top, left = (max(side - _LOOKED_AT, 0) // 2 for side in pixels.shape[:2])
    middle = as_float(pixels[top : top + _LOOKED_AT, left : left + _LOOKED_AT]).mean(2)
    down = np.diff(middle, axis=0, prepend=middle[:1])
    right = np.diff(middle, axis=1, prepend=middle[:, :1])
    window = np.hanning(middle.shape[0])[:, None] * np.hanning(middle.shape[1])
    return np.asarray((right + 1j * down) * window, np.complex64)


def folder_sources(data: DictConfig, smallest: Mapping[str, int]) -> dict[str, PictureSource]:
    """Return the splits of a data set in folders: those below `root` that the config names, or that are called after them.

    Without such folders `root` is divided by `data.split`, as is the train folder where there is no val folder. A pair has
    one relative name but for the suffix; its splits may also lie below the two sides. `data` is a FolderConfig or
    PairsConfig; `smallest` are the pixels that a side has to have in each split. Raises a SegFitError with every problem
    that keeps the folders from being a data set. The pre-flight finds what is wrong with single files.
    """
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise SegFitError(f"data.root={data.root}: no such folder (looked in {Path.cwd()}).")
    sides = {key: data[key] for key in ("target", "input") if key in data} or {"target": "."}
    rule, below = data.split, list(sides.values())
    fatal: list[str] = []
    notices: list[str] = []
    named = {part: root / data[part] for part in SPLITS if (root / data[part]).is_dir()}
    if rule.lists is not None:
        places = {"": [root / side for side in below]}
    elif any(data[part] != part for part in named):  # asked for by name
        places = {part: [folder / side for side in below] for part, folder in named.items()}
    else:
        places, fatal, notices = find_splits(root, below)
    found = {}
    for part, folders in places.items():
        if part == "test" and not folders[0].is_dir():
            notices.append(
                f"{folders[0]} is not there, so there is no test split. To restore it: evaluate.py images=…"
            )
        else:
            found[part] = _list(dict(zip(sides, folders, strict=True)), data, fatal)
    raise_all(fatal)
    divides = "val" not in found or data.split.fold is not None
    if divides and (whole := found.pop("", found.pop("train", None))) is not None:
        lists, names = rule.lists, whole.names
        divided = split_names(names, rule, found) if lists is None else listed(root / lists, names)
        found = {part: replace(whole, names=own) for part, own in divided.items()} | found
    for part, source in found.items():
        source.smallest, source.notices = smallest[part], [*source.notices, *notices]
        source.options = repr(("restoration", data.image_mode, smallest[part]))
    return found


def _list(sides: Mapping[str, Path], data: DictConfig, fatal: list[str]) -> PictureSource:
    """Return the pictures of a target folder and, of pairs, an input folder; add to `fatal` why there is nothing to train on."""
    named: dict[str, dict[str, Path]] = {}
    problems: list[str] = []
    notices: list[str] = []
    for key, side in sides.items():
        named[key] = {}
        if not side.is_dir():
            there = some(sorted(path.name for path in side.parent.glob("*"))) or "nothing"
            fatal.append(f"{side}: no such folder (data.{key}). {side.parent} holds {there}.")
            continue
        try:
            files, others = only_images(list_files(side, ()), side)
        except SegFitError as error:
            fatal += error.problems
            continue
        named[key], twice = files_by_name(files, side)
        problems += twice
        notices += others
    paired = set.intersection(*map(set, named.values()))
    if all(named.values()) and not paired:
        fatal.append(
            f"{sides['input']}: no picture of it has a partner of the same name in {sides['target']}."
        )
    for own, other in permutations(sides, 2):
        files = [named[own][name] for name in sorted(named[own].keys() - named[other].keys())]
        if files:
            alone = [file.relative_to(sides[own]).as_posix() for file in files]
            problems.append(
                f"{sides[own]}: {len(alone)} of {len(named[own])} pictures have no partner in {sides[other]}: "
                f"{some(alone)}. Partners have one name but for the suffix."
            )
    return PictureSource(data.image_mode, sorted(paired), [*named.values()], problems, notices)


def check_sources(
    config: DictConfig,
    sources: Mapping[str, Source],
    needs: Mapping[str, int],
    progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """Look at pictures before training; a source without files has nothing to look at.

    `needs` are the pictures that a split has to have at least; `progress` is called with (done, total) pictures while files
    are opened. Raises a SegFitError with every problem found: too few pictures, files without a partner, unreadable files (a
    notice where they are to be skipped), pictures that are too small, pairs of unequal size or shifted against each other.
    """
    problems = [
        f"{split} has no pictures. Add some, or change data.split."
        for split, need in needs.items()
        if split not in sources or len(sources[split]) < need
    ]
    folders = {split: one for split, one in sources.items() if isinstance(one, PictureSource)}
    problems += dict.fromkeys(text for one in folders.values() for text in one.problems)
    check, found = config.data.check, defaultdict[str, list[str]](list)
    seen = [] if check == "off" else inspect_sources(folders, check, progress=progress)
    wrong, notices = unreadable(seen, skip=config.data.on_bad_sample == "skip")
    problems += wrong
    notices[:0] = dict.fromkeys(text for one in folders.values() for text in one.notices)
    for one in seen:
        for kind, odd in one.report.items() if "unreadable" not in one.report else ():
            found[kind] += [f"{one.files[which]} ({said})" for which, said in odd]
    if 2 * sum("shallow" in one.report for one in seen) <= len(seen):
        found.pop("shallow", None)  # some are dark
    problems += [
        message.format(len(found[kind]), some(found[kind]))
        for kind, message in _MESSAGES.items()
        if found[kind]
    ]
    raise_all(problems)
    return Preflight(notices)
