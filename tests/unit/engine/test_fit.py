"""The loop: when it validates, logs, saves and stops, and that it goes on as if it had not."""

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
from tests.unit.engine.fakes import LineTask, Points, Recorder, make_fit, make_state, weights


class StopAt(Recorder):
    """Sends this process a signal after an update."""

    def __init__(self, update: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.update, self.number = update, number

    def step(self, epoch: int, update: int) -> None:
        super().step(epoch, update)
        if update == self.update:
            os.kill(os.getpid(), self.number)


def run(fit: Fit, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or Recorder()
    fit.run(recorder, {"device": "toy"})
    return recorder


def resumed(folder, fit: Fit) -> Fit:
    fit.state.load_state_dict(load_checkpoint(folder / "last.pt"))
    return fit


def test_a_whole_training_logs_all_of_it_and_learns(tmp_path):
    heard = run(make_fit(tmp_path, state=make_state(lr=0.01), epochs=15))
    assert heard.infos[0].total_updates == 60
    assert heard.infos[0].facts == {"device": "toy"}
    assert heard.steps == list(range(1, 61))
    assert [log.update for log in heard.epochs] == list(range(4, 61, 4))
    assert heard.ends[0].reason == "finished"
    assert heard.epochs[-1].loss < 0.1 * heard.epochs[0].loss
    mean = sum(log.loss for log in heard.logs[:4]) / 4
    assert heard.epochs[0].loss == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("log_every", [1, 3, 4, 100])
def test_logs_are_means_since_the_last_one(tmp_path, log_every):
    single = run(make_fit(tmp_path / "1", epochs=2)).losses
    for log in run(make_fit(tmp_path / "2", epochs=2, log_every=log_every)).logs:
        start = max((log.update - 1) // log_every * log_every, 4 * log.epoch)
        losses = [single[update] for update in range(start + 1, log.update + 1)]
        assert log.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (4, 1), (6, 2)])
def test_max_steps_ends_with_a_validation(tmp_path, max_steps, epochs):
    heard = run(make_fit(tmp_path, max_steps=max_steps))
    assert heard.steps == list(range(1, max_steps + 1))
    assert heard.infos[0].total_updates == max_steps
    assert heard.ends[0].reason == "max_steps"
    assert len(heard.epochs) == epochs
    assert heard.epochs[-1].result is not None
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["update"] == max_steps


def test_the_last_epoch_is_validated_whatever_val_every(tmp_path):
    heard = run(make_fit(tmp_path, epochs=5, val_every=2))
    assert [log.result is not None for log in heard.epochs] == [False, True, False, True, True]


def test_fewer_micro_batches_at_the_end_make_an_update(tmp_path):
    heard = run(make_fit(tmp_path, train=Points(batches=5), accumulate=2, epochs=1))
    assert heard.steps == [1, 2, 3]


def test_patience_counts_validations_without_a_new_best(tmp_path):
    heard = run(make_fit(tmp_path, task=LineTask([0.1, 0.3, 0.2, 0.3, 0.9]), epochs=9, patience=2))
    assert heard.ends[0].reason == "patience"
    assert [log.is_best for log in heard.epochs] == [True, True, False, False]
    assert heard.ends[0].best_scores["score"] == 0.3
    assert heard.ends[0].best_epoch == 1


def test_best_holds_the_weights_of_the_best_validation_only(tmp_path):
    task = LineTask([0.1, 0.9, 0.5])
    fit = make_fit(tmp_path, task=task)
    run(fit)
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best["scores"]["score"], best["epoch"]) == (0.9, 1)
    model = make_state().model
    model.load_state_dict(best["model"])
    outputs = model.eval()(next(iter(fit.held_out()))["image"])
    assert torch.equal(outputs, task.validated[1])


def test_the_best_may_be_the_lowest(tmp_path):
    task = LineTask([math.nan, 0.5, 0.7, 0.2, 0.2, math.nan, 0.3])
    heard = run(make_fit(tmp_path, task=task, epochs=9, patience=2, monitor_mode="min"))
    assert heard.ends[0].reason == "patience"
    assert [log.is_best for log in heard.epochs] == [False, True, False, True, *[False] * 3]
    assert load_checkpoint(tmp_path / "best.pt")["scores"]["score"] == 0.2


def test_nan_is_never_the_best(tmp_path):
    heard = run(make_fit(tmp_path, task=LineTask([math.nan, 0.1, math.nan])))
    assert [log.is_best for log in heard.epochs] == [False, True, False]
    assert heard.ends[0].best_scores["score"] == 0.1


def test_nothing_but_nan_leaves_no_best(tmp_path):
    heard = run(make_fit(tmp_path, task=LineTask([math.nan] * 3), patience=1))
    assert heard.ends[0].reason == "finished"
    assert heard.ends[0].best_epoch is None
    (notice,) = heard.notices
    assert notice.startswith("monitor=score has no value in this validation")
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_a_best_that_cannot_be_saved_does_not_count_so_that_the_next_is(tmp_path):
    in_the_way = tmp_path / "best.pt"
    in_the_way.mkdir()
    heard = Recorder()
    heard.epoch = lambda log: (heard.epochs.append(log), log.epoch == 0 and in_the_way.rmdir())
    run(make_fit(tmp_path, task=LineTask([0.5, 0.4, 0.3])), heard)
    (notice,) = heard.notices
    assert "best.pt: Is a directory" in notice
    assert "does not count as the best" in notice
    assert [log.is_best for log in heard.epochs] == [False, True, False]
    assert (
        load_checkpoint(in_the_way)["scores"]["score"] == heard.ends[0].best_scores["score"] == 0.4
    )


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    def average(model):
        return ModelEmaV3(model, decay=0.9)

    task = LineTask([0.5])
    fit = make_fit(tmp_path, state=make_state(ema=average), task=task, epochs=1)
    run(fit)
    ema = fit.state.ema.module
    assert not torch.allclose(weights(ema), weights(fit.state.model))
    assert torch.equal(task.validated[0], ema(next(iter(fit.held_out()))["image"]))
    best = load_checkpoint(tmp_path / "best.pt")["model"]
    assert all(torch.equal(best[name], value) for name, value in ema.state_dict().items())


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


@pytest.mark.parametrize("log_every", [1, 100])
def test_data_that_end_the_training_cost_no_update(tmp_path, log_every):
    class Broken(Points):
        def epoch(self, epoch, start_sample):
            for number, batch in enumerate(super().epoch(epoch, start_sample)):
                if (epoch, number) == (1, 2):
                    raise SegFitError("a.png: unreadable")
                yield batch

    whole = make_fit(tmp_path / "whole", log_every=log_every)
    expected = run(whole)
    with pytest.raises(SegFitError, match=r"a\.png"):
        run(make_fit(tmp_path / "cut", train=Broken(), log_every=log_every))
    assert load_checkpoint(tmp_path / "cut/last.pt")["progress"]["update"] == 6
    again = make_fit(tmp_path / "cut", log_every=log_every)
    heard = run(resumed(tmp_path / "cut", again))
    assert torch.equal(weights(again.state.model), weights(whole.state.model))
    assert [log.loss for log in heard.epochs] == [log.loss for log in expected.epochs[1:]]


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


def test_every_minutes_saves_inside_an_epoch(tmp_path, monkeypatch):
    fit = make_fit(tmp_path, train=Points(batches=40), epochs=1, every_minutes=1)
    saved = []
    monkeypatch.setattr(
        fit.checkpoints, "save_last", lambda state: saved.append(state["progress"]["update"])
    )
    clock = iter(range(0, 100000, 7))  # seconds, 7 a look
    monkeypatch.setattr("segfit.engine.checkpoint.time.monotonic", lambda: float(next(clock)))
    fit.manager._saved_at = 0.0
    run(fit)
    assert len(saved) > 3
    assert saved[-1] == 40


def test_samples_that_a_roll_back_repeated_count_once(tmp_path):
    """Else the speed would count two passes over the samples in the time of one."""
    fit = make_fit(tmp_path / "checkpoints", train=Points(bad=[(1, 3)]), log_every=1)
    run(fit)
    assert fit.state.progress.left_out == [[1, 6]]
    assert fit.log.total_samples == 8 + 6 + 8


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


@pytest.mark.parametrize(
    "error", [SegFitError("no image"), torch.OutOfMemoryError("while copying")]
)
def test_data_that_end_a_training_cost_no_update(tmp_path, error):
    whole, heard = make_fit(tmp_path / "whole"), Recorder()
    run(whole)
    with pytest.raises(type(error), match=str(error)):
        make_fit(tmp_path, train=Failing(error)).run(heard, {})
    assert heard.steps == list(range(1, 10))
    second = make_fit(tmp_path)
    assert run(resumed(tmp_path, second)).steps == [10, 11, 12]
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
