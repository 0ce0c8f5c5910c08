"""Data to evaluate on, and evaluate.py for tests, in this process."""

from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from segfit.commands import evaluate as evaluation
from segfit.commands import load_run as trained
from segfit.config.check import check
from segfit.runs import folder as runs
from segfit.tasks.segmentation.schema import Evaluate
from tests.unit.data.files import save

COLORS = [[0, 0, 0], [200, 30, 30], [30, 200, 30]]
SIZES = ((70, 90), (96, 64), (50, 120))


def write_data(root: Path) -> None:
    """Write coloured rectangles with noise, in sub-folders, of several sizes, ignored at the rim."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for index in range(count):
            height, width = SIZES[index % len(SIZES)]
            mask = np.zeros((height, width), np.uint8)
            mask[10:40, 10:35] = 1
            mask[20:48, 40:60] = 2
            image = np.array([[90, 90, 90], [200, 60, 60], [60, 200, 60]])[mask]
            image = (image + rng.normal(0, 25, image.shape)).clip(0, 255).astype(np.uint8)
            mask[:3] = 255
            name = f"patient_{index % 2}/slice.{index}"
            save(root / split / "images" / f"{name}.png", image)
            save(root / split / "masks" / f"{name}.png", mask)


def evaluate(place: Path, **values):
    """Evaluate in this process, as evaluate.py does."""
    given = {"run": str(place / "run 1"), "root": str(place / "data"), "workers": 0, **values}
    options = OmegaConf.merge(OmegaConf.structured(Evaluate), given)
    check(options)
    run = trained.load_runs(options, runs.load_named(options), print)
    return evaluation.evaluate_run(run, options, print)
