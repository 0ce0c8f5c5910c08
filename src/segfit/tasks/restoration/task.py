"""Image restoration: what a batch of degraded and clean pictures means to the loop, in tiles where they are large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.task import Batch, Forward
from segfit.report.panels import Picture, draw_rows
from segfit.tasks.restoration.schema import MEMORY_ADVICE, ScoreConfig
from segfit.tasks.restoration.tiles import restore
from segfit.tasks.scored import ScoredMeter, ScoredTask

# Index of a held-out picture, how it was given, what was made of it, its target, all (C, H, W) float32 wherever they lie,
# its scores and the input's (2, K), and whether its file has 16 bits, not 8.
OnPicture = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None, bool], None]

_SMALLEST_TILE = 64  # pixels a side, where memory runs out
_SIDE = 256  # pixels of a picture that are shown, one to one
_SHOWN = 2  # screen pixels a side for each of them, in pictures that are smaller by as much
_AMPLIFIED = 5  # errors, to be seen


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
