"""Pictures of any size through a network, in tiles where they are large."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
_ALIGNED = 32  # networks halve a picture up to five times, and see the same pixels together only from such places on
_FADE = 6.0  # standard deviations from where a tile counts fully to its edge


def restore(
    forward: Forward,
    picture: Tensor,
    *,
    tile: int | None,
    overlap: int,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Return a restored picture of one that is `(C, H, W)` float; waits for the device once a batch.

    `forward` takes `(B, C, H, W)` to the same shape, on the `device`. A picture with a side longer than `tile` pixels goes
    there in tiles, `batch_size` at once; it and the result stay where it is. Tiles have sides of multiples of 32, and
    neighbours share `overlap` pixels at least. They fade into one another there, by a Gaussian: the pixels at the edge of
    a tile, which know nothing of what is behind it, count next to nothing.
    """
    height, width = picture.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return forward(picture[None].to(device))[0].to(picture.device)
    groups: dict[tuple[int, int], list[tuple[slice, slice]]] = defaultdict(list)
    rows, columns = (list(_spans(side, tile, overlap)) for side in (height, width))
    for top, bottom in rows:
        for left, right in columns:  # the last ones are smaller, and no batch has two sizes
            area = slice(top, bottom), slice(left, right)
            groups[bottom - top, right - left].append(area)
    down, across = (
        _weights(side, spans, picture) for side, spans in ((height, rows), (width, columns))
    )
    total = torch.zeros_like(picture)
    for areas in groups.values():
        for start in range(0, len(areas), batch_size):
            batch = areas[start : start + batch_size]
            inputs = torch.stack([picture[:, y, x] for y, x in batch]).to(device)  # synchronises
            outputs = forward(inputs).to(picture.device)  # synchronises
            for (y, x), output in zip(batch, outputs, strict=True):
                share = down[y.start][:, None] * across[x.start]
                total[:, y, x] += output * share
    return total


def _spans(side: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield where tiles along a side begin and end."""
    tile = max(tile // _ALIGNED, 1) * _ALIGNED
    stride = max((tile - overlap) // _ALIGNED, 1) * _ALIGNED
    for start in range(0, side, stride):
        yield start, min(start + tile, side)
        if start + tile >= side:
            return


def _weights(side: int, spans: list[tuple[int, int]], like: Tensor) -> dict[int, Tensor]:
    """Return how much each pixel along a tile counts, by where the tile begins; all tiles together count 1."""
    total = like.new_zeros(side)
    weights: dict[int, Tensor] = {}
    for number, (start, end) in enumerate(spans):
        place = torch.arange(end - start, device=like.device)
        edges = []
        if number > 0:
            edges.append((place, spans[number - 1][1] - start))
        if number + 1 < len(spans):
            edges.append((place.flip(0), end - spans[number + 1][0]))
        weights[start] = like.new_ones(end - start)
        for inwards, shared in edges:
            outside = (1 - (inwards + 0.5) / shared).clamp_min(0)
            weights[start] *= torch.exp(-((_FADE * outside) ** 2) / 2)
        total[start:end] += weights[start]
    return {start: weights[start] / total[start:end] for start, end in spans}
