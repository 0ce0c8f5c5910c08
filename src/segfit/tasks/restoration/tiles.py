"""Large pictures in tiles, with the same result as the whole, also for networks that average over the picture."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from segfit.data.tiles import strips
from segfit.engine.task import Forward

_ALIGNED = 32  # networks halve a picture up to five times, and see the same pixels together only from such places on
_FADE = 6.0  # at the edge of a tile, levels are those of the neighbour to less than 1 in 10,000
_SETTLED = 2e-3  # means that move by less, of the largest, change pixels by about 1 in 100,000
_PASSES = 8  # over a picture's tiles, at most


class PictureMeans(TorchFunctionMode):
    """Replaces the averages that a network takes over a tile by those over the whole picture, from the pass before.

    The first pass keeps the tiles' own averages. Each pass makes one more of the network's averages exact, and those behind it better
    by far. `tile` is the first tile's longer side, `half` half of what neighbours share.
    """

    def __init__(self, tile: int, half: int) -> None:
        super().__init__()
        self.tile, self.half, self.at = tile, half, 0  # at: which average is next
        self.edges: list[tuple[bool, ...]] = []  # of a batch: whether there is a neighbour at each
        self.given: list[Tensor] = []  # (C,) float32 for each average, in the network's order
        self.sums: list[tuple[int, Tensor]] = []  # what `half` became, sums and a count (C + 1,)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what a function of torch returns, or the mean of the picture."""
        result = func(*args, **(kwargs or {}))  # synchronises where `func` does
        if func is not F.adaptive_avg_pool2d:
            return result
        height, width = args[0].shape[2:]
        if self.at == len(self.sums):
            cut = self.half * max(height, width) // self.tile
            self.sums.append((cut, result.new_zeros(result.shape[1] + 1, dtype=torch.float32)))
        cut, sums = self.sums[self.at]
        for one, (top, bottom, left, right) in zip(args[0], self.edges, strict=True):
            own = one[:, cut * top : height - cut * bottom, cut * left : width - cut * right]
            sums += F.pad(own.sum((1, 2), dtype=sums.dtype), (0, 1), value=own[0].numel())
        if self.given:
            result = self.given[self.at].to(result)[:, None, None].expand_as(result)
        self.at += 1
        return result


def restore(forward: Forward, picture: Tensor, tile: int, overlap: int, batch_size: int) -> Tensor:
    """Return a restored picture of one that is `(C, H, W)` float; waits for the device once a batch.

    `forward` takes `(B, C, H, W)` to the same shape, on any device. A picture with a side longer than `tile` pixels goes
    there in tiles, `batch_size` at once; it and the result stay where it is. Tiles have sides of multiples of 32, and
    neighbours share `overlap` pixels at least (half a tile at most), where they fade into one another. If the network averages over all that it
    sees, they go there again with the means of the picture, until these settle.
    """
    home, (height, width) = picture.device, picture.shape[-2:]
    if max(height, width) <= tile:
        return forward(picture[None])[0].to(home)
    tile = max(tile // _ALIGNED, 1) * _ALIGNED
    stride = max((tile - overlap) // _ALIGNED, 1) * _ALIGNED
    spans = [
        [(at, min(at + tile, side)) for at in range(0, max(side - tile + stride, 1), stride)]
        for side in (height, width)
    ]
    means = PictureMeans(tile, (tile - stride) // 2)

    def window(y: slice, x: slice) -> Tensor:
        means.edges.append((y.start > 0, y.stop < height, x.start > 0, x.stop < width))
        return picture[:, y, x]

    def through(tiles: Tensor) -> Tensor:
        with means:
            outputs = forward(tiles)
        means.edges, means.at = [], 0
        return outputs

    for _ in range(_PASSES):
        done = strips(through, window, *spans, batch_size=batch_size, home=home, fade=_FADE)
        restored, before = torch.cat(list(done), 1), means.given
        means.given, means.sums = [sums[:-1] / sums[-1] for _, sums in means.sums], []
        if len(before) == len(means.given) and not any(  # synchronises, once a pass
            (mean - old).abs().max() > _SETTLED * mean.abs().max()
            for old, mean in zip(before, means.given, strict=True)
        ):
            break
    return restored
