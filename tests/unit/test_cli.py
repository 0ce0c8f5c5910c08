"""Between the command line and the work: what a job of a sweep leaves behind about its end."""

import sys

import pytest
import torch

from segfit import cli


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "oom"),
        (RuntimeError("shapes do not match"), "crash"),
    ],
)
def test_out_of_memory_is_told_from_a_crash(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str
) -> None:
    left: list[tuple[str, int]] = []

    def main() -> None:
        raise error

    monkeypatch.setattr(
        cli.sweep_jobs, "leave_error", lambda kind, _message, code: left.append((kind, code))
    )
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(type(error)):
        cli.run(main, "train")
    assert left == [(kind, 1)]
