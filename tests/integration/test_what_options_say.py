"""What an option says, it does, or the run says why not: from the files to the scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfit.assembly.task import assembly_of
from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.preflight import unswapped
from tests.integration.evaluating import evaluate
from tests.integration.training import (
    command,
    compose_run,
    finished,
    resume,
    same,
    train,
    weights_of,
)
from tests.unit.data.files import save


def rectangle(label: int, top: int, left: int, side: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy image (48, 64, 3) with a bright square, and its mask."""
    rng = np.random.default_rng(1000 * label + 10 * top + left)
    image = rng.integers(40, 80, (48, 64, 3)).astype(np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    image[top : top + side, left : left + side] = 220
    mask[top : top + side, left : left + side] = label
    return image, mask


def test_a_score_that_nothing_decides_picks_no_best_and_stops_nothing(tmp_path) -> None:
    for index in range(6):
        image, mask = rectangle(int(index < 4), 10, 10)
        part = tmp_path / "data" / ("train" if index < 4 else "val")
        save(part / "images" / f"{index}.png", image)
        save(part / "masks" / f"{index}.png", mask)
    done = train(
        tmp_path / "run 1", "data=folder", f"data.root={tmp_path / 'data'}", "data.num_classes=2",
        "data.background=0", "monitor=foreground_f1", "epochs=3", "patience=2",
        base=("model=cnn", "model.base_channels=4", "image_size=32", "batch_size=2", "device=cpu",
              "loader.workers=0"),
    )  # fmt: skip
    assert done.end.reason == "finished"
    assert len(done.heard.epochs) == 3
    assert not (done.run / "checkpoints/best.pt").exists()
    before, during = done.notices
    assert before.startswith("No pixel of class_1 in the val masks: what it finds of them")
    assert during.startswith("monitor=foreground_f1 has no value in this validation (NaN)")
    with pytest.raises(SegFitError, match=r"no validation gave the monitored score a value\. Take"):
        evaluate(tmp_path)
    assert evaluate(tmp_path, checkpoint="last").result.scores["pixel_accuracy"] >= 0


def test_sides_that_flips_confuse_are_reported_with_the_remedy() -> None:
    def notices(*overrides: str) -> list[str]:
        names = "data.class_names=[face,left_eye,right_eye,nose]"
        config = compose_run(names, *overrides)
        sources = assembly_of(config).make_sources(config)
        return list(assembly_of(config).check_sources(config, sources, {}).notices)

    (notice,) = notices()
    assert notice == (
        "A mirror image exchanges left_eye and right_eye, but flips do not: set augmentation.swap=[[1,2]] in training, or "
        "no flips (augmentation.hflip=0 augmentation.vflip=0)."
    )
    assert notices("augmentation.swap=[[2,1]]") == []
    assert notices("augmentation.hflip=0") == []
    assert notices("augmentation=none") == []
    (notice,) = notices("augmentation.hflip=0", "augmentation.mixup=0.5", "batch_size=1")
    assert "batch_size=1 has none to mix" in notice
    faces = compose_run("data=face_parsing", "data.root=x", base=())
    assert unswapped(faces) == ""


RARE = (
    *("model=cnn", "model.base_channels=4", "image_size=32", "batch_size=2", "device=cpu", "data=folder"),
    *("data.num_classes=4", "data.background=0", "data.fit=crop", "data.sampling=balanced", "precision=fp32"),
    *("data.crops_per_image=2", "data.foreground=0.33", "augmentation.swap=[[1,2]]", "epochs=3", "val_every=3"),
    *("augmentation.vflip=0.5", "model.dropout=0.2", "loader.workers=0", "report.log_every=1"),
)  # fmt: skip


@pytest.fixture(scope="module")
def rare(tmp_path_factory) -> Path:
    """Twelve images, of which one has class 3."""
    root = tmp_path_factory.mktemp("rare")
    for index in range(12):
        image, mask = rectangle(1 + index % 2 if index != 5 else 3, 4 + index, 3 * index)
        save(root / "images" / f"{index:02}.png", image)
        save(root / "masks" / f"{index:02}.png", mask)
    return root


def test_rare_classes_come_more_often_and_a_resumed_run_sees_the_same(tmp_path, rare) -> None:
    overrides = [f"data.root={rare}"]
    whole = train(tmp_path / "whole", *overrides, base=RARE)
    train(tmp_path / "cut", *overrides, "max_steps=7", base=RARE)
    done = resume(tmp_path / "cut", "max_steps=null")
    assert done.losses == whole.losses[7:]
    assert same(*(weights_of(tmp_path / name / "checkpoints/last.pt") for name in ("cut", "whole")))

    sampler, source = whole.training.fit.train.sampler, whole.training.fit.train.source
    masks = [np.asarray(Image.open(source.files(index)[1])) for index in range(len(source))]
    has = np.array([[(mask == label).any() for label in range(4)] for mask in masks])
    chance = (has / has.sum(0)).sum(1) / 4  # a class, then an image that has it
    times = np.zeros(len(source))
    for epoch in range(100):
        sampler.set_epoch(epoch)
        drawn = [index for batch in sampler for index, _ in batch]
        assert drawn[::2] == drawn[1::2]  # two crops of each
        times += np.bincount(drawn[::2], minlength=len(source)) / 100
    assert times == pytest.approx(len(source) * chance, abs=0.25)
    assert times.argmax() == has[:, 3].argmax()
    assert times.max() > 2


FOLDS = (
    *("data=folder", "data.num_classes=4", "data.split.test=0.2", "data.split.folds=2", "max_steps=2"),
    *("model=cnn", "model.base_channels=4", "image_size=[48,64]", "batch_size=2", "device=cpu"),
    *("augmentation=none", "loader.workers=0", "epochs=1", "precision=fp32"),
)  # fmt: skip


def test_models_of_folds_are_averaged_on_what_none_of_them_saw(tmp_path, rare) -> None:
    done = [
        train(tmp_path / f"{fold}", f"data.root={rare}", f"data.split.fold={fold}", base=FOLDS)
        for fold in (0, 1)
    ]
    held_out = [set(one.training.facts["data"].split()) for one in done]
    assert held_out[0] == held_out[1]  # as many images
    several = [str(one.run) for one in done]
    kept = {"temperature": 2.0, "checkpoint": "best", "epoch": 0}  # of one of them, not of the mean
    (done[0].run / "temperature.json").write_text(json.dumps(kept))
    found = evaluate(tmp_path, run=several, root=None, split="test")
    assert found.facts["temperature"] == 1
    assert found.facts["others"] == several[1:]
    path = done[0].run / "evaluation/test-of-2-runs"

    config = compose_run(f"data.root={rare}", "data.split.fold=0", base=FOLDS)
    source = assembly_of(config).make_sources(config)["test"]
    task = done[0].training.fit.task
    for index in range(len(source)):
        image = torch.tensor(source.read(index)[0]).permute(2, 0, 1)[None].float() / 255
        probabilities = []
        for run in several:
            model = done[0].model
            model.load_state_dict(weights_of(Path(run) / "checkpoints/best.pt"))
            logits = model.eval()(task.normalise(image))[0].detach().double().numpy()
            powers = np.exp(logits - logits.max(0))
            probabilities.append(powers / powers.sum(0))
        mask = np.asarray(Image.open(path / "masks" / f"{source.id(index)}.png"))
        assert (mask == np.mean(probabilities, 0).argmax(0)).mean() > 0.999

    with pytest.raises(
        SegFitError, match=r"data\.split\.fold=1, but 0 in .* of folds, on split=test"
    ):
        evaluate(tmp_path, run=several, root=None)
    with pytest.raises(SegFitError, match="temperature=fit takes one run"):
        evaluate(tmp_path, run=several, root=None, temperature="fit")
    with pytest.raises(SegFitError, match="export takes one run"):
        evaluate(tmp_path, run=several, root=None, split="test", export="x.pt2")


@pytest.mark.slow
def test_folds_by_the_command_line(tmp_path, rare) -> None:
    folders = ["hydra.sweep.dir=folds"]
    sweep = finished(
        command("-m", *FOLDS, f"data.root={rare}", "data.split.fold=0,1", *folders), tmp_path
    )
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    assert re.search(r"mean of 2.* ± 0\.", sweep.stdout)
    done = finished(command("run=[folds/0,folds/1]", "split=test", script="evaluate.py"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folds/0 and 1 more, averaged" in done.stdout
    assert (tmp_path / "folds/0/evaluation/test-of-2-runs/metrics.json").exists()
