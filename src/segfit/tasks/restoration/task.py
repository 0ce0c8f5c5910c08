"""Image restoration: what a batch of degraded and clean pictures means to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.extra_metrics import ExtraMetric, merge, state_of
from segfit.engine.extra_metrics import restore as reset
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.task import Batch, Forward
from segfit.tasks.restoration.losses import RestorationLoss
from segfit.tasks.restoration.pictures import Panel, draw, panel_of
from segfit.tasks.restoration.schema import MEMORY_ADVICE
from segfit.tasks.restoration.tiles import restore

# Index of a held-out picture, how it was given, what was made of it, its target, all (C, H, W) float32 wherever they lie,
# its scores and the input's (2, K), and whether its file has 16 bits, not 8.
OnPicture = Callable[[int, Tensor, Tensor, Tensor | None, Tensor | None, bool], None]

_SMALLEST_TILE = 64  # pixels a side, where memory runs out


@dataclass(frozen=True)
class RestorationTask:
    """Clean patches (B, C, P, P) or pairs in, scores of whole pictures out."""

    criterion: RestorationLoss  # on the device of the batches
    # (clean (B, C, H, W) float in [0, 1], seeds (B,) int64) → degraded, on the device of the batches
    degrade: Callable[[Tensor, Tensor], Tensor]
    scores: Mapping[str, Any]  # arguments of `RestorationMetrics`; "lpips" is a network's name
    tile: int  # held-out pictures with a longer side are restored in tiles of this side
    tiles_at_once: int
    device: torch.device  # of the batches
    channels_last: bool = True  # memory format of the model's input
    overlap: int = 64  # pixels that neighbouring tiles share
    flip: bool = False  # held-out pictures are the mean of eight turns and mirror images
    panels: Mapping[int, str] = field(default_factory=dict)  # pictures to show, index → name
    on_picture: OnPicture | None = None  # called with every held-out picture
    distributed: Distributed = SINGLE_PROCESS  # the processes whose sums make up the scores
    extra: Sequence[ExtraMetric] = ()  # metrics whose results join the scores
    memory_advice: ClassVar[str] = MEMORY_ADVICE

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return degraded and clean patches (B, C, P, P) float32; the patches' own seeds decide what is random."""
        targets = scaled(batch["target"])
        inputs = (
            scaled(batch["input"]) if "input" in batch else self.degrade(targets, batch["seed"])
        )
        return self.laid_out(inputs), self.laid_out(targets)

    def laid_out(self, pictures: Tensor) -> Tensor:
        """Return pictures (B, C, H, W) in the memory format of the model."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return pictures.contiguous(memory_format=layout)

    def totals(self, targets: Tensor) -> Tensor:
        """Return the denominators of the loss's K terms, (K,) float32."""
        return self.criterion.totals(targets)

    def loss(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss (); sums run in fp32 whatever the forward pass ran in."""
        value: Tensor = self.criterion(outputs, targets, totals)
        return value

    def split(self, inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut patches into pieces of at most `size`."""
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def meter(self) -> RestorationMeter:
        """Return a fresh collector of scores."""
        return RestorationMeter(self)


class RestorationMeter:
    """Restores whole pictures and scores them; docs/restoration.md is the contract."""

    def __init__(self, task: RestorationTask) -> None:
        from segfit.tasks.restoration import metrics  # torchmetrics: not before the first update

        self.task = task
        lpips = task.scores["lpips"] and metrics.lpips_network(task.scores["lpips"])
        self.metrics = metrics.RestorationMetrics(**{**task.scores, "lpips": lpips})
        self.extra = [extra.make() for extra in task.extra]
        self.all_metrics = (self.metrics, *self.extra)
        self.loss = torch.zeros((), device=task.device)
        self.pictures = 0
        self.tile = task.tile
        self.panels: dict[int, Panel] = {}

    def update(self, forward: Forward, batch: Batch) -> None:
        """Restore and count pictures; those without targets are only restored.

        If it raises, nothing of the batch is counted; `on_picture` may have been called.
        """
        loss, pictures = self.loss, self.pictures
        states = [state_of(metric) for metric in self.all_metrics]
        try:
            for row, index in enumerate(batch["index"].tolist()):  # synchronises, once a picture
                target = batch["target"][row] if "target" in batch else None
                self._update(forward, index, batch["input"][row], target)
        except Exception:
            self.loss, self.pictures = loss, pictures
            for metric, state in zip(self.all_metrics, states, strict=True):
                reset(metric, state)
            raise

    def _update(self, forward: Forward, index: int, given: Tensor, clean: Tensor | None) -> None:
        task, target, scores = self.task, None, None
        degraded, restored = self._restored(forward, given)
        if clean is not None:
            target = scaled(clean.to(restored.device))  # synchronises where it was tiled
            self.metrics.to(restored.device)  # synchronises where the device changes
            before = self.metrics.sums.clone()
            self._count(restored[None], target[None], degraded[None])
            scores = (self.metrics.sums - before).float()
            if index in task.panels:
                self.panels[index] = panel_of(task.panels[index], degraded, restored, target)
        if task.on_picture is not None:
            deep = (given if clean is None or not given.is_floating_point() else clean).dtype
            task.on_picture(index, degraded, restored, target, scores, deep == torch.uint16)

    def _restored(self, forward: Forward, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return a picture and what is made of it, (C, H, W) float32.

        Both lie in the host's memory if they are larger than a tile: the card holds the picture as it was read, and tiles.
        """
        task = self.task
        if task.flip:
            forward = partial(averaged, forward)
        while True:
            whole = max(given.shape[-2:]) <= self.tile
            degraded = scaled(given if whole else given.cpu())  # synchronises
            try:
                return degraded, restore(
                    lambda pictures: forward(task.laid_out(pictures)),
                    degraded,
                    tile=self.tile,
                    overlap=min(task.overlap, self.tile // 2),
                    batch_size=task.tiles_at_once,
                    device=task.device,
                )
            except Exception as error:
                if not is_out_of_memory(error) or self.tile <= _SMALLEST_TILE:
                    raise
            self.tile = max(_SMALLEST_TILE, min(self.tile, max(given.shape[-2:])) // 2)
            release_memory()

    def _count(self, restored: Tensor, target: Tensor, degraded: Tensor) -> None:
        """Add a picture (1, C, H, W) to the scores."""
        for metric in self.all_metrics:
            metric.to(restored.device)  # synchronises, once a pass
        self.metrics.update(restored, target, degraded)
        for extra, metric in zip(self.task.extra, self.extra, strict=True):
            extra.update(metric, restored.clamp(0, 1), target)
        criterion = self.task.criterion.to(restored.device)
        loss = criterion(restored, target, criterion.totals(target))
        self.task.criterion.to(self.task.device)
        self.loss = self.loss + loss.to(self.task.device)  # synchronises where it was tiled
        self.pictures += 1

    def result(self) -> Findings:
        """Return the scores; synchronises. `scores["loss"]` is the mean over pictures of the loss of the whole picture.

        Every process has to call, and gets the result of all their pictures. Every score of pictures without targets is
        NaN.
        """
        own = [state_of(metric.cpu()) for metric in self.all_metrics]
        every = self.task.distributed.gather((own, float(self.loss), self.pictures, self.panels))
        pictures = sum(count for _, _, count, _ in every)
        counted = [states for states, _, count, _ in every if count]
        for metric, *states in zip(self.all_metrics, *counted, strict=True):
            merge(metric, states)
        added: dict[str, float] = {}
        for extra, metric in zip(self.task.extra, self.extra, strict=True):
            added |= extra.compute(metric, pictures)
        loss = sum(part for _, part, _, _ in every) / pictures if pictures else float("nan")
        names = self.metrics.names
        nothing = dict.fromkeys((*names, *(f"{name}_gain" for name in names)), float("nan"))
        found: dict[str, float] = self.metrics.compute() if pictures else nothing
        columns = [Column("score"), *(Column(one, ".4f") for one in ("input", "restored", "gain"))]
        rows: list[list[Cell]] = [
            [name.upper(), found[name] - found[f"{name}_gain"], found[name], found[f"{name}_gain"]]
            for name in names
        ]
        panels = {index: panel for *_, kept in every for index, panel in kept.items()}
        return Findings(
            scores={"loss": loss, **found, **added},
            tables=[Table("scores", "", columns, rows)],
            panels={panel.name: partial(draw, [panel]) for _, panel in sorted(panels.items())},
        )


def averaged(forward: Forward, pictures: Tensor) -> Tensor:
    """Return the mean of what is made of the eight turns and mirror images of pictures (B, C, H, W)."""
    total = torch.zeros(())
    for turns, mirrored in product(range(4), (False, True)):
        turned = torch.rot90(pictures, turns, (2, 3))
        made = forward(turned.flip(3) if mirrored else turned)
        total = total.to(made.device) + torch.rot90(
            made.flip(3) if mirrored else made, -turns, (2, 3)
        )
    return total / 8


def scaled(pictures: Tensor) -> Tensor:
    """Return pictures of uint8 or uint16 as float32 in [0, 1]; others as they are."""
    if pictures.is_floating_point():
        return pictures
    return pictures.float().div_(torch.iinfo(pictures.dtype).max)
