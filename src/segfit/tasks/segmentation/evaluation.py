"""What an evaluation keeps of its predictions: masks, overlays, and the worst cases as pictures."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from segfit.engine.extra_metrics import ExtraMetric
from segfit.report.evaluation import BEST, WORST, PictureEvaluation
from segfit.tasks.segmentation.assembly import make_predictor, make_task
from segfit.tasks.segmentation.data.dataset import LabelledSource, PredictDataset
from segfit.tasks.segmentation.pictures import Panel, Picture, overlay, panels_image
from segfit.tasks.segmentation.scores import confusion_matrices, scores_of

MASKS, OVERLAYS = "masks", "overlays"
_NAMES = ("per_class.csv", "confusion_matrix.png", "worst.csv", WORST, BEST, MASKS, OVERLAYS)
_JPEG_QUALITY = 90


class MaskEvaluation(PictureEvaluation):
    """Scores a run's predictions; keeps each as a file, and shows the images with the lowest scores.

    Made as `TaskEvaluation.make_evaluation` says: of the run's config, its `statistics` and the options of evaluate.py.
    """

    sample, score = "image", ("miou", "mIoU", ".3f")

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        options: DictConfig,
        path: Path,
        data: LabelledSource | PredictDataset,
        statistics: Mapping[str, Any] | None,
        extra: Sequence[ExtraMetric] = (),
    ) -> None:
        predictor = make_predictor(config, overlap=options.overlap, flip=options.flip)
        task = make_task(config, device, statistics, predictor=predictor, extra=extra)
        self.classes, self.saves = task.classes, options.save_masks
        names, colors = self.classes.names, self.classes.colors
        facts = {"names": names, "colors": colors, "background": self.classes.background}
        super().__init__(
            path, replace(task, on_prediction=self._keep), {"classes": facts}, _NAMES,
            data=data, predicted=isinstance(data, PredictDataset), kept=options.worst,
        )  # fmt: skip
        self._palette = np.array(colors, np.uint8).tobytes().ljust(3 * 256, b"\0")

    def draw_cases(self, cases: Sequence[tuple[int, float, Picture]]) -> bytes:
        """Draw images beside their masks and predictions."""
        panels = [
            Panel(self.data.id(index), image, mask, pixels)
            for index, _, pixels in cases
            for image, mask in [self.data.read(index)]
        ]
        captions = [f"{self.data.id(index)}: mIoU {score:.3f}" for index, score, _ in cases]
        return _encoded(Image.fromarray(panels_image(panels, self.classes, captions)), "PNG")

    def _keep(self, index: int, prediction: Tensor, mask: Tensor | None) -> None:
        """Take a prediction; see `SegmentationTask.on_prediction`."""
        pixels = prediction.to(torch.uint8).cpu().numpy()  # synchronises
        if self.saves:
            self.submit(index, partial(self._save, index, pixels))
        if mask is None or not self.kept:
            return
        confusion = confusion_matrices(prediction[None], mask[None], len(self.classes))
        score = scores_of(confusion[0].cpu().numpy(), self.classes).scores["miou"]  # synchronises
        self.keep(index, score, lambda: pixels)

    def _save(self, index: int, mask: Picture, name: str) -> None:
        """Write `masks/<name>.png` and `overlays/<name>.jpg`."""
        indices = Image.fromarray(mask)
        indices.putpalette(self._palette)
        self.write(self.path / MASKS / f"{name}.png", _encoded(indices, "PNG"))
        blended = Image.fromarray(overlay(self.data.read(index)[0], mask, self.classes))
        content = _encoded(blended, "JPEG", quality=_JPEG_QUALITY)
        self.write(self.path / OVERLAYS / f"{name}.jpg", content)


make_evaluation = MaskEvaluation


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
