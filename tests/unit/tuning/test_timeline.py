"""A recording sums up phases, and tells what the turns of epochs took."""

import pickle

import pytest

from segfit.errors import SegFitError
from segfit.system.monitor import Span
from segfit.tuning.timeline import SlowSource, Timeline, _restarts, record
from tests.unit.engine.fakes import Recorder, make_fit


def wait(start: float, end: float, batch: bool = True) -> list[Span]:
    """Return the spans of waiting for data, in the order of their ends: a batch that came is copied last."""
    copied = [Span("copy", end - 0.001, end)] if batch else []
    return [*copied, Span("data", start, end, inner=0.001 * batch)]


def test_turns_of_epochs_are_what_first_batches_take_more_and_ends_take_at_all():
    spans = [
        *wait(0.0, 0.1), *wait(1.0, 1.1), *wait(2.0, 2.3, batch=False),  # its workers end: 0.3
        *wait(3.0, 3.9), *wait(4.0, 4.1), *wait(5.0, 5.1), *wait(6.0, 6.2, batch=False),  # 0.8 late, 0.2
    ]  # fmt: skip
    assert _restarts(spans, [2.5]) == pytest.approx(0.3 + 0.8 + 0.2)
    assert _restarts(spans[:4], []) == 0


def test_shares_add_up_and_updates_are_without_validation():
    timeline = Timeline(
        updates=10, samples=4, seconds=10.0, phases={"data": 2.0, "forward": 3.0, "validation": 4.0},
        device={}, restarts=0.0, epochs=1,
    )  # fmt: skip
    shares = timeline.by_phase()
    assert shares == {
        "data": 0.2, "forward": 0.3, "validation": 0.4, "host": pytest.approx(0.1),
    }  # fmt: skip
    assert timeline.update == pytest.approx(0.6)


def test_a_training_that_ends_before_it_is_recorded_says_so(tmp_path):
    fit = make_fit(tmp_path, epochs=1)
    with pytest.raises(SegFitError, match=r"ended after 4 updates.*benchmark\.warmup"):
        record(fit, Recorder(), batch_size=2, seconds=60.0, warmup=10)


def test_a_recording_ends_the_training_after_its_seconds(tmp_path):
    heard = Recorder()
    timeline = record(
        make_fit(tmp_path, epochs=10_000), heard, batch_size=2, seconds=0.05, warmup=2
    )
    assert heard.ends[0].reason == "measured"
    assert 3 <= timeline.updates < heard.ends[0].updates
    assert timeline.seconds >= 0.05
    assert timeline.phases["forward"] > 0


class Words:
    """A source whose images are words."""

    classes = "classes"

    def __len__(self) -> int:
        return 3

    def id(self, index: int) -> str:
        return f"word {index}"

    def read(self, index: int) -> tuple[str, str]:
        return "image", "mask"


def test_a_slow_source_is_the_source_but_for_the_wait():
    slow = pickle.loads(pickle.dumps(SlowSource(Words(), 0.0)))
    assert (len(slow), slow.id(2), slow.read(0)) == (3, "word 2", ("image", "mask"))
