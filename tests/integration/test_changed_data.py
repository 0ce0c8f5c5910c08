"""A run knows its images: data that move, grow, shrink or change after a training."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segfit.assembly.earlier import differences, kept_splits, read_samples, samples_of
from segfit.assembly.task import assembly_of
from segfit.commands import evaluate as evaluation
from segfit.commands import load_run as trained
from segfit.commands import train as training
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.tasks.segmentation.schema import Evaluate
from tests.integration.training import command, compose_run, finished, one_thread
from tests.unit.data.files import noise, save

SMALL = ("model=cnn", "model.base_channels=8", "image_size=32", "batch_size=2", "epochs=1", "device=cpu",
         "report.logger=[]", "loader.workers=0", "data=folder", "data.num_classes=3")  # fmt: skip


def add(root: Path, numbers: range) -> None:
    for seed in numbers:
        save(root / "images" / f"s{seed:02d}.png", noise(32, 32, 3, seed=seed))
        save(root / "masks" / f"s{seed:02d}.png", noise(32, 32, seed=seed, high=3))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("changed")
    add(place / "data", range(20))
    overrides = (*SMALL, f"data.root={place / 'data'}", "max_steps=2")
    with one_thread():
        training.train(compose_run(*overrides, base=()), overrides, place / "run")
    return place


def printed(capsys, what: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if what in line]


def test_data_that_grow_shrink_and_change(place, capsys):
    run, data = place / "run", place / "moved here"
    before = read_samples(run / "samples.json")
    assert {split: len(names) for split, names in before.items()} == {"train": 16, "val": 4}
    (place / "data").rename(data)
    done = finished(command(f"resume={run}/checkpoints", f"data.root={data}", "max_steps=3"), place)
    assert done.returncode == 0, done.stderr
    assert "is not what the run had" not in done.stdout

    add(data, range(20, 40))
    gone, altered = sorted(before["train"])[:2]
    (data / "images" / f"{gone}.png").unlink()
    save(data / "masks" / f"{altered}.png", noise(32, 32, seed=99, high=3))
    copied = sorted(before["train"])[2]
    (data / "images" / "copy.png").write_bytes((data / "images" / f"{copied}.png").read_bytes())
    (data / "masks" / "copy.png").write_bytes((data / "masks" / f"{copied}.png").read_bytes())
    heard: list[str] = []
    options = OmegaConf.merge(OmegaConf.structured(Evaluate), {"run": str(run), "workers": 0})
    loaded = trained.load_runs(options, runs.load_named(options), print)
    evaluation.evaluate_run(loaded, options, heard.append)
    scored = {path.stem for path in (run / "evaluation/val/masks").iterdir()}
    assert set(before["val"]) <= scored
    assert not scored & set(before["train"])
    added = scored - set(before["val"])
    (line,) = [line for line in heard if line.startswith("val is not what the run had")]
    assert f"{len(added)} added ({sorted(added)[0]}" in line
    assert "removed" not in line

    config = runs.resumed_config(run, ["max_steps=4"])
    with one_thread():
        training.train(config, [], run, resumed=True)
    (line,) = printed(capsys, "train is not what the run had")
    assert f"1 removed ({gone}), 1 changed ({altered})" in line
    assert gone in read_samples(run / "samples.json")["train"]


def sources_of(root: Path, *overrides: str):
    config = compose_run(*SMALL, f"data.root={root}", *overrides, base=())
    return config, assembly_of(config).make_sources(config)


def looked_at(config, sources):
    assembly_of(config).check_sources(config, sources, {})
    return samples_of(sources)


@pytest.mark.parametrize("level", ["{part}/{kind}", "{kind}/{part}"])
def test_copies_of_training_images_are_named_whatever_they_are_called(tmp_path, level):
    for part, seeds in (("train", range(4)), ("valid", range(4, 7))):
        for seed in seeds:
            for kind, pixels in (
                ("images", noise(32, 32, 3, seed=seed)),
                ("masks", noise(32, 32, seed=seed, high=3)),
            ):
                save(tmp_path / level.format(part=part, kind=kind) / f"{seed % 4}.png", pixels)
    config, sources = sources_of(tmp_path)
    before = looked_at(config, sources)
    assert not differences({}, before)  # equal names in two folders are no copies
    for kind in ("images", "masks"):
        train, val = (tmp_path / level.format(part=part, kind=kind) for part in ("train", "valid"))
        (train / "3.png").rename(val / "new.png")
    config, sources = sources_of(tmp_path)
    now = looked_at(config, kept_splits(config, sources, before))
    val_lines = [line for line in differences(before, now) if line.startswith("val")]
    assert "1 added (new)" in val_lines[0]
    assert "1 of 4 are among what was trained on" in val_lines[1]
    assert "new (there 3)" in val_lines[1]


def test_groups_stay_together_as_a_set_grows(tmp_path):
    def write(patients):
        for patient in patients:
            for slice_ in range(2 if patient < 8 else 3):
                name = f"p{patient}_{slice_}"
                save(tmp_path / "images" / f"{name}.png", noise(32, 32, 3))
                save(tmp_path / "masks" / f"{name}.png", noise(32, 32, high=3))

    write(range(8))
    group = "data.split.group=^(p\\d+)_"
    _, sources = sources_of(tmp_path, group)
    before = samples_of(sources)
    for patient in range(8):
        save(tmp_path / "images" / f"p{patient}_9.png", noise(32, 32, 3))
        save(tmp_path / "masks" / f"p{patient}_9.png", noise(32, 32, high=3))
    write(range(8, 30))
    config, sources = sources_of(tmp_path, group)
    found = samples_of(kept_splits(config, sources, before))
    assert set(before["val"]) <= set(found["val"])
    assert set(before["train"]) <= set(found["train"])
    patients = [{name.split("_")[0] for name in names} for names in found.values()]
    assert not patients[0] & patients[1]


@pytest.mark.parametrize("text", ["[]", '{"train": []}', '{"train": {"a": 3}}', "nothing"])
def test_a_list_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(SegFitError, match=r"samples\.json"):
        read_samples(tmp_path / "samples.json")
    (tmp_path / "samples.json").write_text(json.dumps({"train": {"a": ""}}))
    assert read_samples(tmp_path / "samples.json") == {"train": {"a": ""}}
    assert read_samples(tmp_path / "none.json") == {}


def test_pictures_keep_their_splits_and_copies_are_named(tmp_path):
    def found():
        root = f"data.root={tmp_path}"
        config = compose_run("task=restoration", "data=folder", root, "patch_size=32", base=())
        sources = assembly_of(config).make_sources(config)
        return config, sources

    for seed in range(10):
        save(tmp_path / f"{seed}.png", noise(32, 32, 3, seed=seed))
    config, sources = found()
    before = looked_at(config, sources)
    assert {split: len(names) for split, names in before.items()} == {"train": 8, "val": 2}
    for seed in range(10, 30):
        save(tmp_path / f"{seed}.png", noise(32, 32, 3, seed=seed))
    save(tmp_path / f"{min(before['val'])}.png", noise(32, 32, 3, seed=int(min(before["train"]))))
    config, sources = found()
    now = looked_at(config, kept_splits(config, sources, before))
    assert all(set(before[split]) <= set(now[split]) for split in before)
    lines = differences(before, now)
    assert f"1 changed ({min(before['val'])})" in lines[1]
    assert f"{min(before['val'])} (there {min(before['train'])})" in lines[2]
