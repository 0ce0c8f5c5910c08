"""What an option says, it does, or the run says why not: from the files to the scores."""

import numpy as np
import pytest

from segfit.assembly.task import assembly_of
from segfit.errors import SegFitError
from tests.integration.evaluating import evaluate
from tests.integration.training import compose_run, train
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
