"""A loop that a signal, data or a limit stops, and that goes on as if nothing had been."""

import math
import os
import signal
from contextlib import suppress

import pytest
import torch
from timm.utils import ModelEmaV3

from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.fit import Fit
from segfit.errors import SegFitError
from tests.unit.engine.fakes import (
    LineTask,
    Points,
    Recorder,
    StopAt,
    make_fit,
    make_state,
    resumed,
    run,
    weights,
)


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")]
)
def test_a_signal_ends_the_training_after_the_update_and_saves(tmp_path, number, reason):
    before = signal.getsignal(number)
    heard = run(make_fit(tmp_path), StopAt(6, number))
    assert heard.ends[0].reason == reason
    assert heard.ends[0].updates == 6
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["update"] == 6
    assert signal.getsignal(number) is before


def test_a_signal_while_data_are_read_ends_the_training_at_once_and_exactly(tmp_path):
    class Slow(Points):
        def epoch(self, epoch, start_sample):
            for number, batch in enumerate(super().epoch(epoch, start_sample)):
                if (epoch, number) == (1, 2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise AssertionError("reading may take long, and this went on")
                yield batch

    whole = make_fit(tmp_path / "whole")
    expected = run(whole)
    heard = run(make_fit(tmp_path / "cut", train=Slow()))
    assert heard.ends[0].reason == "terminated"
    assert heard.ends[0].updates == 6
    again = make_fit(tmp_path / "cut")
    heard = run(resumed(tmp_path / "cut", again))
    assert torch.equal(weights(again.state.model), weights(whole.state.model))
    assert [log.loss for log in heard.epochs] == [log.loss for log in expected.epochs[1:]]


def test_a_signal_while_validating_loses_no_update_and_validates_again(tmp_path):
    class StopInValidation(Recorder):
        def validating(self, done: int, total: int) -> None:
            with suppress(Exception):  # as reading a sample does
                os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("a single call may be long, and this one went on")

    run(make_fit(tmp_path), StopInValidation())
    heard = run(resumed(tmp_path, make_fit(tmp_path)))
    assert heard.steps == list(range(5, 13))
    assert [log.epoch for log in heard.epochs] == [0, 1, 2]
    assert heard.epochs[0].result is not None


@pytest.mark.parametrize("log_every", [1, 3, 100])
@pytest.mark.parametrize("update", [1, 3, 4, 6, 11])
def test_resuming_is_exact(tmp_path, update, log_every):
    def fit(folder) -> Fit:
        def average(model):
            return ModelEmaV3(model, decay=0.9, use_warmup=True)

        state = make_state(ema=average, scheduler="cosine", dropout=0.5)
        return make_fit(folder, state=state, log_every=log_every, clip_grad_norm=0.5)

    whole = fit(tmp_path / "whole")
    expected = run(whole)
    first = run(fit(tmp_path / "cut"), StopAt(update))
    second = fit(tmp_path / "cut")
    torch.manual_seed(99)  # another process starts with other random numbers
    heard = run(resumed(tmp_path / "cut", second))

    assert {**first.losses, **heard.losses} == expected.losses
    assert [log.loss for log in heard.epochs] == [
        log.loss for log in expected.epochs[-len(heard.epochs) :]
    ]
    assert torch.equal(weights(second.state.model), weights(whole.state.model))
    assert torch.equal(weights(second.state.ema.module), weights(whole.state.ema.module))


def test_seeds_of_augmentation_are_those_of_position_not_of_the_session(tmp_path):
    whole = LineTask()
    run(make_fit(tmp_path / "whole", task=whole, accumulate=2))
    cut = LineTask()
    run(make_fit(tmp_path / "cut", task=cut, accumulate=2), StopAt(3))
    run(resumed(tmp_path / "cut", make_fit(tmp_path / "cut", task=cut, accumulate=2)))
    assert cut.seeds == whole.seeds
    assert len(set(whole.seeds)) == len(whole.seeds)


@pytest.mark.parametrize(
    ("options", "reached"),
    [
        ({"epochs": 2}, "epochs=2"),
        ({"epochs": 9, "max_steps": 6}, "max_steps=6"),
        ({"epochs": 9, "patience": 1}, "patience=1"),
    ],
)
def test_a_run_that_is_over_says_what_to_raise_and_changes_nothing(tmp_path, options, reached):
    run(make_fit(tmp_path, task=LineTask([0.5, 0.1]), **options))
    before = (tmp_path / "last.pt").read_bytes()
    heard = Recorder()
    key = reached.split("=")[0]
    with pytest.raises(SegFitError, match=f"{reached} is reached. To continue, raise {key}"):
        run(resumed(tmp_path, make_fit(tmp_path, **options)), heard)
    assert heard.infos == []
    assert (tmp_path / "last.pt").read_bytes() == before

    raised = {**options, key: options[key] + 1}
    assert run(resumed(tmp_path, make_fit(tmp_path, **raised))).steps


def test_raised_epochs_follow_the_longer_schedule(tmp_path):
    run(make_fit(tmp_path, state=make_state(scheduler="cosine", epochs=3), epochs=3))
    longer = make_fit(tmp_path, state=make_state(scheduler="cosine", epochs=6), epochs=6)
    heard = run(resumed(tmp_path, longer))
    assert heard.steps == list(range(13, 25))
    assert heard.logs[0].lr == pytest.approx(0.05 * (1 + math.cos(math.pi * 13 / 24)) / 2)
    assert heard.logs[-1].lr == pytest.approx(0.0, abs=1e-9)


class Failing(Points):
    """Points whose tenth batch cannot be had."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def epoch(self, epoch: int, start_sample: int):
        for number, batch in enumerate(
            super().epoch(epoch, start_sample), start_sample // self.size
        ):
            if (epoch, number) == (2, 1):
                raise self.error
            yield batch


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(
    "error", [SegFitError("no image"), torch.OutOfMemoryError("while copying")]
)
def test_data_that_end_a_training_cost_no_update(tmp_path, error, log_every):
    whole, heard = make_fit(tmp_path / "whole", log_every=log_every), Recorder()
    expected = run(whole)
    with pytest.raises(type(error), match=str(error)):
        run(make_fit(tmp_path, train=Failing(error), log_every=log_every), heard)
    assert heard.steps == list(range(1, 10))
    second = make_fit(tmp_path, log_every=log_every)
    again = run(resumed(tmp_path, second))
    assert again.steps == [10, 11, 12]
    assert [log.loss for log in again.epochs] == [log.loss for log in expected.epochs[2:]]
    assert torch.equal(weights(second.state.model), weights(whole.state.model))


class HalfIgnored(LineTask):
    """Every second update has nothing that counts."""

    def totals(self, targets: torch.Tensor) -> torch.Tensor:
        return super().totals(targets) * (len(self.seeds) % 2)

    def loss(self, outputs, targets, totals):
        counts = totals[0] > 0
        return torch.where(counts, super().loss(outputs, targets, totals.clamp_min(1)), 0)


@pytest.mark.parametrize("log_every", [1, 3])
def test_updates_in_which_nothing_counts_are_in_no_mean_also_over_a_resume(tmp_path, log_every):
    single = run(make_fit(tmp_path / "1", task=HalfIgnored())).losses
    assert [math.isnan(single[update]) for update in range(1, 5)] == [False, True, False, True]
    task = HalfIgnored()
    whole = run(make_fit(tmp_path / "2", task=task, log_every=log_every))
    for log in whole.epochs:
        losses = [single[4 * log.epoch + update] for update in (1, 3)]
        assert log.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    run(make_fit(tmp_path / "3", task=HalfIgnored(), log_every=log_every), StopAt(6))
    again = make_fit(tmp_path / "3", task=HalfIgnored(), log_every=log_every)
    heard = run(resumed(tmp_path / "3", again))
    assert [log.loss for log in heard.epochs] == [log.loss for log in whole.epochs[1:]]
