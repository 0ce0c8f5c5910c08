"""A run, or a sweep, as `report.html`: one file that opens without a network."""

import base64
import csv
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from segfit.report.text import duration, hydra_override, number, shown_path
from segfit.runs.files import COMPLETE, RunFolder

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } img { max-width: 100%; display: block; margin: .5em 0 }
table { border-collapse: collapse; margin: .5em 0 } td, th { padding: .15em .8em; text-align: left; border-bottom: 1px solid #e3e3e3 }
td.number { text-align: right; font-variant-numeric: tabular-nums } pre { background: #f5f5f5; padding: .6em 1em; overflow-x: auto }
"""


def run_page(files: RunFolder, reason: str) -> str:
    """Return a run that ended for a reason as HTML, of what is in its folder."""
    metrics = json.loads(files.metrics.read_text(encoding="utf-8"))
    facts, best, last = metrics["facts"], metrics["best"], metrics["last"]
    labels = metrics["columns"]
    rows = [(labels.get(key, key), best.get(key), last.get(key)) for key in {**best, **last}]
    device = {
        f"{metrics['unit']}s a second": number(metrics["samples_per_second"], ".1f"),
        "peak memory": f"{number(metrics['peak_memory_gib'], '.2f')} GiB",
        "time": duration(metrics["seconds"]),
    }
    for name, mean in metrics.get("device", {}).items():
        device[f"{name}, mean"] = number(mean, ".1f")
    notices = re.findall(r" notice: (.*)", files.log.read_text(encoding="utf-8"))
    epoch = metrics["best_epoch"]
    heads = "score", "best" if epoch is None else f"best (epoch {epoch + 1})", "last"
    sections = {
        "Scores": _table(heads, rows),
        "What ran": _table(("", ""), facts.items()),
        "What the device did": _table(("", ""), device.items()),
        "Notices": "".join(f"<p>{escape(one)}</p>" for one in notices),
        "The first training batch": _pictures([files.first_batch]),
    }
    for path in sorted(files.evaluation.glob("*/metrics.json")):
        found = json.loads(path.read_text(encoding="utf-8")).get("scores", {})
        scores, pictures = _table(("score", "value"), found.items()), path.parent.glob("*.png")
        sections[f"evaluate.py: {path.parent.name}"] = scores + _pictures(sorted(pictures))
    commands = escape("\n".join(next_commands(reason, files)))
    config = escape(files.config.read_text(encoding="utf-8"))
    sections["What to type next"] = f"<pre>{commands}</pre>" if commands else ""
    sections["Config"] = f"<details><pre>{config}</pre></details>"
    status = f"<p>{metrics['updates']} updates, status: {escape(metrics['status'])}.</p>"
    parts = [f"<h2>{escape(name)}</h2>\n{part}" for name, part in sections.items() if part]
    title = f"{facts.get('model', '')} · {files.path.absolute().name}"
    return html_page(title, [status, _pictures([files.curves]), *parts])


def next_commands(reason: str, files: RunFolder) -> list[str]:
    """Return the commands that make sense after a training, quoted for a POSIX shell."""
    run = shown_path(files.path)
    commands = []
    if reason not in COMPLETE:
        commands.append(f"python train.py {hydra_override('resume', run)}")
    if files.tensorboard.exists():
        commands.append(f"tensorboard --logdir {shlex.quote(shown_path(files.tensorboard))}")
    if files.best.exists():
        commands.append(f"python evaluate.py {hydra_override('run', run)}")
    return commands


def sweep_page(folder: Path, leaderboard: Path, pages: Mapping[str, Path]) -> str:
    """Return a sweep as HTML: its leader board, and the curves of its jobs (number → the job's page)."""
    with leaderboard.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    parts = [_table(head, rows)]
    for job, page in pages.items():
        link = escape(page.relative_to(folder).as_posix())
        parts.append(f'<h2><a href="{link}">Job {escape(job)}</a></h2>')
        parts.append(_pictures([page.with_name("curves.png")]))
    return html_page(f"Sweep · {folder.absolute().name}", parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """Return a page of HTML with a title, which it escapes, and parts, which it does not."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"


def html_image(name: str, content: bytes) -> str:
    """Return a PNG inside of a page."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'


def _pictures(paths: Iterable[Path]) -> str:
    """Return the pictures that are there, inside of the page."""
    return "".join(html_image(path.stem, path.read_bytes()) for path in paths if path.exists())


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(one)}</th>" for one in heads) if any(heads) else ""
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>" if lines else ""


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) or value is None:
        return f'<td class="number">{number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"
