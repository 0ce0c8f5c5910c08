"""What an evaluation keeps of its predictions: masks, overlays, and the worst cases as pictures."""

import heapq
import io
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from segfit.engine.extra_metrics import ExtraMetric
from segfit.engine.findings import Column, Findings, Table
from segfit.errors import SegFitError
from segfit.report.evaluation import Evaluation
from segfit.tasks.segmentation.assembly import make_predictor, make_task
from segfit.tasks.segmentation.data.dataset import LabelledSource, PredictDataset
from segfit.tasks.segmentation.pictures import Panel, Picture, overlay, worst_cases_image
from segfit.tasks.segmentation.scores import image_scores
from segfit.tasks.segmentation.task import SegmentationTask

WORST, MASKS, OVERLAYS = "worst.png", "masks", "overlays"
_NAMES = ("per_class.csv", "confusion_matrix.png", "worst.csv", WORST, MASKS, OVERLAYS)
_THREADS = 4
_JPEG_QUALITY = 90


def make_evaluation(
    config: DictConfig,
    device: torch.device,
    options: DictConfig,
    path: Path,
    data: LabelledSource | PredictDataset,
    statistics: Mapping[str, Any] | None,
    extra: Sequence[ExtraMetric] = (),
) -> "MaskEvaluation":
    """Return what scores a run's predictions and writes them down.

    Args:
        config: the run's.
        device: where batches lie.
        options: of evaluate.py.
        path: the folder of the evaluation.
        data: a source with masks, or images without.
        statistics: of `make_statistics`; None: there are no masks.
        extra: of `make_extra_metrics`.
    """
    predictor = make_predictor(config, overlap=options.overlap, flip=options.flip)
    task = make_task(config, device, statistics, predictor=predictor, extra=extra)
    return MaskEvaluation(path, task, data, saves=options.save_masks, kept=options.worst)


class MaskEvaluation(Evaluation):
    """Keeps every prediction as a file, and those of the images with the lowest scores.

    Args:
        path: the folder.
        task: scores the batches.
        data: names and images by index.
        saves: whether masks and overlays are written.
        kept: how many of the worst are kept.
    """

    def __init__(
        self,
        path: Path,
        task: SegmentationTask,
        data: LabelledSource | PredictDataset,
        *,
        saves: bool,
        kept: int,
    ) -> None:
        self.classes, self.data = task.classes, data
        names, colors = self.classes.names, self.classes.colors
        facts = {"names": names, "colors": colors, "background": self.classes.background}
        super().__init__(path, replace(task, on_prediction=self._keep), {"classes": facts}, _NAMES)
        self.saves, self.kept = saves, kept
        self._palette = np.zeros((256, 3), np.uint8)
        self._palette[: len(colors)] = colors
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        # (-score, -index, prediction): the heap's first is the best of the worst, which is dropped first.
        self._heap: list[tuple[float, int, Picture]] = []

    def finish(self, result: Findings) -> Findings:
        """Wait until all predictions are written; add the worst images to the tables."""
        while self._pending:
            self._pending.popleft().result()
        if isinstance(self.data, PredictDataset):
            return Findings(seconds=result.seconds)
        ranked = sorted(self._heap, key=lambda item: item[:2], reverse=True)
        rows = [(self.data.id(-index), -score) for score, index, _ in ranked]
        if rows:
            panels = [
                Panel(self.data.id(-index), *self.data.read(-index), prediction)
                for _, index, prediction in ranked
            ]
            captions = [f"{name}: mIoU {score:.3f}" for name, score in rows]
            picture = Image.fromarray(worst_cases_image(panels, self.classes, captions))
            self.write(self.path / WORST, _encoded(picture, "PNG"))
            columns = Column("image"), Column("mIoU", ".3f")
            tables = [*result.tables, Table("worst", "Worst images", columns, rows)]
            result = replace(result, tables=tables)
        worst = [{"id": name, "miou": score} for name, score in rows]
        return super().finish(replace(result, values={**result.values, "worst": worst}))

    def close(self) -> None:
        """Release the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _image(self, index: int) -> Picture:
        """Return an image (H, W, 3) uint8 RGB at its original size."""
        if isinstance(self.data, PredictDataset):
            return self.data.reader(self.data.file(index))
        return self.data.read(index)[0]

    def _keep(self, index: int, prediction: Tensor, mask: Tensor | None) -> None:
        """Take a prediction; see `SegmentationTask.on_prediction`."""
        pixels: Picture | None = None
        if self.saves:
            pixels = _on_host(prediction)
            self._save(self.data.id(index), pixels, lambda: self._image(index))
        if mask is None or not self.kept:
            return
        # synchronises: only the predictions of the worst images are kept
        score = float(image_scores(prediction[None], mask[None], len(self.classes)))
        known = any(-index == other for _, other, _ in self._heap)  # repeated after out-of-memory
        if known or math.isnan(score):
            return
        if len(self._heap) == self.kept and (-score, -index) < self._heap[0][:2]:
            return
        item = (-score, -index, _on_host(prediction) if pixels is None else pixels)
        if len(self._heap) < self.kept:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def _save(self, name: str, mask: Picture, image: Callable[[], Picture]) -> None:
        """Write `masks/<name>.png` and `overlays/<name>.jpg`, in threads: encoding releases Python's lock.

        Raises:
            SegFitError: if an earlier one could not be written, or a name leads out of the folder.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path}.")
        files = (
            self.path / MASKS / f"{relative}.png",
            self.path / OVERLAYS / f"{relative}.jpg",
        )
        self._pending.append(self._pool.submit(self._encode, *files, mask, image))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()

    def _encode(
        self, mask_file: Path, overlay_file: Path, mask: Picture, image: Callable[[], Picture]
    ) -> None:
        indices = Image.fromarray(mask)
        indices.putpalette(self._palette.tobytes())
        self.write(mask_file, _encoded(indices, "PNG"))
        blended = Image.fromarray(overlay(image(), mask, self.classes))
        self.write(overlay_file, _encoded(blended, "JPEG", quality=_JPEG_QUALITY))


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _on_host(prediction: Tensor) -> Picture:
    return prediction.to(torch.uint8).cpu().numpy()  # synchronises
