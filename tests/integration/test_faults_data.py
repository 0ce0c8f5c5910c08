"""Images that cannot be read, workers that die, odd names and clocks: what a run makes of them."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from segfit.errors import SegFitError
from tests.integration.training import (
    TINY,
    command,
    environment,
    resume,
    same,
    the_run,
    train,
    train_by_command_line,
)
from tests.unit.data.files import names, save, write_pairs

OPTIONS = (
    *(text for text in TINY if not text.startswith("data")),
    *("data=folder", "data.num_classes=3", "data.on_bad_sample=skip"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sixteen images to train on, two of which are broken, and five to validate, one of which is."""
    root = tmp_path / "data"
    write_pairs(root / "train", names(16), size=(40, 48))
    write_pairs(root / "val", names(5), size=(40, 48))
    (root / "train/images/003.png").write_bytes(b"no picture")
    mask = root / "train/masks/011.png"
    mask.write_bytes(mask.read_bytes()[:60])
    (root / "val/images/002.png").write_bytes(b"")
    return root


def told(lines: list[str], name: str) -> list[str]:
    return [
        line for line in lines if f"{name}.png: unreadable" in line and "takes its place" in line
    ]


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("check", ["full", "off"])
def test_a_run_goes_on_without_bad_images_and_names_each_once(root, tmp_path, cache, check):
    done = train(
        tmp_path / "run",
        *(f"data.root={root}", f"data.cache={cache}", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"data.check={check}", "epochs=3", "loader.workers=1", "loss.class_weights=balanced"),
        base=OPTIONS,
    )
    assert done.end.reason == "finished"
    assert done.end.updates == 3 * 4
    for name in ("train/images/003", "train/masks/011"):
        assert len(told(done.notices, name)) == 1
    assert (
        sum("val/images/002.png" in line and "counts nowhere" in line for line in done.notices) == 1
    )
    summary = [line for line in done.notices if "does without 3 images" in line]
    assert len(summary) == (check == "full")
    kept = [line for line in done.notices if "21 images, 18 of them decoded now, 3 that" in line]
    assert len(kept) == (cache != "none")


def test_going_on_is_exact_without_bad_images_too(root, tmp_path):
    whole = train(tmp_path / "whole", f"data.root={root}", "epochs=3", base=OPTIONS)
    train(tmp_path / "parts", f"data.root={root}", "epochs=3", "max_steps=6", base=OPTIONS)
    rest = resume(tmp_path / "parts", "max_steps=null", "loader.workers=2")
    assert rest.losses == whole.losses[6:]
    assert same(rest.model.state_dict(), whole.model.state_dict())


def test_what_is_else_wrong_still_ends_it(root, tmp_path):
    save(root / "train/masks/001.png", np.zeros((40, 47), np.uint8))
    with pytest.raises(SegFitError, match=r"different size") as error:
        train(tmp_path / "run", f"data.root={root}", base=OPTIONS)
    assert "003.png" not in str(error.value)


@pytest.mark.parametrize("check", ["full", "off"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_in_which_nothing_can_be_read_ends_it(root, tmp_path, check, split):
    for path in (root / split / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SegFitError, match=r"none (of the images )?can be read"):
        train(tmp_path / "run", f"data.root={root}", f"data.check={check}", base=OPTIONS)


def test_evaluation_counts_what_can_be_read_and_tells_of_the_rest(root, tmp_path):
    code, output = train_by_command_line(tmp_path, f"data.root={root}", *OPTIONS, "epochs=1")
    assert code == 0, output
    assert output.count("another image takes its place") == 2
    run = the_run(tmp_path)
    done = subprocess.run(
        command(f"run={run}", script="evaluate.py"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "002.png" in done.stdout + done.stderr
    metrics = json.loads((run / "evaluation/val/metrics.json").read_text())
    assert metrics["images"] == 4
    (line,) = metrics["left_out"]
    assert "002.png" in line
    recorded = json.loads((run / "metrics.json").read_text())["best"]
    assert metrics["scores"] == pytest.approx(recorded, abs=1e-6)
    assert sorted(path.name for path in (run / "evaluation/val/masks").iterdir()) == [
        "000.png", "001.png", "003.png", "004.png",
    ]  # fmt: skip


def test_shared_memory_that_is_too_small_ends_a_run_at_once_and_says_so(tmp_path):
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    unshare = shutil.which("unshare")
    if (
        unshare is None
        or subprocess.run([unshare, "-m", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("no rights to mount a small /dev/shm")
    arguments = command(*TINY, "loader.workers=1", "image_size=256")
    done = subprocess.run(
        [unshare, "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Shared memory (/dev/shm) is too small" in done.stderr
    assert "Traceback" not in done.stderr
