"""A killed sweep is launched again as it was; an untrusted record launches nothing but values of the schema."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from segfit.errors import SegFitError
from segfit.sweeps.callback import resumed_arguments, save_sweep

RECORD = {
    "overrides": ["model=cnn", "batch_size=2,4", "lr=range(1,3)", "data.class_names=[a,'b c',d]"],
    "hydra": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
}


def write(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**RECORD, **changes}))
    return folder


def composed(*task: str, config_dir: str | None = None):
    """Return what save_sweep reads of a composed config."""
    typed = ["hydra.mode=MULTIRUN", *RECORD["hydra"], "hydra.sweep.dir=here"]
    sources = [{"provider": "main", "path": "conf"}]
    if config_dir is not None:
        sources.append({"provider": "command-line", "path": config_dir})
    own = {
        "overrides": {"task": list(task), "hydra": typed},
        "runtime": {"config_sources": sources},
    }
    return OmegaConf.create({"hydra": own})


def test_other_command_lines_are_left_alone():
    assert resumed_arguments(["-m", "batch_size=2,4"]) == ["-m", "batch_size=2,4"]


def test_what_was_typed_is_recorded_once_and_no_other_sweep_after_it(tmp_path):
    task = RECORD["overrides"]
    assert save_sweep(composed(*task), tmp_path)
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text()) == RECORD
    assert not save_sweep(composed(*task), tmp_path)
    with pytest.raises(SegFitError, match=r"holds another sweep \(model=cnn .* resume_sweep="):
        save_sweep(composed(*task, "epochs=9"), tmp_path)
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text()) == RECORD


def test_a_folder_of_configs_is_recorded_to_be_asked_for(tmp_path):
    save_sweep(composed("lr=1,2", config_dir="/my_conf"), tmp_path)
    with pytest.raises(SegFitError, match="it was launched with --config-dir"):
        resumed_arguments([f"resume_sweep={tmp_path}"])


def test_it_is_launched_as_it_was_and_as_is_typed_now(tmp_path):
    sweep = write(tmp_path / "it's a sweep")
    given = str(sweep).replace("'", r"\'")
    line = ["-m", f"resume_sweep='{given}'", "hydra.launcher.n_jobs=4", "--config-dir", "my_conf"]
    assert resumed_arguments(line) == [
        *("-m", *RECORD["overrides"], "hydra/launcher=joblib"),
        *(f"hydra.sweep.dir='{given}'", "hydra.mode=MULTIRUN"),
        *("hydra.launcher.n_jobs=4", "--config-dir", "my_conf"),
    ]


def test_folders_that_are_no_sweep_are_refused(tmp_path):
    with pytest.raises(SegFitError, match=r"no sweep \(there is no such folder\)"):
        resumed_arguments([f"resume_sweep={tmp_path / 'nowhere'}"])
    with pytest.raises(SegFitError, match=r"no sweep \(it has no sweep\.yaml\)"):
        resumed_arguments([f"resume_sweep={tmp_path}"])
    with pytest.raises(SegFitError, match="Quote the folder"):
        resumed_arguments(["resume_sweep=a b ${"])


def test_what_names_programs_or_places_is_typed_again(tmp_path):
    recorded = ["hydra.launcher.partition=gpu", "--config-dir=/conf"]
    sweep = write(tmp_path / "sweep", hydra=recorded)
    line = [f"resume_sweep={sweep}", "hydra.launcher.partition=cpu"]
    with pytest.raises(SegFitError, match="it was launched with --config-dir"):
        resumed_arguments(line)
    again = resumed_arguments([*line, "--config-dir=conf"])
    assert again is not None
    assert not set(recorded) & set(again)


def test_a_search_that_is_kept_in_a_storage_goes_on_from_there(tmp_path):
    sweep = write(tmp_path / "sweep", hydra=["hydra.sweeper.storage=sqlite:///x.db"])
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
    ],
)
def test_overrides_that_could_bring_in_more_than_values_are_refused(override, tmp_path):
    sweep = write(tmp_path / "sweep", overrides=["batch_size=2,4", override])
    with pytest.raises(SegFitError, match=r"sweep\.yaml: "):
        resumed_arguments([f"resume_sweep={sweep}"])


@pytest.mark.parametrize(
    "text",
    [
        "hydra.launcher._target_=os.system",
        "hydra/launcher=../evil",
        "hydra/launcher=joblib hydra.callbacks.x._target_=os.system",
        "hydra/callbacks=evil",
        "hydra.launcher.setup=[touch /tmp/x]",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=1\n#SBATCH --uid=root",
        "hydra.callbacks.x=1",
        "--config-dir=/tmp/evil",
    ],
)
def test_settings_that_could_name_a_program_are_not_taken(text, tmp_path):
    sweep = write(tmp_path / "sweep", hydra=[text])
    with pytest.raises(SegFitError, match="type it again"):
        resumed_arguments([f"resume_sweep={sweep}"])


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": "lr=1"},
        {"overrides": [["lr=1"]]},
        {"overrides": [{"_target_": "os.system"}]},
        {"hydra": [5]},
        {"hydra": None},
        {"_target_": "os.system"},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused(changes, tmp_path):
    sweep = write(tmp_path / "sweep", **changes)
    with pytest.raises(SegFitError, match=r"sweep\.yaml: "):
        resumed_arguments([f"resume_sweep={sweep}"])
