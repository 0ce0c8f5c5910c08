"""A loss or gradient that is not finite costs its own update, and no other."""

import itertools
import math

import pytest
import torch
from timm.utils import ModelEmaV3

from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.fit import Fit
from segfit.engine.step import clip_gradients
from segfit.errors import SegFitError
from tests.unit.engine.fakes import (
    LineTask,
    Points,
    Recorder,
    make_fit,
    make_state,
    spoilt_backward,
    weights,
)


def run(fit: Fit) -> Recorder:
    heard = Recorder()
    fit.run(heard, {})
    return heard


def without(folder, position: list[int], **options) -> Fit:
    """Return a training without bad batches that leaves out the update at a position."""
    fit = make_fit(folder, **options)
    fit.state.progress.left_out = [position]
    run(fit)
    return fit


@pytest.mark.parametrize("log_every", [1, 3, 100])
@pytest.mark.parametrize("every_steps", [None, 2])
def test_a_bad_batch_is_found_saved_named_and_left_out(tmp_path, log_every, every_steps):
    options = {"log_every": log_every, "every_steps": every_steps}
    fit = make_fit(tmp_path / "bad", train=Points(bad=[(1, 2)]), **options)
    heard = run(fit)
    expected = without(tmp_path / "clean", [1, 4], **options)

    assert torch.equal(weights(fit.state.model), weights(expected.state.model))
    assert fit.state.progress.left_out == [[1, 4]]
    assert fit.state.progress.update == 12  # it counts, so that the schedule stays what it was
    back, out = heard.notices
    assert "loss is nan within the last" in back
    assert "going back" in back
    (saved,) = fit.recovery.bad_batches.iterdir()
    assert saved.name == "update-000007.pt"
    assert "point nan" in out
    assert f"saved as {saved}" in out
    assert "1 of at most 5" in out
    content = torch.load(saved, weights_only=True)
    assert content["found"] == "loss is nan"
    assert content["batches"][0]["names"][0] == "point nan"
    assert content["batches"][0]["target"].isnan().any()


def test_a_bad_batch_that_cannot_be_saved_is_left_out_all_the_same(tmp_path):
    fit = make_fit(tmp_path / "checkpoints", train=Points(bad=[(1, 2)]))
    fit.recovery.bad_batches.write_text("a file where the folder should be")
    heard = run(fit)
    assert "which could not be saved (" in heard.notices[1]
    assert heard.ends[0].reason == "finished"


def test_losses_are_logged_once_though_updates_are_made_again(tmp_path):
    heard = run(make_fit(tmp_path / "bad", train=Points(bad=[(1, 2)])))
    logged = [log.update for log in heard.logs]
    assert logged == sorted(set(logged))
    assert [log.epoch for log in heard.epochs] == [0, 1, 2]


def test_what_passes_by_itself_costs_nothing(tmp_path):
    """As after a bit flip in the device's memory: the second look finds the loss to be fine."""
    whole = make_fit(tmp_path / "whole")
    expected = run(whole)
    fit = make_fit(tmp_path / "hit", task=LineTask(poison={6: math.inf}))
    heard = run(fit)
    assert "loss is inf" in heard.notices[0]
    assert torch.equal(weights(fit.state.model), weights(whole.state.model))
    assert heard.losses == expected.losses
    assert fit.state.progress.left_out == []


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_weights_that_are_spoilt_twice_cost_no_batch(tmp_path, log_every):
    """The second time while updates are looked at: the batch that was on its way is not to blame."""
    whole, fit = (make_fit(tmp_path / name, log_every=log_every) for name in ("whole", "hit"))
    expected = run(whole)
    model, strikes = fit.state.model, itertools.count(1)

    def forward(x):
        if fit.state.progress.update == 5 and next(strikes) <= 2:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)
        return model(x)

    fit.state.forward = forward
    heard = run(fit)
    assert len([text for text in heard.notices if "going back" in text]) == 2
    assert "norm of the weights is not finite: going back" in heard.notices[1]
    assert torch.equal(weights(model), weights(whole.state.model))
    assert heard.losses == expected.losses
    assert fit.state.progress.left_out == []


def test_a_gradient_that_is_not_finite_is_the_same_fault(tmp_path):
    fit = make_fit(tmp_path / "bad", every_steps=1, log_every=100)
    model = fit.state.model

    def forward(x):
        broken = fit.state.progress.update == 6
        return spoilt_backward(model(x)) if broken else model(x)

    fit.state.forward = forward
    heard = run(fit)
    assert "gradient's norm is nan" in heard.notices[0]
    expected = without(tmp_path / "clean", [1, 4])
    assert torch.equal(weights(model), weights(expected.state.model))


def test_a_training_that_diverges_stops_and_keeps_the_last_good_state(tmp_path):
    fit = make_fit(tmp_path, state=make_state(lr=1e30), max_left_out=2)
    with pytest.raises(
        SegFitError, match=r"norm of the weights.*max_left_out=2 is reached.*last\.pt.*Lower lr"
    ):
        run(fit)
    state = load_checkpoint(tmp_path / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert fit.state.progress.left_out == []  # no batch is to blame


def test_too_many_bad_batches_end_the_training_and_are_all_kept(tmp_path):
    bad = Points(bad=[(1, 0), (1, 2), (2, 1)])
    fit = make_fit(tmp_path, train=bad, max_left_out=2)
    with pytest.raises(
        SegFitError, match=r"max_left_out=2 is reached.*last\.pt.*bad_batches.*Lower lr"
    ):
        run(fit)
    assert len(list(fit.recovery.bad_batches.iterdir())) == 3


@pytest.mark.parametrize("log_every", [1, 100])
def test_zero_stops_at_the_first(tmp_path, log_every):
    fit = make_fit(
        tmp_path, train=Points(bad=[(1, 2)]), every_steps=5, log_every=log_every, max_left_out=0
    )
    with pytest.raises(SegFitError, match=r"loss is nan.*max_left_out=0 is reached.*last\.pt"):
        run(fit)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["progress"]["update"] == 5
    assert all(value.isfinite().all() for value in state["model"].values())


def test_faults_that_never_show_twice_end_the_run_too(tmp_path):
    fit = make_fit(tmp_path)
    model = fit.state.model
    fit.state.forward = lambda x: model(x) * (1.0 if fit.recovery.checking else math.nan)
    with pytest.raises(SegFitError, match="max_left_out=5 is reached"):
        run(fit)
    assert fit.state.progress.left_out == []


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    fit = make_fit(tmp_path)
    step = fit.state.optimizer.step
    steps = []

    def spoil(*args):
        step(*args)
        steps.append(1)
        if len(steps) == 8:  # the last of its epoch: no later loss shows it
            with torch.no_grad():
                next(fit.state.model.parameters())[0] = math.nan

    fit.state.optimizer.step = spoil
    heard = run(fit)
    assert any("norm of the weights is not finite" in notice for notice in heard.notices)
    assert weights(fit.state.model).isfinite().all()
    assert load_checkpoint(tmp_path / "last.pt")["progress"]["update"] == 12


def test_weights_that_are_not_finite_from_the_start_are_refused(tmp_path):
    fit = make_fit(tmp_path)
    with torch.no_grad():
        next(fit.state.model.parameters())[0] = math.nan
    with pytest.raises(SegFitError, match=r"before the first update.*model\.weights"):
        run(fit)


def test_resuming_from_before_finds_the_same(tmp_path):
    """The bad batch is left out again, though the checkpoint does not know of it."""
    train = Points(bad=[(1, 2)])
    fit = make_fit(tmp_path, train=train, max_steps=5)
    run(fit)
    again = make_fit(tmp_path, train=train)
    again.state.load_state_dict(load_checkpoint(tmp_path / "last.pt"))
    run(again)
    expected = without(tmp_path / "clean", [1, 4])
    assert torch.equal(weights(again.state.model), weights(expected.state.model))


# ------------------------------------------------------------------------------------- fp16


def scaled(init_scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)


def test_what_overflows_while_scaled_up_is_the_scalers_and_only_counted(tmp_path):
    fit = make_fit(tmp_path, state=make_state(scaler=scaled(2.0**16)), log_every=2, epochs=1)
    model = fit.state.model

    def forward(x):
        overflows = fit.state.scaler.get_scale() > 2.0**14
        return spoilt_backward(model(x)) if overflows else model(x)

    fit.state.forward = forward
    heard = run(fit)
    assert heard.notices == []
    assert [log.skipped for log in heard.logs] == [2, 0]
    assert heard.logs[-1].loss_scale == 2.0**14
    assert weights(model).isfinite().all()


def test_what_overflows_unscaled_is_a_fault(tmp_path):
    fit = make_fit(tmp_path, state=make_state(scaler=scaled(4.0)), max_left_out=2)
    model = fit.state.model
    fit.state.forward = lambda x: spoilt_backward(model(x))
    with pytest.raises(SegFitError, match="max_left_out=2 is reached"):
        run(fit)
    assert weights(model).isfinite().all()


def test_the_scaler_goes_on_after_an_update_that_was_left_out(tmp_path):
    fit = make_fit(tmp_path, state=make_state(scaler=scaled(2.0)), train=Points(bad=[(1, 2)]))
    heard = run(fit)
    assert fit.state.progress.left_out == [[1, 4]]
    assert heard.ends[0].reason == "finished"
    assert weights(fit.state.model).isfinite().all()


# ------------------------------------------------------------------- memory within the optimizer


def averaged():
    return make_state(ema=lambda model: ModelEmaV3(model, decay=0.9))


def run_out_in_the_optimizer(fit, struck):
    step = fit.state.optimizer.step

    def run_out(*args):
        if struck():
            with torch.no_grad():
                next(fit.state.model.parameters()).add_(1.0)  # moved before memory ran out
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(*args)

    fit.state.optimizer.step = run_out


def run_out_while_clipping(monkeypatch, struck):
    def run_out(*args):
        if struck():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clip_gradients(*args)

    monkeypatch.setattr("segfit.engine.step.clip_gradients", run_out)


def run_out_in_the_average(fit, struck):
    update = fit.state.ema.update

    def run_out(*args, **options):
        if struck():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        update(*args, **options)

    fit.state.ema.update = run_out


@pytest.mark.parametrize("where", ["optimizer", "clipping", "average"])
def test_memory_that_runs_out_between_two_weights_goes_back_to_whole_ones(
    tmp_path, monkeypatch, where
):
    whole = make_fit(tmp_path / "whole", state=averaged())
    run(whole)
    fit = make_fit(tmp_path / "hit", state=averaged(), max_left_out=0)  # no number is to blame
    calls = itertools.count(1)

    def struck():
        return next(calls) == 7

    if where == "optimizer":
        run_out_in_the_optimizer(fit, struck)
    elif where == "clipping":
        run_out_while_clipping(monkeypatch, struck)
    else:
        run_out_in_the_average(fit, struck)
    heard = run(fit)
    assert any(
        "update ran out of memory while weights were changed" in text for text in heard.notices
    )
    assert fit.state.progress.micro_batch == 1
    for ours, theirs in [
        (fit.state.model, whole.state.model),
        (fit.state.ema.module, whole.state.ema.module),
    ]:
        assert torch.allclose(weights(ours), weights(theirs), atol=1e-6)
