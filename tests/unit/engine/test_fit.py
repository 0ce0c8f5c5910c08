"""The loop: when it validates, logs and saves, and when it is done."""

import math

import pytest
import torch
from timm.utils import ModelEmaV3

from segfit.engine.checkpoint import load_checkpoint
from tests.unit.engine.fakes import (
    LineTask,
    Points,
    Recorder,
    make_fit,
    make_state,
    run,
    weights,
)


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
