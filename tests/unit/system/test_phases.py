"""Phases cost nothing while nobody records, and add up to the time that passed when somebody does."""

import time

import pytest

from segfit.system.phases import Recorder, phase
from tests.unit.engine.fakes import Recorder as Listener
from tests.unit.engine.fakes import make_fit


def own(recorder: Recorder) -> dict[str, float]:
    totals: dict[str, float] = {}
    for span in recorder.spans():
        totals[span.name] = totals.get(span.name, 0.0) + span.own
    return totals


def test_without_a_recorder_nothing_is_made():
    assert phase("a") is phase("b")
    with phase("a"):
        pass


def test_a_phase_inside_is_taken_out_of_the_outer_ones_time():
    with Recorder() as recorder, phase("data"):
        time.sleep(0.02)
        with phase("copy"):
            time.sleep(0.05)
    inner, outer = recorder.spans()
    assert (inner.name, outer.name) == ("copy", "data")
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert outer.own == pytest.approx(outer.end - outer.start - (inner.end - inner.start))
    assert inner.own >= 0.05
    assert outer.device is None


def test_phases_inside_a_whole_one_are_not_told_apart():
    with Recorder() as recorder, phase("validation", whole=True), phase("copy"):
        pass
    assert [span.name for span in recorder.spans()] == ["validation"]
    assert recorder.spans()[0].inner == 0


def test_an_error_ends_the_phase_and_the_recording():
    with pytest.raises(ValueError, match="broken"), Recorder() as recorder, phase("forward"):
        raise ValueError("broken")
    assert [span.name for span in recorder.spans()] == ["forward"]
    assert phase("a") is phase("b")


def test_two_recorders_at_once_are_refused():
    with Recorder(), pytest.raises(RuntimeError, match="already"), Recorder():
        pass
    assert phase("a") is phase("b")


def test_the_loop_names_all_of_its_phases(tmp_path):
    fit = make_fit(tmp_path, epochs=2)
    with Recorder() as recorder:
        start = time.perf_counter()
        fit.run(Listener(), {})
        whole = time.perf_counter() - start
    totals = own(recorder)
    assert set(totals) == {
        "data", "augmentation", "forward", "backward", "optimizer", "logging", "validation", "checkpoint",
    }  # fmt: skip
    names = [span.name for span in recorder.spans()]
    assert names.count("optimizer") == 8
    assert names.count("validation") == 2
    assert names.count("checkpoint") >= 3  # the last state twice, the best once at least
    assert 0 < sum(totals.values()) <= whole
    assert len(recorder) == len(names)
