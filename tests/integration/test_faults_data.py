"""Images that cannot be read, workers that die, odd names and clocks: what a run makes of them."""

import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from segfit.data.images import ImageReader
from segfit.errors import SegFitError
from tests.integration.training import (
    TINY,
    command,
    finished,
    mounting,
    resume,
    same,
    train,
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


def replaced(lines: list[str], name: str) -> list[str]:
    return [
        line for line in lines if f"{name}.png: unreadable" in line and "takes its place" in line
    ]


@pytest.mark.parametrize(("check", "cache"), [("full", "none"), ("off", "ram"), ("full", "disk")])
def test_a_run_goes_on_without_bad_images_names_each_once_and_writes_nothing_there(
    root, tmp_path, cache, check
):
    before = listing(root)
    done = train(
        tmp_path / "run",
        *(f"data.root={root}", f"data.cache={cache}", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"data.check={check}", "epochs=3", "loader.workers=1", "loss.class_weights=balanced"),
        base=OPTIONS,
    )
    assert done.end.reason == "finished"
    assert done.end.updates == 3 * 4
    for name in ("train/images/003", "train/masks/011"):
        assert len(replaced(done.notices, name)) == 1
    assert sum("val/images/002.png" in line and "is left out" in line for line in done.notices) == 1
    summary = [line for line in done.notices if "leaves out 3 images" in line]
    assert len(summary) == (check == "full")
    assert listing(root) == before
    kept = [line for line in done.notices if "21 samples, 18 of them decoded now, 3 that" in line]
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


@pytest.mark.parametrize(("check", "split"), [("full", "train"), ("off", "val")])
def test_a_split_in_which_nothing_can_be_read_ends_it(root, tmp_path, check, split):
    for path in (root / split / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SegFitError, match=r"none (of the (images|samples) )?can be read"):
        train(tmp_path / "run", f"data.root={root}", f"data.check={check}", base=OPTIONS)


NAMES = [
    "ü é 日本", "a=b,c", "it's \"quoted\"", "{x} $HOME %d #1 & ~", "[link=y]bold[/]", "-dash", "cafe\u0301", "a;b|c*?<>",
    "back\\slash", "tab\there", os.fsdecode(b"latin\xe9"), ".5", "x" * 200,
]  # fmt: skip


def listing(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """Return what would tell that somebody wrote there."""
    stats = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in stats.items()}


def run_cli(folder: Path, script: str, *arguments: str) -> str:
    done = finished(command(*arguments, script=script), folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_odd_names_and_bad_images_pass_through_train_resume_and_evaluate_that_write_nothing_there(
    tmp_path,
):
    root = tmp_path / "odd, ü=1 'q' \"d\" [b] $x"
    write_pairs(root / "train", NAMES, size=(40, 48))
    write_pairs(root / "val", [f"sub {name}/{name}" for name in NAMES[:5]], size=(40, 48))
    for bad in (f"train/images/{NAMES[10]}", f"val/images/sub {NAMES[0]}/{NAMES[0]}"):
        (root / f"{bad}.png").write_bytes(b"no picture")
    before = listing(root)
    quoted = str(root).replace("\\", "\\\\").replace('"', '\\"')
    cache = ("data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", "hydra.run.dir='run ü 1'")
    output = run_cli(tmp_path, "train.py", *OPTIONS, *cache, f'data.root="{quoted}"', "epochs=1")
    assert output.count("another sample takes its place") == 1
    assert "udce9.png: unreadable" in output
    run_cli(tmp_path, "train.py", "resume='run ü 1'", "epochs=2")
    output = run_cli(tmp_path, "evaluate.py", "run='run ü 1'")
    images = root / "val/images"
    quoted = str(images).replace('"', '\\"')
    output = run_cli(
        tmp_path, "evaluate.py", "run='run ü 1'", f'images="{quoted}"', "out=predicted"
    )
    assert listing(root) == before
    assert "is left out" in output
    assert json.loads((tmp_path / "predicted/metrics.json").read_text())["samples"] == 4

    run = tmp_path / "run ü 1"
    assert "another sample takes its place" in (run / "train.log").read_text()
    metrics = json.loads((run / "evaluation/val/metrics.json").read_text())
    assert metrics["samples"] == 4
    (line,) = metrics["left_out"]
    assert f"{NAMES[0]}.png: unreadable" in line
    assert "is left out" in output
    recorded = json.loads((run / "metrics.json").read_text())["best"]
    scores = {name: metrics["scores"][name] for name in recorded}
    assert scores == pytest.approx(recorded, abs=1e-6)
    masks = run / "evaluation/val/masks"
    found = sorted(path.relative_to(masks).as_posix() for path in masks.rglob("*.png"))
    assert found == sorted(f"sub {name}/{name}.png" for name in NAMES[1:5])


@pytest.mark.slow
def test_a_run_of_200_000_files_starts_within_a_minute_once_they_were_indexed(tmp_path):
    """A minute of the processor's time, whatever else this machine does: the promise of docs/reliability.md."""
    kinds = write_pairs(
        tmp_path / "kinds", names(10), size=(32, 32)
    )  # a file has 65,000 names at most
    for kind in ("images", "masks"):
        (tmp_path / "big" / kind).mkdir(parents=True)
        for number in range(100_000):
            name = f"{number:06d}.png"
            os.link(kinds / kind / f"{number % 10:03d}.png", tmp_path / "big" / kind / name)
    small = ("max_steps=1", "limit_val_batches=1", "report.logger=[]", "image_size=32")
    options = (text for text in OPTIONS if not text.startswith(("image_size", "data.on_bad")))
    # By env, or it would be forked, and no child of which the time is counted.
    line = ["env", *command(*options, f"data.root={tmp_path / 'big'}", *small)]
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = finished(line, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "80000 train, 20000 val" in done.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert seconds[1] <= min(60, seconds[0])
    shutil.rmtree(tmp_path / "big")


def test_a_clock_that_jumps_by_years_changes_nothing(root, tmp_path, monkeypatch):
    options = (f"data.root={root}", "loader.workers=1", "checkpoint.every_minutes=1", "epochs=2")
    kept = ("data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}")
    plain = train(tmp_path / "plain", *options, base=OPTIONS)
    now, jumps = time.time(), itertools.cycle([0, 4e8, -9e8, 1e9, -1e5, 3])
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    first, second = (train(tmp_path / name, *options, *kept, base=OPTIONS) for name in "ab")
    for done in (first, second):
        assert done.losses == plain.losses
        assert done.end.best_scores == plain.end.best_scores
        assert 0 < done.end.seconds < 60
    assert any("0 of them decoded now, 3 that" in line for line in second.notices)


def test_a_worker_that_crashes_in_a_decoder_ends_the_run_with_the_file_that_did_it(
    root, tmp_path, monkeypatch
):
    read = ImageReader.read

    def crash(self, path):
        if path.name == "005.png" and multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(self, path)

    monkeypatch.setattr(ImageReader, "read", crash)
    # torch looks after its workers every 5 s
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))
    with pytest.raises(SegFitError) as error:
        train(tmp_path / "run", f"data.root={root}", "loader.workers=1", base=OPTIONS)
    (problem,) = error.value.problems
    files = ", ".join(str(root / "train" / kind / "005.png") for kind in ("images", "masks"))
    assert problem.startswith(f"{files}: the data worker (pid ")
    assert "killed by SIGSEGV. A decoder crashed" in problem


SMALL_SHARED_MEMORY = """if True:
    import torch
    from segfit.tasks.segmentation.data.dataset import TrainDataset
    from segfit.tasks.segmentation.data.dataset import collate
    from segfit.data.loader import Loader
    from segfit.data.batches import EpochSampler
    from segfit.data.shapes import ShapesSource
    from segfit.errors import SegFitError
    dataset = TrainDataset(ShapesSource(64, resolution=32), (256, 256), "stretch")
    batches = Loader(dataset, collate, torch.device("cpu"), 1, batch_sampler=EpochSampler(64, 8, 0))
    try:
        print(len(list(batches)))
    except SegFitError as error:
        print(error)
"""


def test_shared_memory_that_is_too_small_is_reported_at_once_rather_than_waited_for(tmp_path):
    small = mounting("mount -t tmpfs -o size=1m tmpfs /dev/shm")
    done = finished([*small, sys.executable, "-c", SMALL_SHARED_MEMORY], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Shared memory (/dev/shm) is too small")
    assert done.stderr == ""
