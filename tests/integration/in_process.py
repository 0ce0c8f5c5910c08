"""benchmark.py whose trials run in its own process: to import torch anew takes longer than what is measured there."""

import runpy
import sys
from typing import Any

from omegaconf import DictConfig

from segfit.tuning import climb
from segfit.tuning.measure import measure_training
from segfit.tuning.trial import Outcome
from tests.integration.training import ROOT


def _in_process(config: DictConfig, *, job: str, timeout_s: float, **how: Any) -> Outcome:
    return Outcome(ok=True, values=measure_training(config, **how))


if __name__ == "__main__":
    climb.run_trial = _in_process
    sys.argv[0] = str(ROOT / "benchmark.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
