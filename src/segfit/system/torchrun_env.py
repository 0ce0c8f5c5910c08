"""The rank of this process among those that torchrun started. Does not import torch."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """This process among those that train one model."""

    rank: int = 0  # 0-based number among all
    size: int = 1  # how many there are
    local_rank: int = 0  # 0-based number among those of this machine
    local_size: int = 1  # how many there are on this machine


def launched() -> Launch:
    """Return this process's ranks from torchrun's environment variables; alone without torchrun or with one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "RANK" not in os.environ:
        return Launch()
    return Launch(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def leave_reason(text: str) -> None:
    """Write why this process ends, for the summary that torchrun prints."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # The format of torch.distributed.elastic.multiprocessing.errors.
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = {"message": {"message": text, "extraInfo": extra}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(content), encoding="utf-8")
