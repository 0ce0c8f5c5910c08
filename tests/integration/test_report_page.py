"""report.html of a run and of a sweep, as files and in a browser."""

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.training import TINY, command, finished

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
    assert {"curves", "worst", "best", "confusion_matrix"} <= set(shown)
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
