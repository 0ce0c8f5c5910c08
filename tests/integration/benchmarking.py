"""benchmark.py for tests, in this process."""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segfit.config.check import check, plain
from segfit.engine.findings import Findings
from segfit.report.files import write_findings
from segfit.tuning import Bench
from segfit.tuning.trial import Outcome
from tests.integration.training import TINY, one_thread
from tests.unit.composing import composed


@dataclass
class Benchmarked:
    """A mode that ran in this process; its findings are written into `folder`."""

    findings: Findings
    folder: Path
    notices: list[str] = field(default_factory=list)
    progress: list[tuple[str, int, int]] = field(default_factory=list)

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a table, column name → cell."""
        (table,) = (table for table in self.findings.tables if table.name == name)
        names = [column.name for column in table.columns]
        return [dict(zip(names, row, strict=True)) for row in table.rows]


def compose_benchmark(mode: str, *overrides: str, base: tuple[str, ...] = TINY) -> DictConfig:
    """Compose and check what `benchmark.py` would of these overrides; the last one of a key wins."""
    last = {text.split("=")[0]: text for text in (*base, *overrides)}
    config = composed(f"benchmark={mode}", *last.values(), name="benchmark")
    check(config)
    return config


def benchmark(
    folder: Path, mode: str, *overrides: str, base: tuple[str, ...] = TINY
) -> Benchmarked:
    """Ask a mode about a composition and write down what it found."""
    config = compose_benchmark(mode, *overrides, base=base)
    notices: list[str] = []
    progress: list[tuple[str, int, int]] = []
    bench = Bench(folder, notices.append, lambda *what: progress.append(what))
    with one_thread():
        findings = import_module(f"segfit.tuning.{mode}").run(config, bench)
    about = {"benchmark": mode, "command": "python", "machine": {}, "config": plain(config)}
    write_findings(findings, folder, about)
    return Benchmarked(findings, folder, notices, progress)


def outcome(rate: float, compiled: str = "no") -> Outcome:
    """Return what a trial in a child process tells of a training at `rate` images a second."""
    speed = {
        "samples_per_second": rate,
        "ms_median": 1e3 / rate,
        "ms_p5": 900 / rate,
        "ms_p95": 1100 / rate,
        "steps": 9,
        "peak_gib": 1.0,
        "data_wait": 0.1,
    }
    facts = {"model": "cnn", "sample": "64 × 64", "compiled": compiled}
    return Outcome(ok=True, values={"speed": speed, "facts": facts, "notices": []})
