"""What an option says, it does, or the run says why not: from the files to the scores."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfit.assembly.task import assembly_of
from segfit.errors import SegFitError
from tests.integration.evaluating import evaluate
from tests.integration.training import compose_run, resume, same, train, weights_of
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


def test_sides_that_flips_confuse_are_told_with_the_remedy() -> None:
    def told(*overrides: str) -> list[str]:
        names = "data.class_names=[face,left_eye,right_eye,nose]"
        config = compose_run(names, *overrides)
        sources = assembly_of(config).make_sources(config)
        return list(assembly_of(config).check_sources(config, sources, {}).notices)

    (notice,) = told()
    assert notice == (
        "A mirror image exchanges left_eye and right_eye, but flips do not: set augmentation.swap=[[1,2]] in training, or "
        "augmentation.hflip=0."
    )
    assert told("augmentation.swap=[[2,1]]") == []
    assert told("augmentation.hflip=0") == []
    assert told("augmentation=none") == []
    faces = compose_run("data=face_parsing", "data.root=x", base=())
    assert assembly_of(faces)._unswapped(faces) == ""


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
