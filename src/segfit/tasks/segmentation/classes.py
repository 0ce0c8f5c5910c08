"""What the pixels of a mask mean, once it is read.

A `Source` returns uint8 masks with class indices 0 … num_classes - 1 and `IGNORE_INDEX` for pixels that
count nowhere: not in the loss, not in a metric, not in the normalisation of either.
"""

import colorsys
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

IGNORE_INDEX = 255


@dataclass(frozen=True)
class Classes:
    """The classes of a data set."""

    names: tuple[str, ...]  # one a class, in the order of the indices
    colors: tuple[tuple[int, int, int], ...] = ()  # RGB (0-255) a class; (): well separated hues
    background: int | None = None  # the class that "foreground" scores leave out

    def __post_init__(self) -> None:
        if not self.colors:
            object.__setattr__(self, "colors", distinct_colors(len(self.names), self.background))

    def __len__(self) -> int:
        return len(self.names)


def make_classes(data: DictConfig) -> Classes:
    """Return the classes that a data config describes."""
    names = data.class_names or [f"class_{index}" for index in range(data.num_classes)]
    colors = tuple(tuple(color) for color in data.class_colors or [])
    return Classes(tuple(names), colors, data.background)


_SIDES = (
    "left right, link recht, 左 右, 왼 오른, gauche droite, gauche droit, izquierd derech, sinistr destr, esquerd direit, "
    "лев прав, lew praw, vänster höger, venstre højre"
)
_SIDE_WORDS = ("sx dx", "sol sağ")  # mean it as whole words alone


def sided_pairs(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the classes whose names differ by left and right alone: left_eye and right_eye, ear.L and ear.R, 左眼 and 右眼."""
    lower = [name.lower() for name in names]
    sides = [pair.split() for pair in _SIDES.split(", ")]
    for index, name in enumerate(names):
        others = [lower[index].replace(left, right) for left, right in sides]
        for left, right in map(str.split, _SIDE_WORDS):
            others.append(re.sub(rf"(?<![^\W_]){left}(?![^\W_])", right, lower[index]))
        # No word begins with an l and a consonant: lkidney, lt.
        others.append(re.sub(r"L(?![a-z])|(?<![A-Za-z])l(?![aeiouy])", "r", name).lower())
        for other in {*others} - {lower[index]}:
            if other in lower:
                yield index, lower.index(other)


def distinct_colors(count: int, background: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """Return `count` RGB triples (0-255): the background black, hues a golden ratio apart."""
    hues = [
        colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65 + 0.3 * (i % 2), 0.95 - 0.25 * (i // 8 % 2))
        for i in range(count)
    ]
    colors = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]
    if background is not None:
        colors[background] = (0, 0, 0)
    return tuple(colors)
