"""What an evaluation keeps of its pictures, what Python gets of them, and the model as a program without SegFit."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.data.images import folder_of
from segfit.engine.task import Task
from segfit.models.build import Exported, for_inference
from segfit.report.evaluation import BEST, WORST, PictureEvaluation
from segfit.report.panels import Picture, draw_rows
from segfit.tasks.restoration.assembly import degraded_by, make_predict_dataset
from segfit.tasks.restoration.data.dataset import PredictDataset
from segfit.tasks.restoration.data.folder import Pixels, png
from segfit.tasks.restoration.schema import channels_of
from segfit.tasks.restoration.task import RestorationTask, panel_of

RESTORED = "restored"
Go = Callable[[Task, Any], None]  # lets a task see the samples of a dataset
_NAMES = ("scores.csv", "worst.csv", WORST, BEST, RESTORED)


class RestoredEvaluation(PictureEvaluation):
    """Keeps every restored picture as a PNG of its input's depth, and a part of those with the lowest PSNR.

    Made as `TaskEvaluation.make_evaluation` says: of the run's config and the options of evaluate.py.
    """

    sample, score = "picture", ("psnr", "PSNR", ".2f")

    def __init__(
        self, config: DictConfig, task: RestorationTask, options: DictConfig, path: Path, data: Any
    ) -> None:
        task = replace(task, overlap=options.overlap, flip=options.flip, on_picture=self._keep)
        predicted = isinstance(data, PredictDataset)
        scores = {key: one for key, one in config.metrics.items() if key != "extra"}
        facts = {"degraded_by": degraded_by(config), "metrics": scores}
        super().__init__(
            path, task, {} if predicted else facts, _NAMES,
            data=data, predicted=predicted, kept=options.worst,
        )  # fmt: skip
        self.saves = options.save_images

    def draw_cases(self, cases: Sequence[tuple[int, float, Mapping[str, Picture]]]) -> bytes:
        """Draw inputs beside restored pictures, targets and errors."""
        rows = [(f"{self.data.id(index)}: {psnr:.2f} dB", parts) for index, psnr, parts in cases]
        return png(draw_rows(rows))

    def _keep(
        self, index: int, degraded: Tensor, restored: Tensor, target: Tensor | None,
        scores: Tensor | None, deep: bool,
    ) -> None:  # fmt: skip
        """Take a restored picture; see `RestorationTask.on_picture`."""
        if self.saves:
            self.submit(index, partial(self._save, _pixels(restored, deep=deep)))
        if target is None or scores is None:
            return
        found = scores.cpu().numpy()  # synchronises
        self.counts[index] = np.concatenate([found[0], found[0] - found[1], [1]])
        self.truths[index] = found[1]  # the scores of the input
        self.keep(index, float(found[0, 0]), lambda: panel_of(degraded, restored, target))

    def scores_of(self, sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        """Return means over pictures of scores and gains."""
        names = ("psnr", "ssim", "lpips")[: sums.shape[1] // 2]
        keys = (*names, *(f"{name}_gain" for name in names))
        return dict(zip(keys, (sums[:, :-1] / sums[:, -1:]).T, strict=True))

    def _save(self, pixels: Pixels, name: str) -> None:
        self.write(self.path / RESTORED / f"{name}.png", png(pixels))


make_evaluation = RestoredEvaluation


def predict(
    config: DictConfig, task: RestorationTask, options: DictConfig, inputs: Sequence[Any], go: Go
) -> list[Pixels]:
    """Return restored pictures, as `TaskEvaluation.predict` says."""
    found: dict[int, Pixels] = {}

    def take(index: int, _: Tensor, restored: Tensor, __: Any, ___: Any, deep: bool) -> None:
        pixels = _pixels(restored, deep=deep)
        found[index] = pixels if pixels.shape[2] > 1 else pixels[..., 0]

    task = replace(task, overlap=options.overlap, flip=options.flip, on_picture=take)
    with folder_of(inputs) as folder:
        go(task, make_predict_dataset(config, folder))
    return [found[index] for index in sorted(found)]


def _pixels(restored: Tensor, *, deep: bool) -> Pixels:
    """Return a picture (H, W, C) uint8, or `deep` uint16, of one that is (C, H, W) float; synchronises."""
    kind = np.uint16 if deep else np.uint8
    levels = restored.clamp(0, 1).mul(np.iinfo(kind).max).round()
    return levels.permute(1, 2, 0).cpu().numpy().astype(kind)


class Deployed(nn.Module):
    """A model for pictures of any size, with its results in [0, 1]."""

    def __init__(self, model: nn.Module, multiple: int) -> None:
        super().__init__()
        self.model, self.multiple = model, multiple

    def forward(self, images: Tensor) -> Tensor:
        """Return restored pictures `(B, C, H, W)` float32 in [0, 1] of degraded ones of the same shape."""
        sides = dict(zip((-2, -1), images.shape[-2:], strict=True))
        # The model's own margin, by indices: torch.export would guard on what padding does to the size.
        for axis, side in sides.items():
            # ONNX rounds the division of a negative number up: not -(-side // multiple).
            whole = (side + self.multiple - 1) // self.multiple * self.multiple
            images = images.index_select(axis, torch.arange(whole).clamp(max=side - 1))
        restored: Tensor = self.model(images).clamp(0, 1)
        for axis, side in sides.items():
            restored = restored.index_select(axis, torch.arange(side))
        return restored


def make_exported(config: DictConfig, model: nn.Module, *_: Any) -> Exported:
    """Return what is exported of a run's model, which may be changed."""
    network = for_inference(model).cpu().float()
    side, channels = config.patch_size, channels_of(config)
    facts = {"image_mode": config.data.image_mode, "range": [0, 1], "degrade": config.degrade.name}
    return Exported(
        Deployed(network, network.multiple).eval(),  # type: ignore[arg-type]
        {"images": torch.zeros(2, channels, side, side)},
        {"model.json": json.dumps(facts)},
        sizes=2,
        outputs=("restored",),
    )
