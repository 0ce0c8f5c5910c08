"""Image restoration: what a batch of degraded and clean pictures means to the loop, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
                criterion = task.criterion.to(restored.device)
                loss = criterion(restored[None], target[None], criterion.totals(target[None]))
                task.criterion.to(task.device)
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
        if task.flip:
            forward = partial(averaged, forward)

        def on_device(pictures: Tensor) -> Tensor:
            pictures = pictures.to(task.device)  # synchronises where they are tiles
            return forward(task.laid_out(pictures))

        while True:
            whole = max(given.shape[-2:]) <= self.tile
            degraded = scaled(given if whole else given.cpu())  # synchronises
            try:
                overlap = min(task.overlap, self.tile // 2)
                return degraded, restore(
                    on_device, degraded, self.tile, overlap, task.tiles_at_once
                )
            except Exception as error:
                if not is_out_of_memory(error) or self.tile <= _SMALLEST_TILE:
                    raise
            self.tile = max(_SMALLEST_TILE, min(self.tile, max(given.shape[-2:])) // 2)
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


def averaged(forward: Forward, pictures: Tensor) -> Tensor:
    """Return the mean of what is made of the eight turns and mirror images of pictures (B, C, H, W)."""

    def made(turns: int, mirrored: list[int]) -> Tensor:
        turned = forward(torch.rot90(pictures, turns, (2, 3)).flip(mirrored))
        return torch.rot90(turned.flip(mirrored), -turns, (2, 3))

    ways = product(range(4), ([], [3]))  # turns, and the axes that are mirrored
    return reduce(torch.add, (made(*way) for way in ways)) / 8


def scaled(pictures: Tensor) -> Tensor:
    """Return pictures of uint8 or uint16 as float32 in [0, 1]; others as they are."""
    if pictures.is_floating_point():
        return pictures
    return pictures.float().div_(torch.iinfo(pictures.dtype).max)


def restore(forward: Forward, picture: Tensor, tile: int, overlap: int, batch_size: int) -> Tensor:
    """Return a restored picture of one that is `(C, H, W)` float; waits for the device once a batch.

    `forward` takes `(B, C, H, W)` to the same shape, on any device. A picture with a side longer than `tile` pixels goes
    there in tiles, `batch_size` at once; it and the result stay where it is. Tiles have sides of multiples of 32, and
    neighbours share `overlap` pixels at least, where they fade into one another.
    """
    home, sides = picture.device, picture.shape[-2:]
    if max(sides) <= tile:
        return forward(picture[None])[0].to(home)
    spans = [list(_spans(side, tile, overlap)) for side in sides]
    done = strips(
        forward, lambda y, x: picture[:, y, x], *spans, batch_size=batch_size, home=home, fade=_FADE
    )
    return torch.cat(list(done), 1)


def _spans(side: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield where tiles along a side begin and end."""
    tile = max(tile // _ALIGNED, 1) * _ALIGNED
    stride = max((tile - overlap) // _ALIGNED, 1) * _ALIGNED
    for start in range(0, side, stride):
        yield start, min(start + tile, side)
        if start + tile >= side:
            return


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
