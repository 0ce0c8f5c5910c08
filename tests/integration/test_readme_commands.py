"""The README's commands are run, in a folder that holds what they name; made small by options at their end."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration.training import ROOT, command, finished
from tests.unit.data.files import save

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "outputs/2030-01-31/12-00-00"  # the README's
SMALL_RUN = (
    *("batch_size=2", "accumulate=1", "max_steps=1", "limit_val_batches=1"),
    *("loader.workers=0", "report.panels=0", "device=cpu", "precision=fp32"),
)
SMALL_SAMPLES = {
    "segmentation": ("image_size=32",),
    "restoration": ("patch_size=16", "model.base_channels=8", "model.num_blocks=1"),
    "forecasting": (),
}
SMALL = {
    "train": (*SMALL_RUN, "report.logger=[]", "report.page=false"),
    "benchmark": (*SMALL_RUN, "seconds=0.2"),
    "evaluate": ("workers=0",),
}
SHAPES = ("data.train_size=4", "data.val_size=2", "data.test_size=2", "data.resolution=32")


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    script = re.compile(r"^(\S*python|torchrun .*) (train|evaluate|benchmark)\.py")
    return sorted({line for line in lines if script.match(line)})


def run(
    arguments: list[str], place: Path, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    script, *rest = arguments
    line = command(*rest, script=script)
    return finished([sys.executable, *launcher, *line[1:]], place)


def task_of(words: list[str]) -> str:
    if any("etth1" in word for word in words):
        return "forecasting"
    return next((word[5:] for word in words if word.startswith("task=")), "segmentation")


def write_series(path: Path, hours: int, columns: list[str]) -> None:
    rng = np.random.default_rng(0)
    path.parent.mkdir(exist_ok=True)
    start = np.datetime64("2016-07-01T00:00:00")
    rows = 50 + rng.normal(0, 1, (hours, len(columns)))
    lines = [
        f"{start + np.timedelta64(hour, 'h')},{','.join(map(str, row))}"
        for hour, row in enumerate(rows)
    ]
    path.write_text("\n".join([",".join(["date", *columns]), *lines]) + "\n")


def write_masks(root: Path, values: list[int], *, gray: bool = False) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        image = rng.integers(0, 256, (40, 48) if gray else (40, 48, 3)).astype(np.uint8)
        mask = np.array(values, np.uint8)[rng.integers(0, len(values), (40, 48))]
        save(root / "images" / f"case{number}_{number}.png", image)
        save(root / "masks" / f"case{number}_{number}.png", mask)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the README's run, its photos and the data sets that it names."""
    place = tmp_path_factory.mktemp("readme")
    write_masks(place / "CelebAMask-HQ", list(range(19)))
    write_masks(place / "slices", list(range(4)), gray=True)
    write_masks(place / "photos", [0])
    write_masks(place / "more", list(range(5)))
    write_series(place / "ETTh1.csv", 20 * 30 * 24, ["load", "OT"])
    for name in ("a", "b", "c"):
        write_series(place / "prices" / f"{name}.csv", 1500, ["open", "close"])
    model = ("model=cnn", "model.base_channels=8", "epochs=3", "report.logger=[]")
    done = run(
        ["train.py", *model, *SMALL_RUN, "image_size=32", *SHAPES, f"hydra.run.dir={RUN}"], place
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.parametrize(
    "line",
    [
        # test_torchrun.py trains with two processes, too
        pytest.param(line, marks=pytest.mark.slow) if line.startswith("torchrun") else line
        for line in commands()
    ],
)
def test_the_command_runs(line: str, place: Path) -> None:
    program, *words = shlex.split(line, comments=True)
    launcher: tuple[str, ...] = ()
    if program == "torchrun":
        first = next(i for i, word in enumerate(words) if not word.startswith("--"))
        launcher, words = ("-m", "torch.distributed.run", *words[:first]), words[first:]
    kind = words[0].removesuffix(".py")
    if "data=folder" in words:
        two = any("label_map" in word for word in words)
        write_masks(place / "my_data", [0, 255] if two else [0, 1, 2])
    small = list(SMALL[kind])
    if any(word.startswith("resume=") for word in words):
        # Whichever of them comes first, there is something left for the other.
        small = [f"max_steps={3 if any(word.startswith('batch_size=') for word in words) else 2}"]
    elif kind != "evaluate":
        small += SMALL_SAMPLES[task_of(words)]
    task = task_of(words)
    if task == "segmentation" and kind != "evaluate" and any("=8gb" in word for word in words):
        small.append("model.variant=b0")  # with nothing but its sizes changed
    if any(word.startswith("init=") for word in words):
        small += ["model=cnn", "model.base_channels=8"]  # as the run has
    given = {word.split("=")[0] for word in words}
    small = [text for text in small if text.split("=")[0] not in given]
    if (
        kind != "evaluate"
        and task != "forecasting"
        and not any(w.startswith(("data=", "experiment=", "resume=")) for w in words)
    ):
        small += SHAPES
    # One job is as good as three: test_sweep.py has several.
    words = [re.sub(r"^(\w+=\w+),.*", r"\1", word) for word in words]
    done = run([*words, *small], place, launcher)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_they_were_found() -> None:
    assert len(commands()) >= 13


def test_the_python_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    save(place / "street.jpg", np.zeros((40, 48, 3), np.uint8))
    monkeypatch.chdir(place)
    found: dict[str, np.ndarray] = {}
    exec(code, found)
    assert found["mask"].shape == (40, 48)


def test_the_notebook_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python; test_readme.py holds its commands to the README's."""
    notebook = json.loads((ROOT / "notebooks" / "segfit.ipynb").read_text(encoding="utf-8"))
    shutil.copytree(place / RUN, tmp_path / "outputs" / "demo")
    (tmp_path / "train.py").touch()
    save(tmp_path / "outputs/demo/evaluation/test/worst.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            # what IPython hands to a shell, or does by itself
            exec(re.sub(r"^( *)[!%].*$", r"\1pass", "".join(cell["source"]), flags=re.M), found)
    assert found["prediction"].mask.shape == (96, 96)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_what_the_dockerfile_copies_is_all_that_its_command_needs(tmp_path: Path) -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    ]
    copied = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY ")]
    sources = [(source, target) for *names, target in copied for source in names]
    assert sorted(kept) == sorted(source for source, _ in sources)
    for source, target in sources:
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "local.yaml")
            shutil.copytree(ROOT / source, tmp_path / target, ignore=ignore)
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    wanted = re.findall(r"pip install .*-r (\S+)", text)
    assert all((tmp_path / name).is_file() for name in wanted)
    (entry,), arguments = (
        json.loads(re.search(rf"^{word} (.*)$", text, re.M)[1])  # type: ignore[index]
        for word in ("ENTRYPOINT", "CMD")
    )
    assert entry == "python"
    done = subprocess.run(
        [sys.executable, *arguments, *SMALL_RUN, "image_size=32", "data.train_size=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("outputs/*/*/report.html"))) == 1
