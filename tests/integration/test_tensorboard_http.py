"""What is written is what a real TensorBoard shows."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfit.report.loggers import Loggers
from segfit.report.tensorboard import TensorBoardLogger
from tests.integration.tensorboard_server import ReadBack, read_back
from tests.unit.report import events


def write_run(log_dir: Path, batch_size: int, resumed: bool = False) -> None:
    """Write a run of two epochs; a resumed one was killed after 7 updates, 3 after its checkpoint."""

    def report(resume_step: int | None = None) -> Loggers:
        hparams = {"model": "segformer_b0", "batch_size": batch_size, "lr": 3e-4}
        config = f"batch_size: {batch_size}\n"
        return Loggers({"tensorboard": TensorBoardLogger(log_dir, config, hparams, resume_step)})

    board = report()
    events.train(board, last=7 if resumed else 8)
    if resumed:
        board.close()
        board = report(resume_step=4)
        events.train(board, first=4)
    board.end(events.end_log(8))
    board.close()


@pytest.fixture(scope="module", params=["auto", "false"], ids=["default", "slow_loader"])
def sweep(request, tmp_path_factory) -> ReadBack:
    """Two runs below one folder, as a sweep leaves them; the second one was killed and resumed."""
    logdir = tmp_path_factory.mktemp("sweep") / "runs"
    write_run(logdir / "0" / "tensorboard", batch_size=2)
    write_run(logdir / "1" / "tensorboard", batch_size=4, resumed=True)
    return read_back(logdir, load_fast=request.param)


RUNS = ["0/tensorboard", "1/tensorboard"]


@pytest.mark.parametrize("run", RUNS)
def test_scalars_by_update_each_step_once(sweep, run):
    scalars = sweep.scalars[run]
    assert scalars["loss/train"] == [(update, pytest.approx(1 / update)) for update in (2, 4, 6, 8)]
    assert scalars["score/miou"] == [(4, pytest.approx(0.5)), (8, pytest.approx(0.6))]
    assert scalars["score_iou/liver"] == [(4, pytest.approx(0.5)), (8, pytest.approx(0.6))]
    shown = sorted({tag.split("/")[0] for tag in (*scalars, *sweep.images[run])})
    expected = [
        "loss",
        "score",
        "score_best",
        "score_iou",
        "speed",
        "system",
        "train",
        "validation",
    ]
    assert shown == expected  # what one looks at first comes first


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("tag", ["validation/panel/case_1", "validation/confusion_matrix"])
def test_images_can_be_looked_at(sweep, run, tag):
    images = sweep.images[run][tag]
    assert images[-1][0] == 8
    assert len({step for step, _ in images}) == len(images)
    picture = np.asarray(Image.open(io.BytesIO(images[-1][1])).convert("RGB"))
    assert picture.std() > 10


def test_the_config_is_shown_as_code(sweep):
    assert "<code" in sweep.texts["0/tensorboard"]["config/text_summary"]
    assert "batch_size: 2" in sweep.texts["0/tensorboard"]["config/text_summary"]
    assert "<td>cpu [2 cores]</td>" in sweep.texts["0/tensorboard"]["facts/text_summary"]


def test_the_hparams_tab_compares_the_runs_in_one_table(sweep):
    assert sorted(sweep.rows) == RUNS
    assert [sweep.rows[run]["hparams"]["batch_size"] for run in RUNS] == [2, 4]
    for run in RUNS:
        assert sweep.rows[run]["hparams"]["model"] == "segformer_b0"
        assert sweep.rows[run]["metrics"]["score_best/miou"] == pytest.approx(0.6)
