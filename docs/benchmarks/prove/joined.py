"""train.py by processes that share one card, joined by a backend of one's choice; by torchrun: joined.py gloo OVERRIDES.

train.py itself gives each process a card of its own over NCCL, and makes no group for one process alone.
"""

import atexit
import gc
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from segfit.engine import distributed
from segfit.system.hardware import resolve_device
from segfit.system.process import Launch

BACKEND = sys.argv.pop(1)


@contextmanager
def joined(requested: str) -> Iterator[distributed.Distributed]:
    """Stand for `segfit.engine.distributed.joined`."""
    device, _ = resolve_device(requested)  # the first card
    dist.init_process_group(BACKEND, device_id=device if BACKEND == "nccl" else None)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    processes = distributed.Distributed()
    processes.join(Launch(rank, size, rank, size), device)
    yield processes
    processes.gather(None)
    if rank == 0:
        print(f"{size} joined by {dist.get_backend()} on {device}")
    dist.destroy_process_group()
    atexit.register(gc.collect)  # as in the original: gloo's threads end with the last reference


distributed.joined = joined
runpy.run_path(str(Path(__file__).parents[3] / "train.py"), run_name="__main__")
