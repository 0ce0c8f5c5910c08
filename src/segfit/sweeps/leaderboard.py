"""The jobs of a sweep, best first. Imports neither torch nor NumPy: the parent process only waits, and stays light."""

import contextlib
import csv
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from segfit.engine.findings import Column, Table
from segfit.errors import SegFitError
from segfit.report.text import ABSENT, duration, monitored_first, number, one_line, shown_path
from segfit.runs.files import RunFolder, read_json, read_yaml

_END_LENGTH = 70
_NUMBER_LENGTH = 8
_REPEATS = ("data.split.fold", "seed")  # options that repeat a training
_FIGURES = ("updates", "samples_per_second", "peak_memory_gib", "seconds")


@dataclass(frozen=True)
class Row:
    """One job of a sweep."""

    job: int  # its number
    path: Path
    overrides: Mapping[str, str]  # option → value, as given on the command line
    # why it ended well ("finished", "max_steps", "patience"), that it was stopped ("interrupted", "terminated"), or how it
    # failed ("crash", "oom", "input", "unfinished", …)
    status: str
    message: str  # one line about a failure
    failed: bool  # it has no result to compare
    metrics: Mapping[str, Any]  # what metrics.json holds; empty without one

    @property
    def scores(self) -> Mapping[str, float | None]:
        """The scores of the best validation; None where one is undefined."""
        return dict(self.metrics.get("best", {}))

    @property
    def score(self) -> float | None:
        """The monitored one of them."""
        return self.scores.get(self.metrics.get("monitor", ""))


def collect(sweep_dir: Path) -> list[Row]:
    """Read the results of a sweep's jobs, best first and failed ones last.

    Of each folder `<sweep_dir>/<number>` it reads `overrides.yaml`, `metrics.json` and `error.json`. A job
    with neither result nor error was killed, or still runs: "unfinished".
    """
    folders = [path for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(map(read_job, folders), key=_rank)


def _rank(row: Row) -> tuple[bool, bool, float, int]:
    sign = 1 if row.metrics.get("monitor_mode") == "min" else -1
    return row.failed, row.score is None, sign * (row.score or 0.0), row.job


def read_job(folder: Path) -> Row:
    """Read the result of a job, whose folder is called by its number."""
    run, overrides = RunFolder(folder), dict[str, str]()
    with contextlib.suppress(FileNotFoundError, SegFitError, TypeError):  # shown without them
        for item in read_yaml(run.overrides):
            key, _, overrides[key.lstrip("+")] = str(item).partition("=")
    try:
        metrics, error = read_json(run.metrics), read_json(run.error)
    except SegFitError as problem:
        # One torn file must not end the leader board.
        metrics, error = {}, {"kind": "unreadable", "message": f"{problem}"}
    status, message = metrics.get("status", "finished"), ""
    if error:
        status, message = error.get("kind", "crash"), one_line(f"{error.get('message', '')}")
    elif not metrics:
        status, message = "unfinished", "killed, or still running"
    failed = bool(error) or not metrics
    return Row(int(folder.name), folder, overrides, status, message, failed, metrics)


def _means(
    rows: Sequence[Row], varied: Sequence[str], scores: Iterable[str]
) -> Iterator[tuple[str, ...]]:
    """Yield cells of the mean ± sample standard deviation over jobs that differ in fold or seed alone."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    if varied and {*varied} & {*_REPEATS}:
        for row in [row for row in rows if row.score is not None and not row.failed]:
            same = tuple("" if key in _REPEATS else row.overrides.get(key, "") for key in varied)
            groups.setdefault(same, []).append(row)
    for same, group in groups.items():
        known = [[v for row in group if (v := row.scores.get(name)) is not None] for name in scores]
        means = [f"{number(fmean(v))} ± {number(stdev(v))}" if v[1:] else ABSENT for v in known]
        if len(group) > 1:
            yield f"mean of {len(group)}", *same, *means


def board(rows: Sequence[Row]) -> Table:
    """Return the rows in their order as a table: what differs between the jobs, scores, speed, memory."""
    # The options that not all jobs have in common; all of them if there is one job.
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    given = {key: {row.overrides.get(key) for row in rows} for key in keys}
    varied = [key for key, values in given.items() if len(values) > 1 or len(rows) < 2]
    shared = " ".join(f"{key}={rows[0].overrides[key]}" for key in given if key not in varied)
    # Those that did not fail come first.
    metrics = next((row.metrics for row in rows if "monitor" in row.metrics), {})
    scores = monitored_first(metrics["monitor"], metrics.get("columns", {})) if metrics else {}
    figures = {f"{metrics.get('unit', 'sample')}/s": ".1f", "GiB": ".2f", "time": "", "end": ""}
    columns = [Column(name) for name in ("job", *varied)]
    columns += [Column(label, ".4f") for label in scores.values()]
    columns += [Column(name, spec) for name, spec in figures.items()]
    cells = [
        (
            row.job,
            *(_short(row.overrides.get(key, "")) for key in varied),
            *(row.scores.get(name) for name in scores),
            row.metrics.get("samples_per_second"),
            row.metrics.get("peak_memory_gib"),
            duration(row.metrics.get("seconds", math.nan)),
            textwrap.shorten(
                ": ".join(filter(None, (row.status, row.message))), _END_LENGTH, placeholder=" …"
            ),
        )
        for row in rows
    ]
    best = 0 if rows and rows[0].score is not None and not rows[0].failed else None
    means = [(*row, *("" for _ in figures)) for row in _means(rows, varied, scores)]
    title = f"Leader board ({shared})" if shared else "Leader board"
    return Table("leaderboard", title, columns, cells, best, means)


def _short(value: str) -> str:
    """Return a long number with four digits, as a search draws them with sixteen; anything else as it is."""
    try:
        return format(float(value), ".4g") if len(value) > _NUMBER_LENGTH else value
    except ValueError:
        return value


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line a job: its overrides, status, best scores ("best_<score>") and figures; may raise an OSError."""
    lines: list[dict[str, Any]] = [
        {
            "job": row.job,
            **row.overrides,
            "status": row.status,
            "monitored": row.metrics.get("monitor"),
            "best_epoch": row.metrics.get("best_epoch"),
            **{f"best_{name}": value for name, value in row.scores.items()},
            **{key: row.metrics.get(key) for key in _FIGURES},
            "message": row.message,
            "path": shown_path(row.path),
        }
        for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for line in lines for key in line))
        writer.writeheader()
        writer.writerows(lines)
