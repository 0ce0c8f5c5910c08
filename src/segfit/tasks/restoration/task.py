"""Image restoration: what a batch of degraded and clean pictures means to the loop, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from segfit.data.tiles import strips
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.task import Batch, Forward
from segfit.report.panels import Picture, draw_rows
from segfit.tasks.restoration.schema import MEMORY_ADVICE, ScoreConfig
from segfit.tasks.scored import ScoredMeter, ScoredTask

# Index of a held-out picture, how it was given, what was made of it, its target, all (C, H, W) float32 wherever they lie,
# its scores and the input's (2, K), and whether its file has 16 bits, not 8.
OnPicture = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None, bool], None]

_SMALLEST_TILE = 64  # pixels a side, where memory runs out
_ALIGNED = 32  # networks halve a picture up to five times, and see the same pixels together only from such places on
_SIDE = 256  # pixels of a picture that are shown, one to one
_SHOWN = 2  # screen pixels a side for each of them, in pictures that are smaller by as much
_AMPLIFIED = 5  # errors, to be seen
_FADE = 6.0  # at the edge of a tile, levels are those of the neighbour to less than 1 in 10,000
_SETTLED = 2e-3  # means that move by less, of the largest, change pixels by about 1 in 100,000
_PASSES = 8  # over a picture's tiles, at most


@dataclass(frozen=True)
class RestorationTask(ScoredTask):
    """Clean patches (B, C, P, P) or pairs in, scores of whole pictures out."""

    # (clean (B, C, H, W) float in [0, 1], seeds (B,) int64) → degraded, on the device of the batches
    degrade: Callable[[Tensor, Tensor], Tensor]
    scores: ScoreConfig
    tile: int  # held-out pictures with a longer side are restored in tiles of this side
    tiles_at_once: int
    device: torch.device  # of the batches
    channels_last: bool = True  # memory format of the model's input
    overlap: int = 64  # pixels that neighbouring tiles share
    flip: bool = False  # held-out pictures are the mean of eight turns and mirror images
    on_picture: OnPicture | None = None  # called with every held-out picture
    memory_advice: ClassVar[str] = MEMORY_ADVICE

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return degraded and clean patches (B, C, P, P) float32; the patches' own seeds decide what is random."""
        targets = scaled(batch["target"])
        given = "input" in batch
        inputs = scaled(batch["input"]) if given else self.degrade(targets, batch["seed"])
        return self.laid_out(inputs), self.laid_out(targets)

    def laid_out(self, pictures: Tensor) -> Tensor:
        """Return pictures (B, C, H, W) in the memory format of the model."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return pictures.contiguous(memory_format=layout)

    def meter(self) -> RestorationMeter:
        """Return a fresh collector of scores."""
        return RestorationMeter(self)


class RestorationMeter(ScoredMeter):
    """Restores whole pictures and scores them; docs/metrics.md is the contract."""

    def __init__(self, task: RestorationTask) -> None:
        from segfit.tasks.restoration import metrics  # torchmetrics: not before the first update

        super().__init__(task, metrics.RestorationMetrics(task.scores))
        self.tile = task.tile
        self.given = [extra.make() for extra in task.extra]  # of the inputs
        self.all_metrics += tuple(self.given)

    def count(self, forward: Forward, batch: Batch) -> None:
        """Restore and count pictures; those without targets are only restored."""
        task, metrics = self.task, self.metrics
        for row, index in enumerate(batch["index"].tolist()):  # synchronises, once a picture
            given, clean = batch["input"][row], batch["target"][row] if "target" in batch else None
            target, scores, (degraded, restored) = None, None, self._restored(forward, given)
            if clean is not None:
                target = scaled(clean.to(restored.device))  # synchronises where it was tiled
                metrics.to(restored.device)  # synchronises where the device changes
                before = metrics.sums.clone()
                metrics.update(restored[None], target[None], degraded[None])
                scores = (metrics.sums - before).float()
                self.update_extra(restored[None].clamp(0, 1), target[None])
                for extra, metric in zip(task.extra, self.given, strict=True):
                    metric.to(restored.device)  # synchronises where the device changes
                    extra.update(metric, degraded[None].clamp(0, 1), target[None])
                criterion = task.criterion.to(restored.device)  # synchronises where it was tiled
                loss = criterion(restored[None], target[None], criterion.totals(target[None]))
                task.criterion.to(task.device)  # synchronises where it was tiled
                self.add_loss(loss.to(task.device), 1)  # synchronises where it was tiled
                if index in task.panels:
                    self.panels[index] = task.panels[index], panel_of(degraded, restored, target)
            if task.on_picture is not None:
                deep = given if clean is None or not given.is_floating_point() else clean
                found = index, degraded, restored, target, scores
                task.on_picture(*found, deep.dtype == torch.uint16)

    def _restored(self, forward: Forward, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return a picture and what is made of it, (C, H, W) float32.

        Both lie in the host's memory if they are larger than a tile: the card holds the picture as it was read, and tiles.
        """
        task = self.task

        def on_device(pictures: Tensor) -> Tensor:
            return forward(task.laid_out(pictures.to(task.device)))  # synchronises for tiles

        while True:
            longest = max(given.shape[-2:])
            degraded = scaled(given if longest <= self.tile else given.cpu())  # synchronises
            overlap, count = min(task.overlap, self.tile // 2), task.tiles_at_once
            once = partial(restore, on_device, tile=self.tile, overlap=overlap, batch_size=count)
            try:
                return degraded, averaged(once, degraded) if task.flip else once(degraded)
            except Exception as error:
                if not is_out_of_memory(error) or self.tile <= _SMALLEST_TILE:
                    raise
            self.tile = max(_SMALLEST_TILE, min(self.tile, longest) // 2)
            release_memory()

    def result(self) -> Findings:
        """Return the scores; synchronises. `scores["loss"]` is the mean over pictures of the loss of the whole picture.

        Every process has to call, and gets the result of all their pictures. Every score of pictures without targets is
        NaN.
        """
        loss, added, panels = self.merged()
        found = self.metrics.means()
        for extra, metric in zip(self.task.extra, self.given, strict=True):
            before = extra.compute(metric, self.updates)
            added |= {f"{name}_gain": added[name] - before[name] for name in extra.names}
        columns = [Column("score"), *(Column(one, ".4f") for one in ("input", "restored", "gain"))]
        rows: list[list[Cell]] = [
            [name.upper(), found[name] - found[f"{name}_gain"], found[name], found[f"{name}_gain"]]
            for name in self.metrics.names
        ]
        return Findings(
            scores={"loss": loss, **found, **added},
            tables=[Table("scores", "", columns, rows)],
            panels={name: partial(draw_rows, [("", parts)]) for name, parts in panels},
        )


def averaged(forward: Forward, picture: Tensor) -> Tensor:
    """Return the mean of what is made of the eight turns and mirror images of a picture (C, H, W)."""

    def made(turns: int, mirrored: list[int]) -> Tensor:
        turned = forward(torch.rot90(picture, turns, (1, 2)).flip(mirrored))
        return torch.rot90(turned.flip(mirrored), -turns, (1, 2))

    return reduce(torch.add, (made(*way) for way in product(range(4), ([], [2])))) / 8


def scaled(pictures: Tensor) -> Tensor:
    """Return pictures of uint8 or uint16 as float32 in [0, 1]; others as they are."""
    given = pictures.is_floating_point()
    return pictures if given else pictures.float().div_(torch.iinfo(pictures.dtype).max)


class PictureMeans(TorchFunctionMode):
    """Gives a network that averages over all that it sees, and sees tiles, the means over the picture in the pass before.

    The first pass keeps the tiles' own. Each pass makes one more of the network's averages exact, and those behind it better
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
    neighbours share `overlap` pixels at least, where they fade into one another. If the network averages over all that it
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
        with means, torch.compiler.set_stance("force_eager"):  # compiled code averages by itself
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


def panel_of(degraded: Tensor, restored: Tensor, target: Tensor) -> dict[str, Picture]:
    """Return, title → (h, w, 3) uint8, the part of 256 × 256 pixels, or less, in which the restored picture is most wrong.

    Pictures are (C, H, W) float; the target lies in [0, 1].
    """
    error = (restored.clamp(0, 1) - target).abs().mean(0, keepdim=True)
    height, width = (min(side, _SIDE) for side in target.shape[-2:])
    step = _SIDE // 4
    means = F.avg_pool2d(error[None], (height, width), step)[0, 0]
    place = int(means.argmax())  # synchronises
    top, left = (step * steps for steps in divmod(place, means.shape[1]))
    area = (..., slice(top, top + height), slice(left, left + width))
    parts = {
        "input": degraded[area],
        "restored": restored[area],
        "target": target[area],
        f"error × {_AMPLIFIED}": _AMPLIFIED * error[area],
    }
    return {title: shown(part) for title, part in parts.items()}


def shown(part: Tensor) -> Picture:
    """Return (1 or 3, h, w) float as (h, w, 3) uint8, or twice as high and wide where it is small."""
    levels = part.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    scale = _SHOWN if max(part.shape) <= _SIDE // _SHOWN else 1
    return levels.permute(1, 2, 0).cpu().numpy().repeat(scale, 0).repeat(scale, 1)  # synchronises
