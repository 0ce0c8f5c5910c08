"""What the person is left with: a table of scores, what to type next, `metrics.json`."""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from segfit.engine.events import EndLog, EvalResult
from segfit.report.lines import REASONS
from segfit.report.text import (
    duration,
    hydra_override,
    number,
    score_label,
    shown_path,
    stdout_console,
)
from segfit.system.files import replace_text
from segfit.tasks.segmentation.classes import Classes

_MEASURES = {"iou": "IoU", "f1": "F1", "accuracy": "accuracy"}
_RESUMABLE = {"interrupted", "terminated"}


def score_table(result: EvalResult, classes: Classes) -> Table:
    """Return IoU, F1 and accuracy of every class, their macro means, and the share of pixels.

    A class that is not in the ground truth has no score ("–") and counts in no mean.

    Args:
        result: of one pass over held-out data.
        classes: names and colours; with a background, the means over the foreground are shown too.
    """
    pixel_accuracy = number(result.scores.get("pixel_accuracy"))
    table = Table(caption=f"pixel accuracy {pixel_accuracy}", caption_justify="left")
    table.add_column("class")
    for title in _MEASURES.values():
        table.add_column(title, justify="right")
    table.add_column("pixels", justify="right")

    truth = result.confusion.sum(1)
    shares = truth / max(int(truth.sum()), 1)
    for name, color, share in zip(classes.names, classes.colors, shares, strict=True):
        swatch = Text("■ ", style="rgb({},{},{})".format(*color))
        scores = [number(result.per_class[measure].get(name)) for measure in _MEASURES]
        table.add_row(swatch + Text(name, style="default"), *scores, f"{share:.1%}")
    table.add_section()
    table.add_row("macro mean", *_means(result, classes.names), style="bold")
    if classes.background is not None:
        names = [name for i, name in enumerate(classes.names) if i != classes.background]
        table.add_row("foreground mean", *_means(result, names), style="bold")
    return table


def _means(result: EvalResult, names: "list[str] | tuple[str, ...]") -> list[str]:
    means = []
    for measure in _MEASURES:
        values = [result.per_class[measure].get(name) for name in names]
        present = [value for value in values if value is not None]
        means.append(number(float(np.mean(present)) if present else None))
    return means


def print_summary(
    end: EndLog,
    *,
    monitor: str,
    run_dir: Path,
    checkpoint: Path | None,
    tensorboard_dir: Path | None,
    console: Console | None = None,
) -> None:
    """Print how the training ended, its best score, and the commands to type next.

    Every command is one line that a shell takes as it stands; paths are relative to the working
    directory where they lie below it.

    Args:
        end: how the training ended.
        monitor: score that chose the best epoch.
        run_dir: the run's folder.
        checkpoint: best checkpoint, or None if there is none yet.
        tensorboard_dir: what `tensorboard --logdir` should show, or None if nothing was written.
        console: where to print; None: stdout.
    """
    console = console or stdout_console()

    def line(text: str) -> None:
        # Neither wrapped nor coloured by content: what is copied is what was meant.
        console.print(text, soft_wrap=True, highlight=False)

    line("")
    reason = REASONS.get(end.reason, end.reason)
    line(f"Ended after {end.updates} updates, {duration(end.seconds)}: {escape(reason)}.")
    if end.best_epoch is not None:
        best = ", ".join(
            f"{score_label(name)} {number(end.best_scores[name])}"
            for name in dict.fromkeys([monitor, "miou", "macro_f1", "foreground_f1"])
            if name in end.best_scores
        )
        line(f"[bold]Best: {best}[/bold] (epoch {end.best_epoch + 1})")
    else:
        line("No validation yet, so there is no best score.")
    if checkpoint is not None:
        line(f"Checkpoint: {escape(shown_path(checkpoint))}")

    line("")
    line("Next:")
    for command in next_commands(end, run_dir, checkpoint, tensorboard_dir):
        line(f"  [cyan]{escape(command)}[/cyan]")


def next_commands(
    end: EndLog, run_dir: Path, checkpoint: Path | None, tensorboard_dir: Path | None
) -> list[str]:
    """Return the commands that make sense after a training, quoted for a POSIX shell."""
    run = shown_path(run_dir)
    commands = []
    if end.reason in _RESUMABLE:
        commands.append(f"python train.py {hydra_override('resume', run)}")
    if tensorboard_dir is not None:
        commands.append(f"tensorboard --logdir {shlex.quote(shown_path(tensorboard_dir))}")
    if checkpoint is not None:
        commands.append(f"python evaluate.py {hydra_override('run', run)}")
    return commands


def write_metrics(path: Path, payload: Mapping[str, Any]) -> None:
    """Write strict JSON, all or nothing; NaN and infinity, which JSON lacks, become null.

    Args:
        path: the file; its folder exists.
        payload: numbers (NumPy's and 0-d tensors too), strings, paths, lists, mappings.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps(_jsonable(payload), indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(path, text + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
