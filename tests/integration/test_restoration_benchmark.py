"""docs/benchmarks/restoration.py: both loops train, in turns."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.training import ROOT, finished

SCRIPT = ROOT / "docs" / "benchmarks" / "restoration.py"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gray", "rgb"])
def test_both_loops_take_turns(tmp_path: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 256, (48, 56, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    done = finished(
        [
            *(sys.executable, str(SCRIPT), "--root", str(tmp_path)),
            *("--rounds", "2", "--steps", "2", "--workers", "0"),
            *("task=restoration", "hardware=cpu", f"data.image_mode={mode}", "ema_decay=0.9"),
            *("patch_size=32", "batch_size=2", "model.base_channels=8", "model.num_blocks=1"),
        ],
        ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model: cnn" in done.stdout
    assert re.search(r"^plain loop / SegFit: \d+\.\d+ \(", done.stdout, re.MULTILINE)
