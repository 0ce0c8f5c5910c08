"""What is printed after a training: how it ended, the best score, what to type next."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from segfit.engine.events import EndLog
from segfit.report.lines import REASONS
from segfit.report.text import duration, hydra_override, scores_text, shown_path, stdout_console


def print_summary(
    end: EndLog,
    *,
    columns: Mapping[str, str],
    remark: str,
    run_dir: Path,
    checkpoint: Path | None,
    tensorboard_dir: Path | None,
    console: Console | None = None,
) -> None:
    """Print how the training ended, its best score, a remark on it, and the commands to type next.

    Every command is one line that can be pasted into a shell; paths below the working directory are relative to it.
    """
    console = console or stdout_console()

    def line(text: str) -> None:
        # Neither wrapped nor coloured by content, so that commands can be copied.
        console.print(text, soft_wrap=True, highlight=False)

    line("")
    reason = REASONS.get(end.reason, end.reason)
    line(f"Ended after {end.updates} updates, {duration(end.seconds)}: {escape(reason)}.")
    if end.best_epoch is not None:
        best = escape(scores_text(end.best_scores, columns))
        line(f"[bold]Best: {best}[/bold] (epoch {end.best_epoch + 1})")
        if remark:
            line(escape(remark))
    else:
        line("No validation gave the monitored score a value, so there is no best checkpoint.")
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
    if end.reason in ("interrupted", "terminated"):
        commands.append(f"python train.py {hydra_override('resume', run)}")
    if tensorboard_dir is not None:
        commands.append(f"tensorboard --logdir {shlex.quote(shown_path(tensorboard_dir))}")
    if checkpoint is not None:
        commands.append(f"python evaluate.py {hydra_override('run', run)}")
    return commands
