"""What an evaluation keeps of its predictions: masks, overlays, and the worst cases as pictures."""

import io
import math
from collections import deque
from collections.abc import Mapping, Sequence
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
from segfit.tasks.segmentation.pictures import Panel, Picture, overlay, panels_image
from segfit.tasks.segmentation.scores import confusion_matrices, scores_of

WORST, MASKS, OVERLAYS = "worst.png", "masks", "overlays"
_NAMES = ("per_class.csv", "confusion_matrix.png", "worst.csv", WORST, MASKS, OVERLAYS)
_THREADS = 4
_JPEG_QUALITY = 90


class MaskEvaluation(Evaluation):
    """Scores a run's predictions; keeps each as a file, and shows the images with the lowest scores.

    Made as `TaskEvaluation.make_evaluation` says: of the run's config, its `statistics` and the options of evaluate.py.
    """

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
        self.classes, self.data = task.classes, data
        self.saves, self.kept = options.save_masks, options.worst
        names, colors = self.classes.names, self.classes.colors
        facts = {"names": names, "colors": colors, "background": self.classes.background}
        super().__init__(path, replace(task, on_prediction=self._keep), {"classes": facts}, _NAMES)
        self._palette = np.array(colors, np.uint8).tobytes().ljust(3 * 256, b"\0")
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        self._worst: dict[int, tuple[float, Picture]] = {}  # index → mIoU, prediction

    def finish(self, result: Findings) -> Findings:
        """Wait until all predictions are written; add the worst images to the tables."""
        while self._pending:
            self._pending.popleft().result()
        if isinstance(self.data, PredictDataset):
            return Findings(seconds=result.seconds)
        ranked = sorted(self._worst, key=self._rank)
        rows = [(self.data.id(index), self._worst[index][0]) for index in ranked]
        if rows:
            panels = [
                Panel(self.data.id(index), *self.data.read(index), self._worst[index][1])
                for index in ranked
            ]
            captions = [f"{name}: mIoU {score:.3f}" for name, score in rows]
            picture = Image.fromarray(panels_image(panels, self.classes, captions))
            self.write(self.path / WORST, _encoded(picture, "PNG"))
            columns = Column("image"), Column("mIoU", ".3f")
            tables = [*result.tables, Table("worst", "Worst images", columns, rows)]
            result = replace(result, tables=tables)
        worst = [{"id": name, "miou": score} for name, score in rows]
        return super().finish(replace(result, values={**result.values, "worst": worst}))

    def close(self) -> None:
        """Release the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _keep(self, index: int, prediction: Tensor, mask: Tensor | None) -> None:
        """Take a prediction; see `SegmentationTask.on_prediction`."""
        pixels = prediction.to(torch.uint8).cpu().numpy()  # synchronises
        if self.saves:
            self._save(index, pixels)
        if mask is None or not self.kept:
            return
        confusion = confusion_matrices(prediction[None], mask[None], len(self.classes))
        score = scores_of(confusion[0].cpu().numpy(), self.classes).scores["miou"]  # synchronises
        if not math.isnan(score):
            self._worst[index] = score, pixels
        if len(self._worst) > self.kept:
            del self._worst[max(self._worst, key=self._rank)]

    def _rank(self, index: int) -> tuple[float, int]:
        return self._worst[index][0], index

    def _save(self, index: int, mask: Picture) -> None:
        """Write `masks/<name>.png` and `overlays/<name>.jpg`, in threads: encoding releases Python's lock.

        Raises:
            SegFitError: if an earlier one could not be written, or a name leads out of the folder.
        """
        name = PurePosixPath(self.data.id(index))
        if name.is_absolute() or ".." in name.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path}.")
        self._pending.append(self._pool.submit(self._encode, f"{name}", index, mask))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()

    def _encode(self, name: str, index: int, mask: Picture) -> None:
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
