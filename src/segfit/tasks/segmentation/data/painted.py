"""Masks that are painted as they are read: outlines of COCO, YOLO and Labelme, and tables of run-lengths."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segfit.data.source import some
from segfit.errors import SegFitError, nearest

OUTLINES = {"coco": (".json",), "yolo": (".txt",), "labelme": (".json",)}
_COLUMNS = ("id", "class", "segmentation")
# slice_0001_266_266_1.50_1.50: the slice, its height and width, its pixel spacing in mm
_UW_SLICE = re.compile(r"^(?P<slice>.+)_\d+_\d+_\d+\.\d+_\d+\.\d+$")
_UW_DAY = re.compile(r"^case\d+_day\d+$")
_FINE = 4  # Pillow fills every pixel that an outline touches: it draws so many times as fine, and centres are looked at

Size: TypeAlias = tuple[int, int]
# (class, outline (N, 2) of x, y in pixels from the corner, or the pixels inside, (H, W) bool)
Shape: TypeAlias = tuple[int, NDArray[Any]]


def paint(
    form: str, path: Path, entry: Any, class_names: Sequence[str], size: Size
) -> NDArray[np.uint8]:
    """Return class indices (H, W) of an image of `size`: 0 where no shape is, later ones over earlier ones.

    `path` is a file of the mask_format `form`, `entry` what `read_coco` or `read_table` found in it about the image. Raises
    a SegFitError if the file is damaged, names a class that there is not, has what covers no area, or was made for an image
    of another size.
    """
    mask = np.zeros(size, np.uint8)
    try:
        for label, shape in _SHAPES[form](path, entry, class_names, size):
            if shape.dtype == bool:
                mask[shape] = label
            elif not np.isfinite(shape).all():
                raise ValueError("corners that are not finite")
            else:
                _fill(mask, shape, label)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise SegFitError(
            f"{path}: no file of {form}, or damaged ({type(error).__name__}: {error})."
        ) from error
    return mask


def _fill(mask: NDArray[np.uint8], points: NDArray[Any], label: int) -> None:
    low = np.floor(points.min(0)).clip(0).astype(int)
    high = np.ceil(points.max(0)).clip(max=mask.shape[::-1]).astype(int)
    if len(points) < 3 or (high <= low).any():
        return
    canvas = Image.new("L", tuple(((high - low) * _FINE).tolist()))
    corners = ((points - low) * _FINE - 0.5).ravel().tolist()
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    inside = np.asarray(canvas)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE] > 0
    mask[low[1] : high[1], low[0] : high[0]][inside] = label


def _yolo(path: Path, _: Any, names: Sequence[str], size: Size) -> Iterator[Shape]:
    for line in filter(str.strip, path.read_text("utf-8").splitlines()):
        number, *numbers = map(float, line.split())
        if len(numbers) < 6:
            raise SegFitError(f"{path}: '{line[:60]}' is a box or a point, not an outline.")
        if not 0 <= number < len(names) - 1:
            raise SegFitError(
                f"{path}: class {number:g} with data.num_classes={len(names)}. Class 0 is the background here, so YOLO's 0 is "
                "1, and there is one class more than in its list."
            )
        yield int(number) + 1, np.array(numbers).reshape(-1, 2) * size[::-1]


def _labelme(path: Path, _: Any, names: Sequence[str], size: Size) -> Iterator[Shape]:
    made = json.loads(path.read_bytes())
    _check_size(path, path.stem, made.get("imageHeight"), made.get("imageWidth"), size)
    for shape in made["shapes"]:
        points, kind = np.array(shape["points"], float), shape.get("shape_type", "polygon")
        if kind == "rectangle" and len(points) == 2:  # some programs write four corners
            (left, top), (right, bottom) = points
            points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        elif kind == "circle":
            turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
            radius = np.hypot(*(points[1] - points[0]))
            points = points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], 1)
        elif kind not in ("polygon", "rectangle"):
            raise SegFitError(f"{path}: a {kind} ('{shape['label']}') has no outline.")
        if shape["label"] not in names:
            raise SegFitError(
                f"{path}: '{shape['label']}' is none of data.class_names ({some(names, 20)})."
                + nearest(shape["label"], names)
            )
        yield names.index(shape["label"]), points


def _coco(path: Path, made: Any, _: Sequence[str], size: Size) -> Iterator[Shape]:
    _check_size(path, made["file_name"], made.get("height"), made.get("width"), size)
    for label, segmentation in made["shapes"]:
        if isinstance(segmentation, list):
            for numbers in segmentation:
                yield label, np.array(numbers, float).reshape(-1, 2)
            continue
        counts = segmentation["counts"]  # run-lengths, which go column by column
        runs = _decoded(counts) if isinstance(counts, str) else counts
        pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        yield label, pixels.reshape(size[::-1]).T


def _decoded(text: str) -> list[int]:
    """Return the run-lengths of COCO's compressed form: 5 bits a character, the 6th for more, from the third on differences."""
    runs: list[int] = []
    value = bits = 0
    for character in text.encode():
        code = character - 48
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << bits - 4  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return runs


def _rle(path: Path, entry: Any, _: Sequence[str], size: Size) -> Iterator[Shape]:
    identity, rows = entry
    total = size[0] * size[1]
    for label, runs in rows:
        try:
            pairs = np.array(runs.split(), dtype=np.int64).reshape(-1, 2)
        except (ValueError, OverflowError) as error:
            raise SegFitError(
                f"{path}: id {identity}: a segmentation is not pairs of start and length: '{runs[:40]}'."
            ) from error
        starts, lengths = pairs[:, 0] - 1, pairs[:, 1]
        if ((starts < 0) | (starts >= total) | (lengths < 1) | (lengths > total - starts)).any():
            raise SegFitError(
                f"{path}: id {identity}: a run leaves the image of {size[1]}×{size[0]} pixels. Do the rows belong to this "
                "image?"
            )
        pixels = np.zeros(total, bool)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            pixels[start : start + length] = True
        yield label, pixels.reshape(size)


_SHAPES: dict[str, Callable[[Path, Any, Sequence[str], Size], Iterator[Shape]]] = {
    "rle": _rle, "coco": _coco, "yolo": _yolo, "labelme": _labelme,
}  # fmt: skip


def _check_size(path: Path, name: str, height: Any, width: Any, size: Size) -> None:
    if height and (height, width) != size:
        raise SegFitError(
            f"{path}: {name} was outlined at {width}×{height} pixels, the image has {size[1]}×{size[0]}."
        )


def read_coco(path: Path, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return image name without suffix → what COCO says of it, and its shapes, (class, segmentation), in the order of the file.

    Raises a SegFitError if it is no such JSON, or a category that occurs is none of the classes.
    """
    try:
        made = json.loads(path.read_bytes())
        categories = {each["id"]: each["name"] for each in made["categories"]}
        images = {i["id"]: dict(i, shapes=[], file_name=i["file_name"]) for i in made["images"]}
        shapes = [
            (images[each["image_id"]], categories[each["category_id"]], each["segmentation"])
            for each in made["annotations"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = isinstance(error, KeyError)
        what = f"there is no {error}" if missing else f"{type(error).__name__}: {error}"
        raise SegFitError(f"{path}: no outlines in COCO's JSON ({what}).") from error
    if {category for _, category, _ in shapes} - set(class_names):
        names = ["background", *dict.fromkeys(categories.values())]
        raise SegFitError(
            f"{path}: its categories are none of data.class_names ({some(class_names, 20)}). Say: "
            f"'data.class_names=[{', '.join(names)}]' data.num_classes={len(names)}."
        )
    for image, category, segmentation in shapes:
        image["shapes"].append((class_names.index(category), segmentation))
    return {
        PurePosixPath(image["file_name"].replace("\\", "/")).with_suffix("").as_posix(): image
        for image in images.values()
    }


def read_table(path: Path, class_names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Return id → id and runs, (class, segmentation) by class, of a table as in the UW-Madison GI-tract set.

    A CSV with the columns `id`, `class` and `segmentation`: one row for an image and a class; the segmentation is
    `start length start length …`, starts from 1, row by row through the image; empty for a class that is absent. Raises a
    SegFitError if the file is no CSV, or a column or a class name is missing or unknown.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            path, dtype=str, na_filter=False, index_col=False, usecols=_COLUMNS.__contains__
        )
    except (OSError, ValueError) as error:  # as pandas' own are
        raise SegFitError(f"{path}: not readable as a CSV in UTF-8 ({error}).") from error
    if missing := [column for column in _COLUMNS if column not in table]:
        raise SegFitError(
            f"{path}: no column {', '.join(missing)}. A table of run-lengths has {', '.join(_COLUMNS)}."
        )
    if unknown := sorted({*table["class"]} - {*class_names}):
        raise SegFitError(
            f"{path}: classes {some(unknown)} are none of data.class_names ({some(class_names, 20)})."
            + nearest(unknown[0], class_names)
        )
    found: dict[str, list[tuple[int, str]]] = {}
    for identity, name, runs in table[list(_COLUMNS)].itertuples(index=False):
        given = found.setdefault(identity, [])
        if runs.strip().lower() not in ("", "nan"):
            given.append((class_names.index(name), runs))
    return {key: (key, sorted(runs, key=itemgetter(0))) for key, runs in found.items()}


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
