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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from segfit.errors import SegFitError
from segfit.report import text as texts
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
    failed: bool  # it has no result to compare
    message: str  # one line about a failure
    metrics: Mapping[str, Any]  # what metrics.json holds; empty without one

    scores: Mapping[str, float]  # of the best validation; without those that are undefined
    figures: Mapping[str, float]  # those of `_FIGURES` that are known
    score: float | None  # the monitored one


def collect(sweep_dir: Path) -> list[Row]:
    """Read the results of a sweep's jobs, best first and failed ones last.

    Of each folder `<sweep_dir>/<number>` it reads `overrides.yaml`, `metrics.json` and `error.json`. A job
    with neither result nor error was killed, or still runs: "unfinished".
    """
    folders = [path for path in sweep_dir.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(map(_read_job, folders), key=_rank)


def _rank(row: Row) -> tuple[bool, bool, float, int]:
    sign = 1 if row.metrics.get("monitor_mode") == "min" else -1
    return row.failed, row.score is None, sign * (row.score or 0.0), row.job


def _read_job(folder: Path) -> Row:
    run, overrides = RunFolder(folder), dict[str, str]()
    with contextlib.suppress(FileNotFoundError, SegFitError, TypeError):  # shown without them
        for item in read_yaml(run.overrides):
            key, _, overrides[key.lstrip("+")] = str(item).partition("=")
    try:
        metrics, error = read_json(run.metrics), read_json(run.error)
    except SegFitError as problem:
        # One torn file must not end the leader board.
        metrics, error = {}, {"kind": "unreadable", "message": f"{problem}"}
    if error:
        status, message = str(error.get("kind", "crash")), one_line(str(error.get("message", "")))
    elif metrics:
        status, message = str(metrics.get("status", "finished")), ""
    else:
        status, message = "unfinished", "killed, or still running"
    failed, scores = bool(error) or not metrics, _numbers(metrics.get("best"))
    figures = _numbers({key: metrics.get(key) for key in _FIGURES})
    score = scores.get(str(metrics.get("monitor")))
    about = overrides, status, failed, message, metrics, scores, figures, score
    return Row(int(folder.name), folder, *about)


def _numbers(values: Any) -> dict[str, float]:
    items = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in items if isinstance(value, (int, float))}


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
        values = [[row.scores[name] for row in group if name in row.scores] for name in scores]
        means = [f"{number(fmean(v))} ± {number(stdev(v))}" if v[1:] else ABSENT for v in values]
        if len(group) > 1:
            yield f"mean of {len(group)}", *same, *means


def print_leaderboard(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows in their order: what differs between the jobs, scores, speed, memory."""
    console = console or texts.stdout_console()
    # The options that not all jobs have in common; all of them if there is one job.
    given = {key: {row.overrides.get(key) for row in rows} for key in _keys(rows)}
    varied = [key for key, values in given.items() if len(values) > 1 or len(rows) < 2]
    shared = [f"{key}={rows[0].overrides[key]}" for key in given if key not in varied]
    # Those that did not fail come first.
    metrics = next((row.metrics for row in rows if "monitor" in row.metrics), {})
    scores = monitored_first(metrics["monitor"], metrics.get("columns", {})) if metrics else {}
    unit = metrics.get("unit", "sample")

    title = "Leader board" + (f" ({escape(' '.join(shared))})" if shared else "")
    table = Table(title=title, title_justify="left")
    table.add_column("job", justify="right")
    for key in varied:
        table.add_column(escape(key), overflow="fold")
    for label in (*scores.values(), f"{unit}/s", "GiB", "time"):
        table.add_column(escape(label), justify="right", no_wrap=True)
    table.add_column("end", overflow="fold")
    for place, row in enumerate(rows):
        ending = ": ".join(filter(None, (row.status, row.message)))
        cells = (
            str(row.job),
            *(escape(_short(row.overrides.get(key, ""))) for key in varied),
            *(number(row.scores.get(name)) for name in scores),
            number(row.figures.get("samples_per_second"), ".1f"),
            number(row.figures.get("peak_memory_gib"), ".2f"),
            duration(row.figures.get("seconds", math.nan)),
            escape(textwrap.shorten(ending, _END_LENGTH, placeholder=" …")),
        )
        best = place == 0 and row.score is not None and not row.failed
        table.add_row(*cells, style="red" if row.failed else "bold green" if best else None)
    table.add_section()
    for cells in _means(rows, varied, scores):
        table.add_row(*map(escape, cells))
    console.print(table)


def _short(value: str) -> str:
    """Return a long number with four digits, as a search draws them with sixteen; anything else as it is."""
    try:
        return format(float(value), ".4g") if len(value) > _NUMBER_LENGTH else value
    except ValueError:
        return value


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.overrides))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line a job: its overrides, status, best scores ("best_<score>") and figures; may raise an OSError."""
    scores = dict.fromkeys(f"best_{name}" for row in rows for name in row.scores)
    head = ["job", *_keys(rows), "status", "monitored", "best_epoch", *scores, *_FIGURES]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*head, "message", "path"])
        writer.writeheader()
        for row in rows:
            about = {
                "job": row.job,
                "status": row.status,
                "message": row.message,
                "monitored": row.metrics.get("monitor"),
                "best_epoch": row.metrics.get("best_epoch"),
                "path": shown_path(row.path),
            }
            best = {f"best_{name}": value for name, value in row.scores.items()}
            writer.writerow({**row.overrides, **about, **best, **row.figures})
