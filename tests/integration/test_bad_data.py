"""A data set that cannot be trained on: every problem named, nothing left behind."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfit.errors import SegFitError
from tests.integration.training import TINY, train, train_by_command_line
from tests.unit.data.files import names, noise, png, save, write_pairs

OPTIONS = (
    *(text for text in TINY if not text.startswith(("data", "epochs"))),
    *("data=folder", "data.num_classes=3", "epochs=1"),
)


def missing_root(root: Path) -> None:
    del root


def empty_root(root: Path) -> None:
    root.mkdir()


def mask_value_beyond_the_classes(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    save(root / "masks/003.png", noise(64, 64, high=3) + np.uint8(5))


def masks_of_0_and_255(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    for name in names(8):
        save(root / f"masks/{name}.png", noise(64, 64, high=2) * np.uint8(255))


def sizes_that_differ(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    save(root / "masks/002.png", noise(32, 64, high=3))


def unreadable_file(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    (root / "images/004.png").write_bytes(b"no picture")


def too_few_images(root: Path) -> None:
    write_pairs(root, names(1), size=(64, 64))


def no_files_at_all(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    for path in (root / "images/001.png", root / "images/002.png", root / "masks/003.png"):
        path.unlink()
    os.mkfifo(root / "images/001.png")
    (root / "images/002.png").symlink_to("/dev/zero")
    (root / "masks/003.png").symlink_to("003.png")


def bomb_and_animation(root: Path) -> None:
    write_pairs(root, names(8), size=(64, 64))
    (root / "images/005.png").write_bytes(png(60_000, 60_000, 8, 2, b"\0" * 1000))
    frames = [Image.fromarray(noise(64, 64, seed=seed, high=3)) for seed in range(2)]
    frames[0].save(root / "masks/006.png", save_all=True, append_images=frames[1:])


CASES = {
    missing_root: ["data.root"],
    empty_root: ["is empty"],
    mask_value_beyond_the_classes: ["003.png", "5", "num_classes"],
    masks_of_0_and_255: ["255", "label_map"],
    sizes_that_differ: ["002", "64", "32"],
    unreadable_file: ["004.png"],
    too_few_images: ["1"],
    no_files_at_all: ["001.png: no file", "002.png: no file", "003.png: unreadable"],
    bomb_and_animation: ["005.png: larger than 178 megapixels", "006.png: holds 2 frames"],
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_what_is_wrong_is_named(tmp_path, make):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(SegFitError) as error:
        train(tmp_path / "run", f"data.root={root}", base=OPTIONS)
    for word in CASES[make]:
        assert word in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_all_that_is_wrong_is_reported_at_once_by_the_command_line(tmp_path):
    root = tmp_path / "data"
    unreadable_file(root)
    save(root / "masks/002.png", noise(32, 64, high=3))
    save(root / "masks/003.png", noise(64, 64, high=3) + np.uint8(5))
    code, output = train_by_command_line(tmp_path, f"data.root={root}", *OPTIONS)
    assert code == 2, output
    for name in ("002", "003", "004"):
        assert name in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("outputs/**/*"))
