"""What an evaluation keeps of its predictions: masks, overlays, and the worst cases as pictures."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from segfit.data.images import folder_of
from segfit.data.tiles import is_large
from segfit.engine.findings import Findings
from segfit.engine.task import Task
from segfit.report.evaluation import BEST, WORST, PictureEvaluation
from segfit.report.panels import Picture, encoded
from segfit.system.files import reporting
from segfit.tasks.segmentation import scores
from segfit.tasks.segmentation.assembly import make_predict_dataset, make_predictor
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.data.dataset import LabelledSource, PredictDataset
from segfit.tasks.segmentation.export import make_exported
from segfit.tasks.segmentation.pictures import Panel, overlay, panels_image
from segfit.tasks.segmentation.task import SegmentationTask, Shape

__all__ = ["make_exported"]

_FITTED = 2**24  # numbers, logits of a split, that a temperature is fitted on at the most
MASKS, OVERLAYS = "masks", "overlays"
SHARES = "probabilities"
_TABLES = ("per_class.csv", "temperature.csv", "confusion_matrix.png", "worst.csv")
_NAMES = (*_TABLES, WORST, BEST, MASKS, OVERLAYS, SHARES)
_JPEG_QUALITY = 90


class MaskEvaluation(PictureEvaluation):
    """Scores a run's predictions; keeps each as a file, and shows the images with the lowest scores.

    Made as `TaskEvaluation.make_evaluation` says: of the run's config, its `statistics` and the options of evaluate.py.
    """

    sample, score = "image", ("miou", "mIoU", ".3f")

    def __init__(
        self,
        config: DictConfig,
        task: SegmentationTask,
        options: DictConfig,
        path: Path,
        data: LabelledSource | PredictDataset,
    ) -> None:
        task = replace(_with_options(task, config, options), on_prediction=self._keep)
        self.classes, self.saves = task.classes, options.save_masks
        self.boundary = options.metrics.boundary
        self._kind = {None: "", "False": "", "uint8": "uint8"}.get(options.probabilities, "float16")
        self._fits = options.temperature == "fit"
        # Index of an image that is being predicted → of each strip how sure it is of what, and some logits.
        self._strips: dict[int, list[list[NDArray[Any]]]] = {}
        self._sampled: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}  # logits (N, C), labels
        if isinstance(data, PredictDataset):
            task = replace(task, large=data.large)
        if self._kind or not isinstance(data, PredictDataset):
            task = replace(task, on_logits=self._take_logits)
        super().__init__(
            path, task, {"classes": asdict(self.classes)}, _NAMES,
            data=data, predicted=isinstance(data, PredictDataset), kept=options.worst,
        )  # fmt: skip
        self._palette = np.array(self.classes.colors, np.uint8).tobytes().ljust(3 * 256, b"\0")

    def draw_cases(self, cases: Sequence[tuple[int, float, Picture]]) -> bytes:
        """Draw images beside their masks and predictions."""
        panels = [
            Panel(self.data.id(index), image, mask, pixels)
            for index, _, pixels in cases
            for image, mask in [self.data.read(index)]
        ]
        captions = [f"{self.data.id(index)}: mIoU {score:.3f}" for index, score, _ in cases]
        return encoded(panels_image(panels, self.classes, captions))

    def _keep(self, index: int, prediction: Tensor, mask: Tensor | None) -> None:
        """Take a prediction; see `SegmentationTask.on_prediction`."""
        pixels = prediction.to(torch.uint8).cpu().numpy()  # synchronises
        if self.saves:
            self.submit(index, partial(self._save, index, pixels))
        if mask is None:
            return
        confusion = scores.confusion_matrices(prediction[None], mask[None], len(self.classes))
        sums, truth = scores.sums_of(confusion[0].cpu().numpy()), mask.cpu().numpy()  # synchronises
        strips = zip(*self._strips.pop(index), strict=True)
        sure, guess, logits = (np.concatenate(parts) for parts in strips)
        valid = truth != IGNORE_INDEX
        gaps = scores.calibration_gaps(sure[valid], (guess == truth)[valid])
        counts: list[NDArray[Any]] = [sums.ravel(), gaps]
        if self.boundary is not None:
            near = scores.boundary_counts(pixels, truth, self.classes, self.boundary)
            counts.append(near.ravel())
        self.counts[index], self.truths[index] = np.concatenate(counts), sums[1]
        if self._fits:
            self._sampled[index] = logits, truth.ravel()[:: self._every(truth.shape)]
        self.keep(index, float(scores.scores_of_sums(sums, self.classes)["miou"]), lambda: pixels)

    def scores_of(self, sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        """Return `SCORES`, the calibration error, and `boundary_scores` if they are asked for."""
        width = len(self.classes)
        pixels, gaps, boundary = np.split(sums, [3 * width, 3 * width + scores.BINS], 1)
        pixels = pixels.reshape(-1, 3, width)
        found = scores.scores_of_sums(pixels, self.classes)
        found["calibration_error"] = scores.share(np.abs(gaps), pixels[:, 1])
        if self.boundary is not None:
            boundary = boundary.reshape(-1, 6, width)
            found |= scores.boundary_scores(boundary, pixels[:, 1] > 0)
        return found

    def finish(self, result: Findings) -> Findings:
        """Fit the temperature, if that is asked for, and write what is left; see `Evaluation.finish`."""
        if self._fits:
            samples = zip(*(self._sampled[index] for index in sorted(self._sampled)), strict=True)
            parts = (torch.from_numpy(np.concatenate(part)) for part in samples)
            temperature, table = scores.fit_temperature(*parts)
            values = {**result.values, "temperature": temperature}
            result = replace(result, tables=[*result.tables, table], values=values)
        return super().finish(result)

    def _every(self, shape: Shape) -> int:
        """Return which pixels of an image the temperature is fitted on: every so many."""
        return math.ceil(len(self.data) * len(self.classes) * math.prod(shape) / _FITTED)

    def _take_logits(self, index: int, shape: Shape, row: int, logits: Tensor) -> None:
        """Take a strip of logits; see `SegmentationTask.on_logits`."""
        shares = logits.softmax(0)
        if self._kind:
            self._save_shares(index, shape, row, shares.cpu().numpy())  # synchronises
        if self.predicted:
            return
        sure, guess = shares.max(0)
        every, before = self._every(shape), row * shape[1]
        some = logits.flatten(1)[:, -before % every :: every].T if self._fits else logits[:0, 0]
        strip = [part.cpu().numpy() for part in (sure, guess.to(torch.uint8), some)]  # synchronises
        self._strips[index] = [*(self._strips[index] if row else ()), strip]

    def _save_shares(self, index: int, shape: Shape, row: int, shares: NDArray[np.float32]) -> None:
        """Write a strip of `probabilities/<name>.npy`."""
        path, whole = self.path / SHARES / f"{self.name_of(index)}.npy", (len(shares), *shape)
        how = {"mode": "r+"} if row else {"mode": "w+", "dtype": self._kind, "shape": whole}
        with reporting(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            strip = np.rint(255 * shares) if self._kind == "uint8" else shares
            np.lib.format.open_memmap(path, **how)[:, row : row + shares.shape[1]] = strip
        self.wrote.add(SHARES)

    def _save(self, index: int, mask: Picture, name: str) -> None:
        """Write `masks/<name>.png` and `overlays/<name>.jpg`; of what is too large for Pillow, `masks/<name>.tif`."""
        if is_large(mask.size):
            tifffile.imwrite(buffer := io.BytesIO(), mask, compression="zlib", tile=(256, 256))
            self.write(self.path / MASKS / f"{name}.tif", buffer.getvalue())
            return
        indices = Image.fromarray(mask)
        indices.putpalette(self._palette)
        self.write(self.path / MASKS / f"{name}.png", encoded(indices))
        blended = overlay(self.data.read(index)[0], mask, self.classes)
        content = encoded(blended, "jpeg", quality=_JPEG_QUALITY)
        self.write(self.path / OVERLAYS / f"{name}.jpg", content)


make_evaluation = MaskEvaluation


class Prediction(NamedTuple):
    """What a run says of an image."""

    mask: Picture  # (H, W) uint8, indices of `class_names`
    probabilities: NDArray[np.float32]  # (num_classes, H, W)
    class_names: tuple[str, ...]


def predict(
    config: DictConfig,
    task: SegmentationTask,
    options: DictConfig,
    inputs: Sequence[Any],
    go: Callable[[Task, Any], None],
) -> list[Prediction]:
    """Return the predictions of images, as `TaskEvaluation.predict` says."""
    found: dict[int, Prediction] = {}
    parts: dict[int, list[NDArray[np.float32]]] = {}

    def take_logits(index: int, _: Shape, row: int, logits: Tensor) -> None:
        shares = logits.softmax(0).cpu().numpy()  # synchronises
        parts[index] = [*(parts[index] if row else ()), shares]

    def take(index: int, prediction: Tensor, _: Tensor | None) -> None:
        shares = np.concatenate(parts.pop(index), 1)
        found[index] = Prediction(prediction.cpu().numpy(), shares, task.classes.names)

    task = replace(_with_options(task, config, options), on_logits=take_logits, on_prediction=take)
    with folder_of(inputs, bands=bool(config.data.get("bands"))) as folder:
        dataset = make_predict_dataset(config, folder)
        go(replace(task, large=dataset.large), dataset)
    return [found[index] for index in sorted(found)]


def _with_options(
    task: SegmentationTask, config: DictConfig, options: DictConfig
) -> SegmentationTask:
    """Return a run's task with the options of evaluate.py."""
    predictor = make_predictor(config, overlap=options.overlap, flip=options.flip)
    return replace(task, predictor=predictor, threshold=options.threshold)
