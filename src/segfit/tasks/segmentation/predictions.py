"""What an evaluation keeps of its predictions: a file each, and the worst ones for the eye."""

import heapq
import math
from collections.abc import Callable

import torch
from torch import Tensor

from segfit.tasks.segmentation.data.dataset import LabelledSource
from segfit.tasks.segmentation.files import EvaluationFolder
from segfit.tasks.segmentation.pictures import Panel, Picture
from segfit.tasks.segmentation.scores import image_scores


class Predictions:
    """Takes every prediction: to the folder, and to the worst ones if it is one of them.

    Args:
        out: where masks and overlays go.
        name: index → id.
        image: index → image (H, W, 3) uint8 RGB at its original size.
        num_classes: C.
        saves: whether masks and overlays are written.
        kept: how many of the worst are kept.
    """

    def __init__(
        self,
        out: EvaluationFolder,
        name: Callable[[int], str],
        image: Callable[[int], Picture],
        num_classes: int,
        *,
        saves: bool,
        kept: int,
    ) -> None:
        self.out, self.name, self.image = out, name, image
        self.num_classes, self.saves, self.kept = num_classes, saves, kept
        # (-score, -index, prediction): the heap's first is the best of the worst, which goes first.
        self._heap: list[tuple[float, int, Picture]] = []

    def __call__(self, index: int, prediction: Tensor, mask: Tensor | None) -> None:
        """Take one; see `SegmentationTask.on_prediction`."""
        pixels: Picture | None = None
        if self.saves:
            pixels = _on_host(prediction)
            self.out.save_prediction(self.name(index), pixels, lambda: self.image(index))
        if mask is None or not self.kept:
            return
        # synchronises: which images are the worst has to be known to keep no more predictions than theirs
        score = float(image_scores(prediction[None], mask[None], self.num_classes))
        known = any(
            -index == other for _, other, _ in self._heap
        )  # a batch is done again when memory ran out
        if known or math.isnan(score):
            return
        if len(self._heap) == self.kept and (-score, -index) < self._heap[0][:2]:
            return
        item = (-score, -index, _on_host(prediction) if pixels is None else pixels)
        if len(self._heap) < self.kept:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def worst(self) -> list[tuple[int, float, Picture]]:
        """Return (index, score, prediction) of the images with the lowest score, the worst first."""
        ranked = sorted(self._heap, key=lambda item: item[:2], reverse=True)
        return [(-index, -score, prediction) for score, index, prediction in ranked]

    def worst_panels(self, source: LabelledSource) -> tuple[list[Panel], list[str]]:
        """Return the worst images beside their masks, and a caption each."""
        panels, captions = [], []
        for index, score, prediction in self.worst():
            panels.append(Panel(source.id(index), *source.read(index), prediction))
            captions.append(f"{source.id(index)}: mIoU {score:.3f}")
        return panels, captions


def _on_host(prediction: Tensor) -> Picture:
    return prediction.to(torch.uint8).cpu().numpy()  # synchronises
