"""benchmark=monitor: what is seen, and what it says about it."""

import csv

import pytest

from segfit.system.monitor import Means, Probe, Sample
from segfit.tuning import Bench
from segfit.tuning.monitor import found, judgement, live_line, watch


class Script(Probe):
    """A card that gives what is set, then ends like a person who presses Ctrl-C, if asked to."""

    def __init__(self, *utilisation: float) -> None:
        super().__init__()
        self.source, self.name, self.total_gib = "NVML", "Stand-in", 8.0
        self.utilisation = list(utilisation)

    def read(self, seconds):
        value = self.utilisation.pop(0) if self.utilisation else 50.0
        return Sample(seconds, value, 4.0, 70.0, None, 25.0)


def a_bench(folder, progress=lambda *_: None) -> tuple[Bench, list[str]]:
    notices: list[str] = []
    return Bench(folder, notices.append, progress), notices


def test_the_watch_lasts_as_long_as_asked_and_is_written_down(tmp_path):
    progress = []
    bench, _ = a_bench(tmp_path, lambda *what: progress.append(what))
    findings = watch(Script(10, 20, 30), 0.1, bench, interval=0.02)
    samples = findings.values["samples"]
    assert [sample["utilisation"] for sample in samples[:3]] == [10, 20, 30]
    with (tmp_path / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["utilisation"]) for row in rows] == [s["utilisation"] for s in samples]
    assert {row["power_w"] for row in rows} == {""}
    assert findings.values["mean"]["memory_gib"] == 4.0
    assert "power_w" not in findings.values["mean"]
    assert [row[0] for row in findings.tables[0].rows] == [
        "utilisation, %", "memory, GiB", "temperature, °C", "CPU, %",
    ]  # fmt: skip
    assert len(findings.figures["samples"]().axes) == 4
    assert progress[0][0].startswith("Stand-in: ")
    assert progress[0][2] == 5


def test_ctrl_c_ends_the_watch_and_what_was_seen_is_kept(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    bench, notices = a_bench(tmp_path, interrupt)
    findings = watch(Script(), 60.0, bench, interval=0.01)
    assert notices == ["stopped by Ctrl-C: this is what was seen until then."]
    assert findings.values["samples"]


def test_a_watch_that_is_too_short_says_so(tmp_path):
    findings = found([], Script(), tmp_path)
    assert "Nothing was seen" in findings.headline


def test_a_line_leaves_out_what_is_unknown():
    line = live_line(Sample(1.0, 97.0, 6.04, 61.0, None, 45.0), Script())
    assert line == "Stand-in: 97 %, 6.0 of 8.0 GiB, 61 °C, CPU 45 %"


@pytest.mark.parametrize(
    ("utilisation", "says"),
    [(97.0, "little left to gain"), (40.0, "benchmark=diagnose"), (1.0, "nothing ran on it")],
)
def test_the_judgement_follows_the_utilisation(utilisation, says):
    assert says in judgement(Means({"utilisation": utilisation}, {}), 8.0, card=True)


def test_the_judgement_knows_room_and_heat():
    means = Means({"utilisation": 95.0}, {"memory_gib": 2.0, "temperature": 88.0})
    said = judgement(means, 8.0, card=True)
    assert "At most 2.0 of 8.0 GiB" in said
    assert "88 °C" in said
    calm = Means({"utilisation": 95.0}, {"memory_gib": 7.0, "temperature": 70.0})
    assert "GiB" not in judgement(calm, 8.0, card=True)
    assert "max_batch" not in judgement(means, 8.0, card=False)
