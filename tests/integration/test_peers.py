"""docs/benchmarks/peers.py: the clock that all are timed by, turns, tables, going on, what is missing."""

import importlib.util
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integration.training import ROOT, TINY, finished, one_thread

SCRIPT = ROOT / "docs" / "benchmarks" / "peers.py"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("peers")


@pytest.fixture
def contestants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("contestants")


class Pipe:
    """The end of a connection that a contestant has."""

    def __init__(self, *orders: str) -> None:
        self.orders = iter(orders)
        self.said: list[Any] = []

    def send(self, message: Any) -> None:
        self.said.append(message)

    def recv(self) -> str:
        return next(self.orders)


class Epochs:
    """A loader that counts what it gives."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.given = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            self.given += 1
            yield self.given


def consume(
    contestants: ModuleType,
    loader: Epochs,
    pipe: Pipe,
    warm: int,
    steps: int,
    work: Callable[[int], None] = lambda _: None,
) -> None:
    clock = contestants.Clock(pipe, warm, steps, lambda: None)
    clocked = contestants.Clocked(loader, clock)
    epochs = map(work, chain.from_iterable(repeat(clocked)))
    with pytest.raises(contestants.EnoughError):
        deque(epochs, maxlen=0)


def test_a_block_is_warm_and_counted_steps(contestants: ModuleType) -> None:
    loader, pipe = Epochs(100), Pipe("go", "go", "stop")
    consume(contestants, loader, pipe, warm=1, steps=3)
    _, *times = pipe.said
    assert len(times) == 2
    assert all(0 < waited < seconds for seconds, waited in times)
    assert loader.given == 2 * (1 + 3)


def test_a_block_aside_is_no_part_of_the_loop(contestants: ModuleType) -> None:
    pipe, steps = Pipe("aside", "go", "aside", "stop"), []
    clock = contestants.Clock(pipe, 1, 3, lambda: None)
    clock.aside = lambda: steps.append("aside")
    loader = Epochs(100)
    with pytest.raises(contestants.EnoughError):
        deque(map(str, contestants.Clocked(loader, clock)), maxlen=0)
    assert len(pipe.said) == 1 + 3
    assert loader.given == 1 + 3
    assert len(steps) == 2 * (1 + 3)


def test_a_block_never_spans_two_epochs(contestants: ModuleType) -> None:
    loader, pipe = Epochs(6), Pipe("go", "go", "stop")
    consume(contestants, loader, pipe, warm=1, steps=3)
    # 4 of the first epoch, its last 2 for nothing, 4 of the second
    assert loader.given == 10


def test_an_epoch_shorter_than_a_block_is_refused(contestants: ModuleType) -> None:
    with pytest.raises(Exception, match="3 batches, fewer than a block") as caught:
        consume(contestants, Epochs(3), Pipe("go"), warm=1, steps=3)
    assert type(caught.value).__name__ == "SegFitError"


def test_waiting_for_data_is_timed_apart(
    contestants: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Slow(Epochs):
        def __iter__(self) -> Iterator[int]:
            for batch in super().__iter__():
                now[0] += 0.25  # seconds that the loop waits
                yield batch

    def work(_: int) -> None:
        now[0] += 0.75

    monkeypatch.setattr(contestants.time, "perf_counter", lambda: now[0])
    pipe = Pipe("go", "stop")
    consume(contestants, Slow(100), pipe, warm=1, steps=4, work=work)
    assert pipe.said[1] == (1.0, 0.25)


@pytest.mark.parametrize("kind", ["bare", "segfit"])
def test_ours_run_until_they_are_stopped(
    contestants: ModuleType, tmp_path: Path, kind: str
) -> None:
    config = contestants.composed([*TINY, "loss=ce", "augmentation=none", "precision=fp32"])
    pipe = Pipe("go", "stop")
    clock = contestants.Clock(pipe, 1, 2, lambda: None)
    with one_thread(), pytest.raises(contestants.EnoughError):
        contestants.KINDS[kind](config, tmp_path, clock)
    facts, (seconds, waited) = pipe.said
    assert facts["precision"] == "fp32"
    assert facts["workers"] == "0"
    assert 0 <= waited < seconds


@pytest.mark.parametrize(
    ("section", "root"), [("loop", None), ("peers", "somewhere"), ("smp", None)]
)
def test_every_case_composes(
    peers: ModuleType, contestants: ModuleType, section: str, root: str | None
) -> None:
    options = peers.parsed(["--only", section, *(["--root", root] if root else [])])
    for case in peers.cases_of(options):
        for contestant in case.contestants:
            shared = peers.overrides_of(case, options)
            config = contestants.composed([*shared, *contestant.overrides])
            assert config.model.variant == case.model
            assert config.precision.name == case.precision
            assert config.data.name == ("folder" if root else "shapes")


def result(*rounds: list[float]) -> dict[str, Any]:
    facts = {"model": "m", "precision": "fp32", "workers": "0", "threads": "2 of 2 cores"}
    return {"facts": facts, "rounds": list(rounds)}


def test_ratios_are_taken_within_a_round(peers: ModuleType) -> None:
    # the machine was twice as slow in the second of three rounds
    results = {
        "ours": result([0.1, 0.0], [0.2, 0.0], [0.1, 0.0]),
        "theirs": result([0.15, 0.03], [0.3, 0.06], [0.15, 0.03]),
    }
    *_, ours, theirs = peers.table(results, 4)
    assert ours == "| ours | 100.0 (100.0–150.0) | 40.00 | 1 | 0.0 % | m, fp32, 0 workers |"
    assert (
        theirs
        == "| theirs | 150.0 (150.0–225.0) | 26.67 | 1.500 (1.500–1.500) | 20.0 % | m, fp32, 0 workers |"
    )


def test_missing_peers_name_the_command(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        peers.main(["--only", "peers", "smp"])
    message = str(caught.value)
    assert "accelerate, lightning, segmentation_models_pytorch: not installed" in message
    assert "pip install -r requirements-peers.txt" in message
    assert (ROOT / "requirements-peers.txt").exists()
    assert peers.missing(["loop"]) == []


def test_a_second_call_goes_on(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[str] = []

    def measure(case: Any, *_: Any) -> dict[str, dict[str, Any]]:
        measured.append(case.name)
        return {one.name: result([0.1, 0.01]) for one in case.contestants}

    monkeypatch.setattr(peers, "measure", measure)
    call = ["--only", "loop", "--models", "b0", "--out", str(tmp_path / "results")]
    peers.main([*call, "--precisions", "fp32"])
    peers.main([*call, "--precisions", "fp32", "bf16"])
    assert measured == ["loop b0 fp32", "loop b0 bf16"]
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["cases"]) == measured
    assert len(found["commands"]) == 2
    text = (tmp_path / "results.md").read_text()
    assert "What the loop costs: b0, bf16, 256 px, batch 4, 1 rounds, threads: 2 of 2" in text

    peers.main([*call, "--precisions", "fp32", "--batch", "2"])
    assert measured[2:] == ["loop b0 fp32"]


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    """The loop by itself, and whoever of the others is installed."""
    sections = ["loop"]
    if importlib.util.find_spec("lightning") and importlib.util.find_spec("accelerate"):
        sections.append("peers")
    if importlib.util.find_spec("segmentation_models_pytorch"):
        sections.append("smp")
    out = tmp_path / "results"
    done = finished(
        [sys.executable, str(SCRIPT), "--quick", "--only", *sections, "--out", str(out)], ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.with_suffix(".json").read_text())["cases"]
    assert list(cases) == [f"{section} b0 fp32" for section in sections]
    for results in cases.values():
        for contestant in results.values():
            assert contestant["facts"]["precision"] == "fp32"
            assert len(contestant["rounds"]) == 2
            assert all(0 <= waited < seconds for seconds, waited in contestant["rounds"])
