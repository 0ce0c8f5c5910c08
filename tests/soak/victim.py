"""train.py whose weights a signal spoils: `python -m tests.soak.victim …`.

SIGRTMIN makes one of the model's weights not a number before the next update, as a bit that flips in memory does.
"""

import runpy
import signal
import sys
from typing import Any

import torch

from segfit.engine import recovery
from tests.integration.training import ROOT

_spoil = [False]


def _remember(*_: Any) -> None:
    _spoil[0] = True


def _spoiling(state: Any, *args: Any, **options: Any) -> Any:
    if _spoil[0]:
        _spoil[0] = False
        with torch.no_grad():
            weight = next(state.model.parameters())
            weight[(0,) * weight.ndim] = float("nan")
    return _make_update(state, *args, **options)


if __name__ == "__main__":
    signal.signal(signal.SIGRTMIN, _remember)
    _make_update, recovery.make_update = recovery.make_update, _spoiling
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
