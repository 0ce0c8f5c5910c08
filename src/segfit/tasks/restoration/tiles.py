"""Pictures of any size through a network, in tiles where they are large."""

from collections.abc import Iterator

import torch
from torch import Tensor

from segfit.data.tiles import Forward, strips

_ALIGNED = 32  # networks halve a picture up to five times, and see the same pixels together only from such places on
_FADE = 6.0  # at the edge of a tile, levels are those of the neighbour to less than 1 in 10,000


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
    neighbours share `overlap` pixels at least, where they fade into one another.
    """
    height, width = picture.shape[-2:]
    if tile is None or max(height, width) <= tile:
        return forward(picture[None].to(device))[0].to(picture.device)
    rows, columns = (list(_spans(side, tile, overlap)) for side in (height, width))

    def window(y: slice, x: slice) -> Tensor:
        return picture[:, y, x].to(device)  # synchronises where it is in the host's memory

    home = picture.device
    done = strips(forward, window, rows, columns, batch_size=batch_size, home=home, fade=_FADE)
    return torch.cat(list(done), 1)


def _spans(side: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield where tiles along a side begin and end."""
    tile = max(tile // _ALIGNED, 1) * _ALIGNED
    stride = max((tile - overlap) // _ALIGNED, 1) * _ALIGNED
    for start in range(0, side, stride):
        yield start, min(start + tile, side)
        if start + tile >= side:
            return
