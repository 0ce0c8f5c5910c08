"""report.html of a run and of a sweep, as files and in a browser."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from segfit.commands import train as training
from segfit.report.lines import validations
from segfit.runs import folder as runs
from tests.integration.evaluating import evaluate
from tests.integration.training import TINY, command, finished, one_thread
from tests.unit.data.files import save

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


COLORS = {f"{index}.png": (250, 40 * index + 20, 90) for index in range(4)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Train on images whose left half has a colour and class 1, and which augmentation mirrors."""
    folder = tmp_path_factory.mktemp("page")
    for split in ("train", "val"):
        for name, color in COLORS.items():
            image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
            image[:, :32], mask[:, :32] = color, 1
            save(folder / "data" / split / "images" / name, image)
            save(folder / "data" / split / "masks" / name, mask)
    options = [text for text in TINY if not text.startswith("data")]
    options += [
        "data=folder",
        "data.root=data",
        "data.num_classes=2",
        "report.page=true",
        "epochs=1",
    ]
    options += ["augmentation=kornia-gpu", "augmentation.hflip=1", "augmentation.affine=0"]
    options += [f"augmentation.{name}=0" for name in ("color_jitter", "blur", "noise")]
    done = finished(command(*options, "hydra.sweep.dir=sweep", "lr=0.001,0.01", "-m"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    evaluate(folder, run=str(folder / "sweep/0"))
    return folder / "sweep"


def pictures(page: str) -> dict[str, Image.Image]:
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    return {name: Image.open(io.BytesIO(base64.b64decode(data))) for name, data in found}


def test_the_page_of_a_run_holds_all_of_it(sweep):
    page = (sweep / "0/report.html").read_text()
    assert not re.search(r"(src|href)=.?(http|/)", page)  # opens without a network
    shown = pictures(page)
    assert {"curves", "first_batch", "worst", "best", "confusion_matrix"} <= set(shown)
    assert shown["curves"].size == Image.open(sweep / "0/curves.png").size
    for text in (
        "miou",
        "peak memory",
        "python evaluate.py run=",
        "base_channels: 8",
        "utilisation",
    ):
        assert text in page, text


def test_the_page_of_a_sweep_links_its_jobs(sweep):
    page = (sweep / "report.html").read_text()
    links = re.findall(r'href="([^"]*)"', page)
    assert sorted(links) == ["0/report.html", "1/report.html"]
    assert all((sweep / link).exists() for link in links)
    assert "0.01" in page
    assert len(pictures(page)) == 1
    assert page.count("<img") == 2


def test_the_first_batch_is_drawn_as_the_network_got_it(sweep):
    drawn = np.asarray(Image.open(sweep / "0/first_batch.png")).astype(int)
    painted = []
    for color in COLORS.values():
        rows, columns = np.nonzero((np.abs(drawn - color) <= 1).all(2))
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        width = 2 * (right - left)  # of the image, whose other half is black
        assert bottom - top == pytest.approx(width, abs=4)
        assert (drawn[top:bottom, left - width // 2 + 4 : left - 4] == 0).all()
        mask = drawn[top:bottom, right + 10 : right + 10 + width]  # beside it, painted on the image
        halves = (
            mask[:, : width // 2 - 4] / 0.6,
            (mask[:, width // 2 + 4 : -4] - 0.4 * np.array(color)) / 0.6,
        )
        painted.append([np.median(half, (0, 1)) for half in halves])
        assert all(
            (np.abs(half - found) < 3).all()
            for half, found in zip(halves, painted[-1], strict=True)
        )
    assert np.ptp(painted, axis=0).max() < 3  # each class has a colour, whatever the image
    assert np.abs(painted[0][0] - painted[0][1]).max() > 50


def test_drawing_the_first_batch_changes_no_loss_and_is_done_once(sweep, monkeypatch):
    monkeypatch.chdir(sweep.parent)
    run, without = sweep / "1", sweep.parent / "without"
    config = runs.load_config(run)
    with one_thread():
        training.train(OmegaConf.merge(config, {"report": {"page": False}}), [], without)
    assert not (without / "first_batch.png").exists()
    losses = [
        [line["train_loss"] for line in validations(one / "scores.jsonl")] for one in (run, without)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    shutil.copytree(run, sweep.parent / "resumed")
    (sweep.parent / "resumed/first_batch.png").unlink()
    config.epochs = 2
    with one_thread():
        training.train(config, [], sweep.parent / "resumed", resumed=True)
    assert len(validations(sweep.parent / "resumed/scores.jsonl")) == 2
    assert not (sweep.parent / "resumed/first_batch.png").exists()


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt install chromium")
def test_a_browser_shows_it(sweep, tmp_path):
    shot = tmp_path / "shot.png"
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,1400",
    )
    address = (sweep / "0/report.html").absolute().as_uri()
    subprocess.run(
        [BROWSER, *options, f"--screenshot={shot}", address], check=True, capture_output=True, timeout=120
    )  # fmt: skip
    seen = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    blue = (
        np.abs(seen.astype(int) - (0x1F, 0x77, 0xB4)).sum(1) < 30
    ).sum()  # matplotlib's first line
    assert blue > 100
    assert (seen.sum(1) < 200).sum() > 1000  # text
