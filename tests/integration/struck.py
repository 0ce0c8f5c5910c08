"""train.py that faults strike after certain updates: `python tests/integration/struck.py 9=SIGKILL model=cnn …`.

A signal reaches every process of the group, as one of a terminal or of Slurm does. On a `full` disk the kernel lets no
file grow beyond 20 kB from that update on; with `room` it does again.
"""

import os
import re
import resource
import runpy
import signal
import sys
from typing import Any

from segfit.engine import recovery
from tests.integration.training import ROOT

_make_update = recovery.make_update
_faults: dict[int, str] = {}


def _strike(fault: str) -> None:
    if fault in ("full", "room"):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if fault == "full" else hard, hard))
    else:
        os.killpg(0, signal.Signals[fault])


def _struck(state: Any, *args: Any, **options: Any) -> Any:
    made = _make_update(state, *args, **options)
    if state.progress.update in _faults:
        _strike(_faults.pop(state.progress.update))
    return made


if __name__ == "__main__":
    while match := re.fullmatch(r"(\d+)=(SIG\w+|full|room)", sys.argv[1]):
        _faults[int(match[1])] = match[2]
        del sys.argv[1]
    recovery.make_update = _struck
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
