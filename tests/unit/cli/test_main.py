"""Between the command line and the work: what is refused, and what a job of a sweep leaves about its end."""

import sys

import pytest
import torch

from segfit.cli import main as cli


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "oom"),
        (RuntimeError("shapes do not match"), "crash"),
    ],
)
def test_out_of_memory_is_distinguished_from_a_crash(
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


@pytest.mark.parametrize("begun_by", [KeyboardInterrupt, ValueError])
def test_ctrl_c_is_seen_where_the_cleanup_of_a_library_fails(begun_by: type[BaseException]) -> None:
    def interrupted() -> None:
        try:
            raise begun_by
        finally:
            raise AttributeError("half of it was done")

    seen = KeyboardInterrupt if begun_by is KeyboardInterrupt else AttributeError
    with pytest.raises(seen), cli.ctrl_c_kept():
        interrupted()


def never() -> None:
    raise AssertionError("it was to be refused before")


@pytest.mark.parametrize(
    "sign", ["-m", "--multirun", "hydra.mode=MULTIRUN", "hparams_search=optuna", "resume_sweep=x"]
)
def test_processes_of_torchrun_do_not_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sign: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "lr=1", sign])
    with pytest.raises(SystemExit) as ended:
        cli.run(never, "train")
    assert ended.value.code == 2
    assert f"torchrun: {sign} would sweep in every process" in capsys.readouterr().err


def test_overrides_may_stand_behind_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["lr=1", "--cfg", "job", "~clip_grad_norm", "--config-dir", "a=b", "seed=2", "-m"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    cli.setup()
    flags = ["--cfg", "job", "--config-dir", "a=b", "-m"]
    assert sys.argv[1:] == [*flags, "lr=1", "~clip_grad_norm", "seed=2"]
