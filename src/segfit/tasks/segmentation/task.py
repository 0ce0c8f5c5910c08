"""Semantic segmentation: what a batch of images and masks means to the loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from segfit.data.tiles import LargeImage
from segfit.engine.findings import Findings
from segfit.engine.task import Batch, Forward
from segfit.system.hardware import fits
from segfit.tasks.scored import ScoredMeter, ScoredTask
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import Augment
from segfit.tasks.segmentation.data.masks import resize_mask
from segfit.tasks.segmentation.inference import Predictor, logits_at
from segfit.tasks.segmentation.pictures import Panel, confusion_figure, panels_image
from segfit.tasks.segmentation.schema import MEMORY_ADVICE
from segfit.tasks.segmentation.scores import score_table, scores_of

_PIXELS = 2**21  # of images that are counted at once: 40 bytes a pixel
# Logits whose losses are worked out at once: more than a CPU's cache holds are slower there, and each takes memory.
_LOGITS = {"cpu": 2**20, "cuda": 2**24}

OnPrediction = Callable[[int, Tensor, Tensor | None], None]
Shape = tuple[int, ...]
OnLogits = Callable[[int, Shape, int, Tensor], None]


@dataclass(frozen=True)
class SegmentationTask(ScoredTask):
    """Images (B, 3, H, W) uint8 and masks (B, H, W) uint8 in, scores out."""

    classes: Classes  # names, colours and background
    # Of RGB in 0-1, (3, 1, 1) on the device of the batches: every copy to CUDA makes the host wait.
    mean: Tensor
    std: Tensor
    augment: Augment | None = None  # (images in 0-1, masks int64, seed=) → the same
    mix: Augment | None = None  # (images, masks, seed=) → (images, targets)
    predictor: Predictor = field(default_factory=Predictor)  # how held-out images become logits
    channels_last: bool = True  # memory format of the model's input
    temperature: float = 1.0  # what logits are divided by before they become probabilities
    threshold: float | None = None  # of two classes: the second's probability that predicts it
    # Called with (index, prediction (H, W) uint8, mask (H, W) uint8) for every held-out image, both at its own size; the mask
    # is None where the batch has none.
    on_prediction: OnPrediction | None = None
    # Called before with (index, (H, W), row, logits (C, h, W) by temperature from that row on), from top to bottom.
    on_logits: OnLogits | None = None
    # Index of a held-out image that its batch does not hold → the image, which is read window by window.
    large: Callable[[int], LargeImage | None] = lambda _: None
    memory_advice: ClassVar[str] = MEMORY_ADVICE

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, 3, H, W) float32 and targets, augmented by `seed`."""
        images = batch["image"].float().div_(255)
        targets = batch["mask"].long()
        if self.augment is not None:
            images, targets = self.augment(images, targets, seed=seed)
        if self.mix is not None:
            images, targets = self.mix(images, targets, seed=seed + 1)
        return self.normalise(images), targets

    def normalise(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in 0-1 as the model wants them."""
        images = (images - self.mean) / self.std
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)

    def meter(self) -> "SegmentationMeter":
        """Return a fresh collector of scores."""
        return SegmentationMeter(self)


class SegmentationMeter(ScoredMeter):
    """Counts predictions at the masks' own sizes; see docs/metrics.md."""

    def __init__(self, task: SegmentationTask) -> None:
        from segfit.tasks.segmentation import metrics  # torchmetrics: not before the first update

        super().__init__(task, metrics.SegmentationMetrics(task.classes))
        self._inputs_of = metrics.inputs_of

    def count(self, forward: Forward, batch: Batch) -> None:
        """Predict and count a batch of `EvalDataset`; one of `PredictDataset`, without masks, is only predicted."""
        task, images, window = self.task, batch["image"], self.task.predictor.window

        def seen(pixels: Tensor) -> Tensor:
            return forward(task.normalise(pixels.float().div_(255)))

        logits = images[:0] if window else task.predictor(seen, images)
        where = torch.cat([batch["content"], batch["shape"], batch["index"][:, None]], dim=1)
        places = where.tolist()  # synchronises, once a batch: sizes differ from image to image
        for rows in _alike(places, 1 if window else _PIXELS):
            top, left, height, width, *shape, index = places[rows.start]
            area = (rows, ..., slice(top, top + height), slice(left, left + width))
            masks = batch["mask"][rows, : shape[0], : shape[1]] if "mask" in batch else None
            if window is None:
                contents = logits[area]
                strips = logits_at(contents, *shape)
            else:
                image = images[area][0] if images.numel() else task.large(index)
                assert image is not None  # an image without pixels is one of `large`
                strips = self._windows(seen, image, images.device, whole=masks is not None)
                if masks is not None:
                    contents = torch.cat(list(strips), 2)
                    strips = iter([contents])
            indices = [index for *_, index in places[rows]]
            predictions = self._predicted(indices, shape, strips)
            if masks is not None:
                # Synchronises, where the logits are on the host.
                masks = masks.to(predictions.device)
                for metric in self.all_metrics:
                    metric.to(predictions.device)  # synchronises, once a pass
                self.metrics.update(predictions, masks)
                small = resize_mask(masks, contents.shape[-2:])
                self._add_losses(contents, small, images.device)
            for row, index in enumerate(indices):
                prediction, mask = predictions[row], masks[row] if masks is not None else None
                if mask is not None:
                    for extra, metric in zip(task.extra, self.extra, strict=True):
                        inputs = self._inputs_of(extra, prediction.long(), mask, task.classes)
                        extra.update(metric, *inputs)
                    if index in task.panels:
                        self.panels[index] = Panel(  # synchronises
                            name=task.panels[index],
                            image=images[area][row].permute(1, 2, 0).cpu().numpy(),
                            mask=small[row].cpu().numpy(),
                            prediction=contents[row].argmax(0).to(torch.uint8).cpu().numpy(),
                        )
                if task.on_prediction is not None:
                    task.on_prediction(index, prediction, mask)

    def _windows(
        self, forward: Forward, image: Tensor | LargeImage, device: torch.device, *, whole: bool
    ) -> Iterator[Tensor]:
        """Yield logits (1, C, h, W); on the host if the device has no room for them, at once if they are wanted as a whole."""
        predictor, classes, (_, height, width) = self.task.predictor, self.task.classes, image.shape
        assert predictor.window is not None
        rows = height if whole else 2 * predictor.window[0]
        room = fits(12 * len(classes) * rows * width, device)  # float32, three at once
        home = device if room else torch.device("cpu")
        return (strip[None] for strip in predictor.windows(forward, image, device, home))

    def _predicted(
        self, indices: Sequence[int], shape: Sequence[int], strips: Iterator[Tensor]
    ) -> Tensor:
        """Return the classes (B, H, W) uint8 of images whose logits (B, C, h, W) come from top to bottom."""
        task, parts, top = self.task, list[Tensor](), 0
        for strip in strips:
            scaled = strip if task.temperature == 1 else strip / task.temperature
            if task.on_logits is not None:
                for index, one in zip(indices, scaled, strict=True):
                    task.on_logits(index, tuple(shape), top, one)
            if task.threshold is None:
                classes = strip.argmax(1)
            else:
                classes = scaled.softmax(1)[:, 1] > task.threshold
            parts.append(classes.to(torch.uint8))
            top += strip.shape[2]
        return torch.cat(parts, 1)

    def _add_losses(self, logits: Tensor, masks: Tensor, device: torch.device) -> None:
        """Add the losses of logits (B, C, h, w), each image's by itself, with masks of the model's size."""
        task, most = self.task, _LOGITS.get(logits.device.type, 2**20)
        task.criterion.to(logits.device)  # the host's, where the logits are there
        images = max(1, most // logits[0].numel())
        for part, truth in zip(logits.split(images), masks.split(images), strict=True):
            targets = truth.long()
            totals = task.criterion.totals(targets, each=True)
            counted = torch.stack([task.loss(part, targets, totals), (totals > 0).any(1)])
            self.losses = self.losses + counted.sum(1).to(device)
        task.criterion.to(device)
        self.updates += len(masks)

    def result(self) -> Findings:
        """Synchronises; `scores["loss"]` is the mean over images with a pixel that counts of the loss at the model's size.

        Every process has to call, and gets the result of all their images. Without masks, every score is NaN.
        """
        loss, added, panels = self.merged()
        classes = self.task.classes
        found = scores_of(self.metrics.confusion.numpy(), classes)
        return Findings(
            scores={"loss": loss, **found.scores, **added},
            tables=[score_table(found, classes)],
            values={"per_class": found.per_class, "confusion": found.confusion},
            figures={"confusion_matrix": partial(confusion_figure, found.confusion, classes)},
            scalars={f"score_iou/{name}": iou for name, iou in found.per_class["iou"].items()},
            panels={panel.name: partial(panels_image, [panel], classes) for panel in panels},
        )


def _alike(places: list[list[int]], pixels: int) -> Iterator[slice]:
    """Yield the rows of a batch whose images follow each other with one size, but for the index that ends a place."""
    first = 0
    for place, group in groupby(places, key=lambda place: place[:-1]):
        last = first + len(list(group))
        most = max(1, pixels // math.prod(place[-2:]))
        yield from (slice(start, min(start + most, last)) for start in range(first, last, most))
        first = last
