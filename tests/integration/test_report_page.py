"""report.html of a run and of a sweep, as files and in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.training import TINY, command, finished
from tests.unit.data.files import save

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    options = ("report.page=true", "hydra.sweep.dir=sweep", "model.weights=null", "precision=fp32")
    done = finished(command(*TINY, *options[:2], "lr=0.001,0.01", "-m"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "sweep/0"
    done = finished(command(f"run={run}", "split=val", script="evaluate.py"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
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


def test_the_first_batch_is_drawn_as_the_network_got_it(tmp_path):
    """Images whose left half has a colour and class 1, which augmentation mirrors; drawing them changes no loss."""
    colors = {f"{index}.png": (250, 40 * index + 20, 90) for index in range(4)}
    for split in ("train", "val"):
        for name, color in colors.items():
            image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
            image[:, :32], mask[:, :32] = color, 1
            save(tmp_path / "data" / split / "images" / name, image)
            save(tmp_path / "data" / split / "masks" / name, mask)
    options = [text for text in TINY if not text.startswith(("data", "epochs", "augmentation"))]
    options += ["data=folder", "data.root=data", "data.num_classes=2", "epochs=1"]
    options += ["augmentation=kornia-gpu", "augmentation.hflip=1"]
    options += [
        f"augmentation.{name}=0" for name in ("vflip", "affine", "color_jitter", "blur", "noise")
    ]
    for folder, page in (("with", "true"), ("without", "false")):
        line = command(*options, f"report.page={page}", f"hydra.run.dir={folder}")
        done = finished(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / folder / "scores.jsonl").open()]
        for folder in ("with", "without")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "without/first_batch.png").exists()

    drawn = np.asarray(Image.open(tmp_path / "with/first_batch.png")).astype(int)
    assert "first_batch" in pictures((tmp_path / "with/report.html").read_text())
    painted = []
    for color in colors.values():
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

    (tmp_path / "with/first_batch.png").unlink()
    done = finished(command("resume=with", "epochs=2"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "with/scores.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "with/first_batch.png").exists()


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
