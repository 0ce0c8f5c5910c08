"""Masks as outlines: COCO's JSON, YOLO's text files, Labelme's JSON files. Drawn by Pillow as they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segfit.data.files import some
from segfit.errors import SegFitError, nearest
from segfit.tasks.segmentation.data.masks import MaskReader

OUTLINES = {"coco": (".json",), "yolo": (".txt",), "labelme": (".json",)}
_FINE = 4  # Pillow fills every pixel that an outline touches: it draws so many times as fine, and centres are looked at

# (class, outline (N, 2) of x, y in pixels from the corner, or the pixels inside, (H, W) bool)
Shape: TypeAlias = tuple[int, NDArray[Any]]


@dataclass(frozen=True)
class OutlineMasks(MaskReader):
    """Masks painted from outlines; class 0 where there is none, later ones over earlier ones."""

    form: str  # "coco", "yolo" or "labelme"
    paths: Mapping[str, Path]  # by relative image name without suffix
    class_names: Sequence[str]
    coco: Mapping[str, Mapping[str, Any]]  # by the same names, of `read_coco`; else empty

    def files(self, name: str) -> list[Path]:
        """Return the one file, which COCO has for all images."""
        return [self.paths[name]]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return class indices (H, W) at the image's `size`.

        Raises:
            SegFitError: if the file is damaged, names a class that there is not, has what covers no area, or was made for
                an image of another size.
        """
        path, mask = self.paths[name], np.zeros(size, np.uint8)
        try:
            for label, shape in self._shapes(name, path, size):
                if shape.dtype == bool:
                    mask[shape] = label
                else:
                    _paint(mask, shape, label)
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            raise SegFitError(
                f"{path}: no file of {self.form}, or damaged ({type(error).__name__}: {error})."
            ) from error
        return mask

    def _shapes(self, name: str, path: Path, size: tuple[int, int]) -> Iterator[Shape]:
        if self.form == "yolo":
            for line in filter(str.strip, path.read_text("utf-8").splitlines()):
                number, *numbers = map(float, line.split())
                if len(numbers) < 6:
                    raise SegFitError(f"{path}: '{line[:60]}' is a box or a point, not an outline.")
                if not 0 <= number < len(self.class_names) - 1:
                    raise SegFitError(
                        f"{path}: class {number:g} with data.num_classes={len(self.class_names)}. Class 0 is the background "
                        "here, so YOLO's 0 is 1, and there is one class more than in its list."
                    )
                yield int(number) + 1, np.array(numbers).reshape(-1, 2) * size[::-1]
            return
        made = self.coco[name] if self.coco else json.loads(path.read_bytes())
        height, width = (
            made.get(key, made.get(f"image{key.title()}")) for key in ("height", "width")
        )
        if height and (height, width) != size:
            raise SegFitError(
                f"{path}: {name} was outlined at {width}×{height} pixels, the image has {size[1]}×{size[0]}."
            )
        if self.coco:
            for label, outline in made["shapes"]:
                yield from ((label, each) for each in _coco_outlines(outline, size))
            return
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
            if shape["label"] not in self.class_names:
                raise SegFitError(
                    f"{path}: '{shape['label']}' is none of data.class_names ({some(self.class_names, 20)})."
                    + nearest(shape["label"], self.class_names)
                )
            yield self.class_names.index(shape["label"]), points


def read_coco(path: Path, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return image name without suffix → its height, width and shapes, (class, segmentation), in the order of the file.

    Raises:
        SegFitError: if it is no such JSON, or a category that occurs is none of the classes.
    """
    try:
        made = json.loads(path.read_bytes())
        categories = {each["id"]: each["name"] for each in made["categories"]}
        images = {each["id"]: {**each, "shapes": []} for each in made["images"]}
        shapes = [
            (images[a["image_id"]], a["category_id"], a["segmentation"])
            for a in made["annotations"]
        ]
        used = {categories[category] for _, category, _ in shapes}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = (
            f"there is no {error}"
            if isinstance(error, KeyError)
            else f"{type(error).__name__}: {error}"
        )
        raise SegFitError(f"{path}: no outlines in COCO's JSON ({what}).") from error
    if used - set(class_names):
        names = ["background", *dict.fromkeys(categories.values())]
        raise SegFitError(
            f"{path}: its categories are none of data.class_names ({some(class_names, 20)}). Say: "
            f"'data.class_names=[{', '.join(names)}]' data.num_classes={len(names)}."
        )
    for image, category, segmentation in shapes:
        image["shapes"].append((class_names.index(categories[category]), segmentation))
    return {
        PurePosixPath(image["file_name"].replace("\\", "/")).with_suffix("").as_posix(): image
        for image in images.values()
    }


def _coco_outlines(segmentation: Any, size: tuple[int, int]) -> Iterator[NDArray[Any]]:
    """Yield the polygons of a segmentation, or the pixels (H, W) bool of its run-lengths, which go column by column."""
    if isinstance(segmentation, list):
        for numbers in segmentation:
            yield np.array(numbers, float).reshape(-1, 2)
        return
    counts = segmentation["counts"]
    runs = _decoded(counts) if isinstance(counts, str) else counts
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    yield pixels.reshape(size[1], size[0]).T


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


def _paint(mask: NDArray[np.uint8], points: NDArray[Any], label: int) -> None:
    low = np.floor(points.min(0)).clip(0).astype(int)
    high = np.ceil(points.max(0)).clip(max=mask.shape[::-1]).astype(int)
    if len(points) < 3 or (high <= low).any():
        return
    canvas = Image.new("L", tuple(((high - low) * _FINE).tolist()))
    corners = ((points - low) * _FINE - 0.5).ravel().tolist()
    ImageDraw.Draw(canvas).polygon(corners, fill=1)
    inside = np.asarray(canvas)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE] > 0
    mask[low[1] : high[1], low[0] : high[0]][inside] = label
