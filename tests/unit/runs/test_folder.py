"""Which run is meant."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segfit.cli.main import run_dir
from segfit.config.tasks import qualified
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.runs.files import RunFolder
from segfit.tasks.segmentation.schema import Evaluate
from tests.unit.composing import composed


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "my run (1)"
    runs.save_config(composed("hardware=cpu", "data=shapes"), [], folder)
    for name in ("best", "last", "previous"):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / f"{name}.pt").write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("place", "checkpoint"),
    [
        ("", "best"),
        ("checkpoints", "best"),
        ("checkpoints/best.pt", "best"),
        ("checkpoints/last.pt", "last"),
        ("config.yaml", "best"),
    ],
)
def test_a_run_is_named_by_its_folder_or_what_is_in_it(run, place, checkpoint, monkeypatch):
    for given in (run / place, Path(run.name, place)):
        monkeypatch.chdir(run.parent)
        options = OmegaConf.merge(OmegaConf.structured(Evaluate), {"run": str(given)})
        assert runs.load_named(options)[0].data.name == "shapes"
        assert Path(options.run[0]).absolute() == run
        assert options.checkpoint == checkpoint
        if not place.endswith("best.pt"):
            assert Path(run_dir(str(given), None)).absolute() == run


@pytest.mark.parametrize("given", ["checkpoints/previous.pt", "../x.pt", "nowhere", "../nowhere"])
def test_what_is_no_run_is_refused(run, given, monkeypatch):
    monkeypatch.chdir(run)
    (run.parent / "x.pt").write_bytes(b"x")
    options = OmegaConf.merge(OmegaConf.structured(Evaluate), {"run": given})
    with pytest.raises(SegFitError, match=r"no run folder|give the run's folder"):
        runs.load_named(options)


def test_a_run_is_resumed_from_its_last_state(run):
    with pytest.raises(SegFitError, match="runs resume from the last state"):
        run_dir(str(run / "checkpoints/best.pt"), None)


@pytest.mark.parametrize(
    "data",
    [
        ("data=folder", "data.num_classes=2"),
        ("task=restoration", "data=folder"),
        ("task=restoration", "data=pairs"),
        ("task=forecasting", "data=csv"),
    ],
    ids=" ".join,
)
def test_data_of_any_task_may_have_moved(run, data):
    moved = run.parent / "new place, really"
    OmegaConf.save(composed("hardware=cpu", *data, "data.root=old"), run / "config.yaml")
    typed = qualified([f"resume={run}", f"data.root={moved}"], "segmentation", [])
    composed(*typed)  # today's, of the task that has no root
    assert runs.resumed_config(run, typed).data.root == str(moved)


def test_what_is_typed_beside_resume_is_for_the_run(run):
    """Today's config, composed anew, has other data, which lack the key."""
    OmegaConf.save(
        composed("hardware=cpu", "data=folder", "data.root=x", "data.num_classes=2"),
        run / "config.yaml",
    )
    typed = qualified(
        [f"resume={run}", "data.root=y z", "loader.workers=3", "epochs=7"], "segmentation", []
    )
    config = runs.resumed_config(run, composed(*typed, name="train") and typed)
    assert (config.data.root, config.loader.workers, config.epochs) == ("y z", 3, 7)
    with pytest.raises(SegFitError) as caught:
        runs.resumed_config(run, ["++data.num_classes=3", "++loader.worker=3"])
    assert caught.value.problems[0].startswith("data.num_classes=3: cannot change")
    assert (
        caught.value.problems[1]
        == "loader.worker: there is no such key. Did you mean 'loader.workers'?"
    )


def test_the_newest_of_several_runs_may_be_called_last(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = Path("outputs/b")
    runs.save_config(composed("hardware=cpu", "data=shapes"), [], newest)
    RunFolder(newest).log.touch()
    options = OmegaConf.structured(Evaluate(run=[str(run), "last"]))
    assert len(runs.load_named(options)) == 2
    assert options.run == [str(run), str(newest)]
