"""Losses of short trainings, as they were: whatever changes them has to be meant.

To write them anew: python -m tests.golden.test_losses
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests.integration.training import train

GOLDEN = Path(__file__).with_name("losses.json")
TOLERANCE = 2e-3  # other CPUs add up in another order, and eight updates carry that on
COMMON = (
    *("precision=fp32", "augmentation=cpu", "augmentation.mixup=0.3", "seed=7", "max_steps=8"),
    *("data=shapes", "data.train_size=24", "data.val_size=4", "data.test_size=1"),
    *("data.resolution=64", "image_size=64", "batch_size=4", "epochs=2", "report.log_every=1"),
    *("lr=1e-3", "loader.workers=0", "device=cpu"),
)
CASES = {
    "cnn": ["model=cnn", "model.base_channels=8"],
    "cnn_accumulated": ["model=cnn", "model.base_channels=8", "batch_size=2", "accumulate=2"],
    "cnn_lovasz_kornia": [
        *("model=cnn", "model.base_channels=8", "loss=lovasz_ce", "augmentation=kornia-gpu"),
        *("augmentation.mixup=0", "optimizer=sgd", "lr=0.02", "scheduler=poly"),
    ],
    "segformer_b0": ["model=segformer_b0", "model.weights=null", "scheduler=cosine"],
}


def losses(case: str, folder: Path) -> list[float]:
    return train(folder, *CASES[case], base=COMMON).losses


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_before(case, tmp_path):
    golden = json.loads(GOLDEN.read_text())[case]
    assert len(golden) == 8
    assert losses(case, tmp_path) == pytest.approx(golden, abs=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        written = {
            case: [round(loss, 5) for loss in losses(case, Path(scratch) / case)] for case in CASES
        }
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
