"""What is printed after a training: how it ended, the best score, what to type next."""

import shlex
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from segfit.engine.events import EndLog
from segfit.report.files import RunFiles
from segfit.report.lines import REASONS
from segfit.report.text import duration, hydra_override, scores_text, shown_path, stdout_console


def print_summary(
    end: EndLog,
    *,
    columns: Mapping[str, str],
    remark: str,
    files: RunFiles,
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
    for label, path in (("Checkpoint", files.best), ("Report", files.page)):
        if path.exists():
            line(f"{label}: {escape(shown_path(path))}")

    line("")
    line("Next:")
    for command in next_commands(end.reason, files):
        line(f"  [cyan]{escape(command)}[/cyan]")


def next_commands(reason: str, files: RunFiles) -> list[str]:
    """Return the commands that make sense after a training, quoted for a POSIX shell."""
    run = shown_path(files.path)
    commands = []
    if reason in ("interrupted", "terminated"):
        commands.append(f"python train.py {hydra_override('resume', run)}")
    if files.tensorboard.exists():
        commands.append(f"tensorboard --logdir {shlex.quote(shown_path(files.tensorboard))}")
    if files.best.exists():
        commands.append(f"python evaluate.py {hydra_override('run', run)}")
    return commands
