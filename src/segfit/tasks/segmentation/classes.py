"""What the pixels of a mask mean, once it is read.

A `Source` returns uint8 masks with class indices 0 … num_classes - 1 and `IGNORE_INDEX` for pixels that
count nowhere: not in the loss, not in a metric, not in the normalisation of either.
"""

import colorsys
from dataclasses import dataclass

IGNORE_INDEX = 255


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Args:
        names: one name a class, in the order of the indices.
        colors: one RGB triple (0-255) a class; an empty tuple gives well separated hues.
        background: index of the class that "foreground" scores leave out, or None.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()
    background: int | None = None

    def __post_init__(self) -> None:
        if not self.colors:
            object.__setattr__(self, "colors", distinct_colors(len(self.names), self.background))

    def __len__(self) -> int:
        return len(self.names)


def distinct_colors(count: int, background: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """Return `count` RGB triples (0-255): the background black, hues a golden ratio apart."""

    def color(index: int) -> tuple[int, int, int]:
        if index == background:
            return (0, 0, 0)
        red, green, blue = colorsys.hsv_to_rgb(
            0.618034 * index % 1.0, 0.65 + 0.3 * (index % 2), 0.95 - 0.25 * (index // 8 % 2)
        )
        return (round(255 * red), round(255 * green), round(255 * blue))

    return tuple(color(index) for index in range(count))
