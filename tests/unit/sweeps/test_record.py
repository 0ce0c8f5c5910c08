"""A killed sweep is launched again as it was; a stranger's record launches nothing but values of the schema."""

import json
from pathlib import Path

import pytest
import yaml

from segfit.errors import SegFitError
from segfit.sweeps.record import resumed_arguments

RECORD = {
    "format": 1,
    "overrides": ["model=cnn", "batch_size=2,4", "lr=range(1,3)", "data.class_names=[a,'b c',d]"],
    "launcher": "joblib",
    "sweeper": "basic",
    "settings": {"launcher.n_jobs": 2},
    "retype": [],
}


def write(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**RECORD, **changes}))
    return folder


def done(folder: Path, *jobs: int) -> None:
    for job in jobs:
        (folder / str(job)).mkdir()
        (folder / str(job) / "metrics.json").write_text(json.dumps({"status": "finished"}))


def test_other_command_lines_are_left_alone():
    assert resumed_arguments(["-m", "batch_size=2,4"]) is None


def test_it_is_launched_as_it_was_and_as_is_typed_now(tmp_path):
    sweep = write(tmp_path / "it's a sweep")
    given = str(sweep).replace("'", r"\'")
    typed = ["hydra.launcher.n_jobs=4", "--config-dir", "my_conf"]
    again = resumed_arguments([f"resume_sweep='{given}'", "-m", *typed])
    assert again is not None
    arguments, folder = again
    assert folder == sweep
    assert arguments == [
        *RECORD["overrides"],
        *("hydra/launcher=joblib", "hydra/sweeper=basic"),
        *("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs=4"),  # the last one wins
        *(f"hydra.sweep.dir='{given}'", "-m", "--config-dir", "my_conf"),
    ]


def test_what_is_done_is_counted(tmp_path):
    sweep = write(tmp_path / "sweep")
    done(sweep, 0, 1, 3)
    assert resumed_arguments([f"resume_sweep={sweep}"]) is not None
    done(sweep, 2)
    with pytest.raises(SegFitError, match="nothing is missing, all 4 jobs are done"):
        resumed_arguments([f"resume_sweep={sweep}"])


def test_folders_that_are_no_sweep_are_told(tmp_path):
    with pytest.raises(SegFitError, match=r"no sweep \(there is no such folder\)"):
        resumed_arguments([f"resume_sweep={tmp_path / 'nowhere'}"])
    with pytest.raises(SegFitError, match=r"no sweep \(it has no sweep\.yaml\)"):
        resumed_arguments([f"resume_sweep={tmp_path}"])
    with pytest.raises(SegFitError, match="Quote the folder"):
        resumed_arguments(["resume_sweep=a b ${"])


def test_nothing_else_may_change(tmp_path):
    sweep = write(tmp_path / "sweep")
    with pytest.raises(SegFitError) as error:
        resumed_arguments(
            [f"resume_sweep={sweep}", "epochs=9", "+model=cnn", "hydra/launcher=basic"]
        )
    assert [problem.split(":")[0] for problem in error.value.problems] == ["epochs=9", "+model=cnn"]


def test_what_names_programs_or_places_is_typed_again(tmp_path):
    sweep = write(tmp_path / "sweep", retype=["hydra.launcher.partition", "--config-dir"])
    line = [f"resume_sweep={sweep}", "hydra.launcher.partition=gpu"]
    with pytest.raises(SegFitError, match="it was launched with --config-dir"):
        resumed_arguments(line)
    assert resumed_arguments([*line, "--config-dir=conf"]) is not None


def test_a_search_that_is_kept_in_a_storage_goes_on_from_there(tmp_path):
    sweep = write(tmp_path / "sweep", sweeper="segfit_optuna", retype=["hydra.sweeper.storage"])
    with pytest.raises(SegFitError, match=r"launch it again with the same storage"):
        resumed_arguments([f"resume_sweep={sweep}"])


@pytest.mark.parametrize(
    "override",
    [
        "hydra.launcher._target_=os.system",
        "hydra/launcher=evil",
        "+hydra.callbacks.x._target_=os.system",
        "/hydra/launcher@x=evil",
        "experiment=../../multirun/evil",
        "experiment=demo,../evil",
        "experiment=[demo,/tmp/evil]",
        "+evil=1",
        "++evil=1",
        "~model",
        "model@hydra=cnn",
        "resume=somewhere",
        "resume_sweep=somewhere",
        "lr=${oc.env:HOME}",
        "--config-dir=/tmp/evil",
        "-m",
        "no override",
        "[" * 5000,
        ["lr=1"],
        {"_target_": "os.system"},
        5,
        None,
    ],
)
def test_overrides_that_could_bring_in_more_than_values_are_refused(override, tmp_path):
    sweep = write(tmp_path / "sweep", overrides=["batch_size=2,4", override])
    with pytest.raises(SegFitError, match=r"sweep\.yaml: "):
        resumed_arguments([f"resume_sweep={sweep}"])


@pytest.mark.parametrize(
    "changes",
    [
        {"launcher": "../evil"},
        {"launcher": "joblib hydra.callbacks.x._target_=os.system"},
        {"sweeper": "a=b"},
        {"settings": {"launcher._target_": 1}},
        {"settings": {"launcher.setup": ["touch /tmp/x"]}},
        {"settings": {"launcher.partition": "gpu\n#SBATCH --uid=root"}},
        {"settings": {"callbacks.x": 1}},
        {"settings": {"launcher.n_jobs": True}},
        {"overrides": "lr=1"},
        {"retype": [5]},
        {"format": 2},
        {"_target_": "os.system"},
        {"overrides": ["seed=range(0,1000000000)"]},
        {"overrides": ["seed=range(0,1000)", "epochs=range(1,1000)"]},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused(changes, tmp_path):
    sweep = write(tmp_path / "sweep", **changes)
    with pytest.raises(SegFitError, match=r"sweep\.yaml: "):
        resumed_arguments([f"resume_sweep={sweep}"])
