"""No two processes write into one folder, and an untrusted folder runs nothing."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from segfit.commands import load_run as trained
from segfit.engine.checkpoint import load_checkpoint
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.tasks.segmentation.schema import Evaluate
from tests.integration.training import (
    PATIENCE,
    TINY,
    command,
    finished,
    resume,
    start,
    train,
    train_by_command_line,
    wait_for,
)
from tests.unit.payload import Payload

LONG = tuple("epochs=500" if text.startswith("epochs=") else text for text in TINY)


def end(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------- one folder, one process


def test_processes_that_make_folders_at_once_get_each_their_own(tmp_path):
    make = "from segfit.cli import main as cli; [print(cli.new_folder('outputs', None)) for _ in range(40)]"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", make], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    made = [
        line for process in both for line in process.communicate(timeout=PATIENCE)[0].splitlines()
    ]
    assert len(set(made)) == len(made) == 80
    assert all((tmp_path / folder).is_dir() for folder in made)


@pytest.mark.slow
def test_runs_and_sweeps_of_the_same_second_have_folders_of_their_own(tmp_path):
    """All four begin together; the clock stands still for them."""
    (tmp_path / "sitecustomize.py").write_text(
        "import datetime\n"
        "class Still(datetime.datetime):\n"
        "    @classmethod\n"
        "    def now(cls, tz=None):\n"
        "        return cls(2030, 1, 31, 12, 0, 0)\n"
        "datetime.datetime = Still\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    quick = [*TINY, "max_steps=1", "report.tensorboard=false"]
    # What is wrong with the jobs of the sweeps costs them no more than their time.
    lines = [quick, quick, ["-m", *TINY, "lr=-1"], ["-m", *TINY, "lr=-2"]]
    started = [start(tmp_path, *line, PYTHONPATH=paths) for line in lines]
    for process, code in zip(started, (0, 0, 1, 1), strict=True):
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, output
    runs = sorted(path.name for path in tmp_path.glob("outputs/2030-01-31/*"))
    assert runs == ["12-00-00", "12-00-00-2"]
    sweeps = sorted(tmp_path.glob("multirun/2030-01-31/*"))
    assert [path.name for path in sweeps] == ["12-00-00", "12-00-00-2"]
    typed = [yaml.safe_load((path / "0/overrides.yaml").read_text())[-1] for path in sweeps]
    assert sorted(typed) == ["lr=-1", "lr=-2"]
    for sweep in sweeps:
        assert len((sweep / "leaderboard.csv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_run_in_use_is_not_resumed_and_frees_itself_when_it_is_killed(tmp_path):
    first = start(tmp_path, *LONG, "loader.workers=1")
    run = wait_for(first, tmp_path, "update 7/")
    code, output = train_by_command_line(tmp_path, f"resume={run}")
    assert code == 2, output
    assert f"{run} is in use by process {first.pid} on {os.uname().nodename}" in output
    assert "Traceback" not in output
    assert first.poll() is None
    first.kill()
    first.wait()  # its data worker is left to find out by itself
    saved = load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"]
    code, output = train_by_command_line(tmp_path, f"resume={run}", f"max_steps={saved + 1}")
    assert code == 0, output
    assert f"resuming at update {saved}" in output
    first.communicate()


def test_a_new_run_does_not_write_into_an_old_one(tmp_path):
    train(tmp_path / "old", "max_steps=1")
    before = files(tmp_path / "old")
    code, output = train_by_command_line(tmp_path, *TINY, "hydra.run.dir=old")
    assert code == 2, output
    assert "old holds a run already. To resume it: resume=old;" in output
    after = files(tmp_path / "old")
    assert {
        path: time for path, time in after.items() if not path.name.startswith(".lock")
    } == before


def test_wrong_input_leaves_no_folder(tmp_path):
    small = (text for text in TINY if not text.startswith("data"))
    data = ("data=folder", "data.root=nowhere", "data.num_classes=2")
    code, output = train_by_command_line(tmp_path, *small, *data)
    assert code == 2, output
    assert "nowhere" in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("outputs/*"))


def test_ctrl_c_before_anything_was_written_leaves_no_folder(tmp_path):
    process = start(tmp_path, *TINY)
    wait_for(process, tmp_path, f"process {process.pid}", logs="outputs/*/*/.lock-owner")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert not list(tmp_path.glob("outputs/*"))


# ------------------------------------------------------------------------------- an untrusted folder


def config_with(change):
    def spoil(run: Path, _marker: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        change(config)
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return spoil


def shell(config, marker="executed"):
    config["model"] = {"_target_": "os.system", "_args_": [f"touch {marker}"], "name": "cnn"}


def tag(run: Path, marker: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"\nevil: !!python/object/apply:os.mkdir ['{marker}']\n")


def torch_payload(run: Path, marker: Path) -> None:
    content = {"format": 1, "model": {"x": Payload(marker)}}
    for path in (run / "checkpoints").glob("*.pt"):
        torch.save(content, path)


def plain_pickle(run: Path, marker: Path) -> None:
    for path in (run / "checkpoints").glob("*.pt"):  # the one before the last too: no way round
        path.write_bytes(pickle.dumps(Payload(marker)))


HOSTILE = {
    "a class to make": config_with(shell),
    "a shell in a list": config_with(lambda c: c["data"].update(mean=[{"_target_": "os.system"}])),
    "an interpolation": config_with(lambda c: c["data"].update(class_names=["${oc.env:HOME}"])),
    "Hydra's own": config_with(lambda c: c.update(hydra={"launcher": {"_target_": "os.system"}})),
    "a number beyond floats": config_with(lambda c: c.update(lr=10**400)),
    "a count beyond floats": config_with(lambda c: c.update(batch_size=10**400)),
    "a YAML tag": tag,
}
PICKLES = {"a pickle inside a checkpoint": torch_payload, "a pickle as a checkpoint": plain_pickle}


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """Train a run that is honest, stopped before its end."""
    folder = tmp_path_factory.mktemp("honest")
    train(folder, "max_steps=7")
    return folder


@pytest.fixture
def untrusted(honest, tmp_path) -> Path:
    """Return a copy of it, to spoil."""
    return shutil.copytree(honest, tmp_path / "untrusted")


def refused(output: str, code: int) -> None:
    assert code == 2, output
    assert "Error" in output or "errors" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_is_not_resumed(name, untrusted, tmp_path):
    marker = tmp_path / "executed"
    HOSTILE[name](untrusted, marker)
    code, output = train_by_command_line(tmp_path, "resume=untrusted", "max_steps=9")
    refused(output, code)
    assert not marker.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_checkpoint_is_neither_resumed_nor_evaluated(name, untrusted, tmp_path):
    marker = tmp_path / "executed"
    PICKLES[name](untrusted, marker)
    with pytest.raises(SegFitError, match="refused"):
        resume(untrusted, "max_steps=9")
    options = OmegaConf.merge(OmegaConf.structured(Evaluate), {"run": str(untrusted)})
    with pytest.raises(SegFitError, match="refused"):
        trained.load_run(options, runs.load_config(untrusted), print)
    assert not marker.exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_is_not_evaluated(name, untrusted, tmp_path):
    marker = tmp_path / "executed"
    HOSTILE[name](untrusted, marker)
    done = finished(command("run=untrusted", "workers=0", script="evaluate.py"), tmp_path)
    refused(done.stderr, done.returncode)
    assert not marker.exists()


def test_what_others_typed_is_shown_and_nothing_more(untrusted, tmp_path):
    """Neither overrides.yaml nor metrics.json has a say in what a resumed run does."""
    marker = tmp_path / "executed"
    evil = f"hydra.callbacks.x._target_=os.system;touch {marker}"
    (untrusted / "overrides.yaml").write_text(yaml.safe_dump([evil, "model=../../evil"]))
    (untrusted / "metrics.json").write_text(
        json.dumps({"_target_": "os.system", "precision": "fp99"})
    )
    again = resume(untrusted, "max_steps=8")
    assert again.heard.steps == [8]
    assert not marker.exists()


def test_a_run_has_a_name_and_the_newest_is_last(tmp_path):
    def run(*arguments: str, script: str = "train.py") -> str:
        done = finished(command(*arguments, script=script), tmp_path)
        return f"{done.returncode} {done.stdout}{done.stderr}"

    small = (*TINY, "max_steps=1", "limit_val_batches=1", "report.logger=[]")
    assert "2 Error:\n  - last: there is no run below" in run("run=last", script="evaluate.py")
    assert "2 Error:\n  - name=../b: must be below outputs" in run(*small, "name=../b")
    (tmp_path / "outputs/2000-01-01/00-00-00").mkdir(parents=True)  # older, and no run
    assert run(*small, "name=a b/first").startswith("0 ")
    again = run(*small, "name=a b/first")
    assert "outputs/a b/first holds a run already. To resume it: resume=outputs/a b/first" in again
    assert run("resume=last", "max_steps=2").startswith("0 ")
    newest = tmp_path / "outputs/a b/first"
    assert load_checkpoint(newest / "checkpoints/last.pt")["progress"]["update"] == 2
    options = ("run=last", "device=cpu", "workers=0", "save_masks=false", "worst=0")
    assert "outputs/a b/first, best" in run(*options, script="evaluate.py")
