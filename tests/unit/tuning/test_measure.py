"""Speed is measured on the real step; nothing here asserts how fast this machine is."""

import json
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from segfit.assembly.training import Training, make_training
from segfit.tuning import measure
from segfit.tuning.measure import LEAST_STEPS, Speed, Stopwatch, inference_speed, train_speed
from tests.integration.training import compose_run, one_thread
from tests.unit.engine.fakes import weights

INSTANT = {"seconds": 1e-6, "warmup": 2}


def build(folder: Path, *overrides: str) -> Training:
    with one_thread():
        return make_training(compose_run("report.panels=0", *overrides), folder, print)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return build(tmp_path, "accumulate=2", "batch_size=3")


def sound(speed: Speed) -> bool:
    return (
        speed.samples_per_second > 0
        and 0 < speed.ms_p5 <= speed.ms_median <= speed.ms_p95
        and 0 <= speed.data_wait < 1
        and speed.peak_gib > 0
    )


@pytest.mark.parametrize("resident", [False, True])
def test_training_makes_real_updates(training: Training, resident: bool) -> None:
    before = weights(training.fit.state.model)
    speed = train_speed(training, **INSTANT, resident=resident)
    assert sound(speed)
    assert speed.steps == LEAST_STEPS
    assert training.fit.state.progress.update == LEAST_STEPS + 2
    assert not torch.equal(before, weights(training.fit.state.model))


def test_a_step_is_a_whole_update(training: Training) -> None:
    watch = Stopwatch(training.fit.state.device, seconds=1e-6, warmup=0)
    counted = [len(window) for window in watch.over(measure.windows(training.fit), lambda _: 6)]
    assert counted == [2, 2, 2]
    speed = watch.speed
    seconds = LEAST_STEPS * 6 / speed.samples_per_second
    assert seconds >= speed.steps * speed.ms_p5 / 1e3


def test_windows_go_on_over_epochs(tmp_path: Path) -> None:
    fit = build(
        tmp_path, "accumulate=2", "batch_size=8"
    ).fit  # 3 batches an epoch: the last window has one
    windows = measure.windows(fit)
    assert [len(next(windows)) for _ in range(4)] == [2, 1, 2, 1]


def test_resident_batches_are_read_once(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    epoch = training.fit.train.epoch

    def heard(number: int, start_batch: int) -> Any:
        epochs.append(number)
        return epoch(number, start_batch)

    monkeypatch.setattr(training.fit.train, "epoch", heard)
    train_speed(training, seconds=1e-6, warmup=9, resident=True)
    assert epochs == [0]
    train_speed(training, seconds=1e-6, warmup=9, resident=False)
    assert epochs[1:] == [0, 1, 2]  # 12 updates of 4 an epoch, and none ahead


def test_no_worker_disturbs_what_is_timed_on_a_resident_batch(tmp_path: Path) -> None:
    fit = build(tmp_path, "loader.workers=1", "batch_size=2", "data.resolution=64").fit
    others = psutil.Process().children()
    assert len(measure.first_window(fit)) == 1
    assert measure.first_held_out(fit)["image"].shape[0] == 2
    assert psutil.Process().children() == others
    assert next(measure.windows(fit))  # they start again
    assert psutil.Process().children() != others


@pytest.mark.parametrize("resident", [False, True])
def test_inference_leaves_the_model_as_it_is(training: Training, resident: bool) -> None:
    model = training.fit.state.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    speed = inference_speed(training, **INSTANT, resident=resident)
    assert sound(speed)
    assert speed.steps == LEAST_STEPS
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counters:
    """Stand for what torch.cuda counts on a card: bytes that are allocated, and their peak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak = 0
        event = SimpleNamespace(record=lambda *_: None, elapsed_time=lambda _: 1.0)
        for name, value in {
            "mem_get_info": lambda _: (2**33, 2**34),
            "set_per_process_memory_fraction": lambda *_: None,
            "reset_peak_memory_stats": lambda _: self.take(0, anew=True),
            "max_memory_allocated": lambda _: self.peak,
            "synchronize": lambda _: None,
            "Event": lambda **_: event,
            "current_stream": lambda _: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self, size: int, *, anew: bool = False) -> None:
        """Allocate and free so many bytes."""
        self.peak = size if anew else max(size, self.peak)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_trials_peak_leaves_out_what_only_trying_algorithms_takes(
    rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass and the first validation search the fastest kernels, with more memory than using them takes."""
    counters, cuda = Counters(monkeypatch), torch.device("cuda")
    updates, validations = chain([900], repeat(500)), chain([800], repeat(400))
    monkeypatch.setattr(measure, "resolve_device", lambda _: (cuda, None))
    monkeypatch.setattr(measure, "Stopwatch", lambda _, **how: Stopwatch(cuda, **how))
    monkeypatch.setattr(measure, "make_update", lambda *_: counters.take(next(updates)))
    monkeypatch.setattr(measure, "evaluate", lambda *_: counters.take(next(validations)))
    with one_thread():
        found = measure.fits(
            compose_run("report.panels=0"),
            budget_gb=None, margin=0.5, rounds=rounds, seconds=1e-6, largest=[0, 1],
        )  # fmt: skip
    assert found["peak_bytes"] == 500
    assert found["limit_bytes"] == 2**32  # of what others leave


def test_the_job_returns_plain_values() -> None:
    with one_thread():
        values = measure.measure_training(compose_run("report.panels=0"), **INSTANT, resident=True)
    assert json.loads(json.dumps(values)) == values
    assert Speed(**values["speed"]).steps == LEAST_STEPS
    assert values["facts"]["batch"] == "4"
