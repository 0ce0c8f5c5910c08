"""`torchrun --nproc_per_node=2 train.py …` trains what one process would, and ends as one process would."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segfit.assembly.training import make_training
from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.evaluate import evaluate
from segfit.runs import folder as runs
from tests.integration.restoring import TINY as RESTORATION
from tests.integration.test_resume import losses
from tests.integration.training import (
    PATIENCE,
    ROOT,
    TINY,
    Trained,
    command,
    environment,
    one_thread,
    resume,
    the_run,
    train,
    updates_of,
    wait_for,
    weights_of,
)
from tests.unit.data.files import names, write_pairs

# 25 images: with batches of 4 by two processes one is left over; 7 held-out ones: 4 and 3.
SMALL = (
    *(text for text in TINY if not text.startswith(("data.train_size", "data.val_size"))),
    # SGD: Adam blows up the rounding of gradients that are next to nothing.
    *(
        "data.train_size=25",
        "data.val_size=7",
        "precision=fp32",
        "augmentation=cpu",
        "lr=0.05",
        "optimizer=sgd",
    ),
    *("accumulate=2", "model.dropout=0", "checkpoint.every_steps=1", "report.panels=3"),
)
VICTIM = "tests/integration/torchrun_victim.py"


def by_torchrun(*arguments: str, script: str = "train.py") -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, *command(*arguments, script=script)[1:]]


def start(folder: Path, *arguments: str, script: str = "train.py") -> "subprocess.Popen[str]":
    """Start two processes in a folder."""
    return subprocess.Popen(
        by_torchrun(*arguments, script=script),
        cwd=folder,
        env={**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(folder: Path, *arguments: str, script: str = "train.py") -> "tuple[int, str]":
    """Run two processes in a folder; return torchrun's exit code and all that was printed."""
    process = start(folder, *arguments, script=script)
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def ours(output: str) -> str:
    """Return what was printed before torchrun sums up, with a traceback of its own, that it failed."""
    lines = output.splitlines()
    sums_up = ("failed (exitcode", "Traceback (most recent call last)")
    end = next(at for at, line in enumerate(lines) if any(text in line for text in sums_up))
    return "\n".join(lines[:end])


def parameters(run: Path) -> torch.Tensor:
    """Return the trained weights, without batch norm's statistics."""
    weights = weights_of(run / "checkpoints/last.pt")
    return torch.cat(
        [v.flatten() for k, v in weights.items() if "running" not in k and "num_b" not in k]
    )


def exact_losses(run: Path) -> list[float]:
    """Return the training losses, to the last digit, that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("loss/train")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A run by two processes."""
    folder = tmp_path_factory.mktemp("pair")
    code, output = torchrun(folder, *SMALL)
    assert code == 0, output
    assert "batch: 4 × 2 accumulated × 2 processes = 16" in output
    assert "Warning" not in output
    return the_run(folder)


def assert_trained_alike(run: Path, single: Trained) -> None:
    assert exact_losses(run) == pytest.approx(single.losses, abs=1e-5)
    torch.testing.assert_close(parameters(run), parameters(single.run), atol=1e-5, rtol=1e-5)


def test_two_processes_train_what_one_does_with_twice_the_accumulation(tmp_path, pair):
    single = train(tmp_path, *SMALL, "accumulate=4")
    assert len(single.losses) == 4
    assert_trained_alike(pair, single)


def test_one_run_folder_written_by_one_process(pair):
    assert sorted(path.name for path in pair.iterdir() if path.name[0] != ".") == [
        "checkpoints", "config.yaml", "metrics.json", "overrides.yaml", "scores.jsonl", "tensorboard",
        "train.log",
    ]  # fmt: skip
    lines = (pair / "train.log").read_text().splitlines()
    assert len([line for line in lines if "epoch 1/2 done" in line]) == 1
    assert len(lines) == len({line[20:] for line in lines})
    assert len(list((pair / "tensorboard").rglob("events*"))) == 1
    assert len(load_checkpoint(pair / "checkpoints/last.pt")["random"]) == 2
    metrics = json.loads((pair / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["facts"]["batch"] == "4 × 2 accumulated × 2 processes = 16"


def test_the_shares_of_the_held_out_images_make_up_the_scores_of_all(pair):
    assert_scores_of_all(pair)


def assert_scores_of_all(run: Path) -> None:
    """One process finds the same scores of the best weights."""
    config = runs.resumed_config(run, [f"resume={run}", "epochs=3"])
    with one_thread():
        fit = make_training(config, run, print, resumed=True).fit
        fit.state.model.load_state_dict(weights_of(run / "checkpoints/best.pt"))
        result = evaluate(fit.state.model, fit.task, fit.held_out(), fit.state.precision)
    best = json.loads((run / "metrics.json").read_text())["best"]
    loss = best.pop("loss")
    assert {name: result.scores[name] for name in best} == best  # to the last digit
    assert result.scores["loss"] == pytest.approx(loss, abs=1e-6)


def test_a_run_of_two_processes_goes_on_in_one(tmp_path, pair):
    run = shutil.copytree(pair, tmp_path / "run")
    longer = resume(run, "epochs=3", "checkpoint.every_steps=null")
    assert longer.heard.steps == [5, 6, 7]  # batches of 8 from here on: 25 // 8
    assert any("another effective batch" in notice for notice in longer.notices)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two(tmp_path):
    """With a single held-out image, of which one process has none."""
    run = tmp_path / "run"
    train(run, *SMALL, "accumulate=1", "data.val_size=1", "max_steps=2")
    assert load_checkpoint(run / "checkpoints/last.pt")["progress"]["sample"] == 8
    code, output = torchrun(tmp_path, f"resume={run}", "max_steps=null")
    assert code == 0, output
    assert "resuming with another effective batch" in output
    # 2 updates of 4 images; 2 of 8, since 17 are left; 3 of 8 in the second epoch
    assert sorted(losses(run)) == [3, 4, 5, 6, 7]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_without_accumulation_and_with_an_average_of_the_weights(tmp_path):
    options = (*SMALL, "accumulate=1", "ema_decay=0.9", "epochs=1")
    single = train(tmp_path / "single", *options, "accumulate=2")
    code, output = torchrun(tmp_path, *options)
    assert code == 0, output
    assert_trained_alike(the_run(tmp_path), single)
    assert_scores_of_all(the_run(tmp_path))


@pytest.mark.slow
def test_two_processes_restore_as_one_does(tmp_path):
    """What is drawn of a patch is the same in whichever process; of three held-out pictures one has two."""
    options = (*RESTORATION, "degrade=mixed", "data.val_size=3", "optimizer=sgd", "lr=0.1")
    single = train(tmp_path / "single", *options, "accumulate=4", base=())
    assert len(single.losses) == 4
    code, output = torchrun(tmp_path, *options, "accumulate=2")
    assert code == 0, output
    assert_trained_alike(the_run(tmp_path), single)
    assert_scores_of_all(the_run(tmp_path))
    best = json.loads((the_run(tmp_path) / "metrics.json").read_text())["best"]
    assert best == pytest.approx(single.end.best_scores, abs=1e-4)


# ------------------------------------------------------------------------------------- failing


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(tmp_path, pair):
    code, output = torchrun(tmp_path, "killed", *SMALL, script=VICTIM)
    assert code != 0
    assert "another process of this training ended without giving a reason" in ours(output)
    assert "Traceback" not in ours(output)
    run = the_run(tmp_path)
    assert updates_of(run) == 3

    code, output = torchrun(tmp_path, f"resume={run}")
    assert code == 0, output
    assert losses(run) == losses(pair)
    weights = [weights_of(one / "checkpoints/last.pt") for one in (run, pair)]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)  # where it stopped, means were taken
    torch.testing.assert_close(parameters(run), parameters(pair), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once_and_ends_well(tmp_path, number):
    process = start(tmp_path, *SMALL, "epochs=500", "val_every=100")
    wait_for(process, tmp_path, "update 5/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    run = the_run(tmp_path)
    reason = "terminated" if number == signal.SIGTERM else "interrupted"
    assert json.loads((run / "metrics.json").read_text())["status"] == reason
    assert load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"] == max(losses(run))
    assert output.count(f"{reason} (") == 2  # as it ends, and in the summary
    assert "Error" not in ours(output)


@pytest.mark.slow
def test_a_file_that_one_process_cannot_read_ends_both_and_is_reported(tmp_path):
    """The second held-out image is the second process's."""
    root = write_pairs(tmp_path / "data", names(12), size=(64, 64))
    for part in ("images", "masks"):
        (root / part).rename(root / f"{part}-all")
        for split, some in (("train", names(12)[:8]), ("val", names(12)[8:])):
            for name in some:
                (root / f"{part}/{split}").mkdir(parents=True, exist_ok=True)
                (root / f"{part}-all/{name}.png").rename(root / f"{part}/{split}/{name}.png")
        (root / f"{part}-all").rmdir()
    (root / "images/val/009.png").write_bytes(b"no picture")
    options = [text for text in SMALL if not text.startswith("data")]
    data = (f"data.root={root}", "data=folder", "data.num_classes=3", "data.check=off")
    code, output = torchrun(tmp_path, *options, *data, "epochs=1")
    assert code != 0
    assert ours(output).count("009.png") == 1, output
    assert "process 1 of 2 ended: " in ours(output)
    assert "Traceback" not in ours(output)


@pytest.mark.parametrize(
    ("arguments", "script", "message"),
    [
        (("lr=-1",), "train.py", "lr=-1.0: must be more than 0"),
        pytest.param(
            ("-m", "seed=1,2"),
            "train.py",
            "-m would sweep in every process",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("run=outputs/x",),
            "evaluate.py",
            "evaluate.py scores a run in one process",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("data.train_size=1",),
            "train.py",
            "2 processes train together, but train has 1 images",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_input_is_reported_once_and_leaves_nothing(tmp_path, arguments, script, message):
    small = SMALL if script == "train.py" else ()
    keys = {text.split("=")[0] for text in arguments}
    options = [text for text in small if text.split("=")[0] not in keys]
    code, output = torchrun(tmp_path, *options, *arguments, script=script)
    assert code != 0
    assert ours(output).count(message) == 1, output
    assert "exitcode  : 2" in output
    assert "Traceback" not in ours(output)
    assert not list(tmp_path.glob("*/*"))
