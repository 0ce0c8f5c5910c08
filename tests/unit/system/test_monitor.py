"""The sampler, on this machine and on a stand-in for NVIDIA's library; and phases, which cost nothing until they are recorded."""

import threading
import time
from types import SimpleNamespace

import pytest

from segfit.system.cards import GIB
from segfit.system.monitor import Monitor, Probe, Recorder, Sample, phase, summed_up
from tests.unit.engine.fakes import Recorder as Listener
from tests.unit.engine.fakes import make_fit
from tests.unit.system import test_cards as fakes
from tests.unit.system.test_cards import LARGE, FakeDriver, FakeNvml


class Card(FakeNvml):
    """A card of 8 GiB under load, in NVML's own units; it does not tell what `silent` names."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *silent: str) -> None:
        super().__init__({LARGE: 8192})
        self.silent = silent

    def _answer(self, name: str, value: object) -> object:
        if name in self.silent:
            raise RuntimeError("Not Supported")
        assert self.open, "asked before nvmlInit"
        return value

    def lose(self, handle: str) -> None:
        raise RuntimeError("GPU is lost")

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "NVIDIA Stand-in"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=8 * GIB, used=6 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> object:  # noqa: N802
        return self._answer("utilisation", SimpleNamespace(gpu=87, memory=12))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> object:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer("temperature", 71)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> object:  # noqa: N802
        return self._answer("power_w", 123456)


@pytest.fixture
def plug_in(monkeypatch):
    def plug_in(card):
        fakes.plug_in(monkeypatch, FakeDriver({LARGE: 8192}), card)
        return card

    return plug_in


def test_a_card_is_read_in_percent_gib_degrees_and_watts(plug_in):
    plug_in(Card())
    probe = Probe()
    assert (probe.source, probe.name, probe.total_gib) == ("NVML", "NVIDIA Stand-in", 8.0)
    sample = probe.read(2.5)
    assert sample.cpu is not None
    assert sample == Sample(2.5, 87.0, 6.0, 71.0, 123.456, sample.cpu)


@pytest.mark.parametrize("silent", ["utilisation", "temperature", "power_w"])
def test_what_a_card_does_not_tell_is_none_and_the_rest_stays(plug_in, silent):
    plug_in(Card(silent))
    probe = Probe()
    sample = probe.read(0.0)
    known = {"utilisation": 87.0, "temperature": 71.0, "power_w": 123.456, silent: None}
    assert {name: getattr(sample, name) for name in known} == known
    assert silent not in summed_up([sample]).mean


def test_a_hidden_card_is_not_watched(plug_in, monkeypatch):
    plug_in(Card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    probe = Probe()
    assert probe.source == "psutil"


@pytest.mark.parametrize("library", [None, FakeNvml({LARGE: 8192}, broken=True), FakeNvml({})])
def test_without_nvml_the_processor_is_watched(plug_in, library):
    plug_in(library)
    probe = Probe()
    sample = probe.read(0.0)
    assert (probe.source, probe.name) == ("psutil", "CPU")
    assert 0 < sample.memory_gib <= probe.total_gib
    assert 0 <= sample.utilisation <= 100
    assert (sample.power_w, sample.cpu) == (None, None)


def test_a_card_that_is_lost_is_not_watched(plug_in, monkeypatch):
    card = plug_in(Card())
    monkeypatch.setattr(card, "nvmlDeviceGetName", card.lose)
    probe = Probe()
    assert (probe.source, probe.name) == ("psutil", "CPU")
    assert probe.read(0.0).memory_gib > 0


def test_the_monitor_samples_beside_and_leaves_no_thread(plug_in):
    plug_in(Card())
    before = set(threading.enumerate())
    monitor = Monitor(interval=0.01)
    with monitor:
        (own,) = set(threading.enumerate()) - before
        assert own.name == "monitor"
        while len(monitor.samples) < 3:
            time.sleep(0.005)
        first = monitor.fresh()
        assert len(first) >= 3
        while not (second := monitor.fresh()):
            time.sleep(0.005)
    assert not own.is_alive()
    seconds = [sample.seconds for sample in first + second]
    assert seconds == sorted(set(seconds))
    assert monitor.samples[: len(seconds)] == first + second
    monitor.close()


def test_a_monitor_that_never_started_can_be_closed():
    Monitor().close()


def test_samples_are_summed_up_by_reading():
    samples = [Sample(1, 50, 2, None, 100, None), Sample(2, 100, 4, 60, None, None)]
    means = summed_up(samples)
    assert means.mean == {"utilisation": 75, "memory_gib": 3, "temperature": 60, "power_w": 100}
    assert means.peak == {"utilisation": 100, "memory_gib": 4, "temperature": 60, "power_w": 100}
    assert summed_up([]).mean == {}


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


def test_phases_inside_a_whole_one_are_not_timed():
    with Recorder() as recorder, phase("validation", whole=True), phase("copy"):
        pass
    assert [span.name for span in recorder.spans()] == ["validation"]
    assert recorder.spans()[0].inner == 0


def test_an_error_ends_the_phase_and_the_recording():
    with pytest.raises(ValueError, match="broken"), Recorder() as recorder, phase("forward"):
        raise ValueError("broken")
    assert [span.name for span in recorder.spans()] == ["forward"]
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
