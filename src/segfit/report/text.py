"""Numbers and paths as text: shared by console, log file, summary and leader board."""

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

ABSENT = "–"  # a number that does not exist
_FILE_WIDTH = 10_000  # columns of what is no terminal: tables take the width that they need


def stdout_console() -> Console:
    """Return a console on stdout; it prints a "?" for what the encoding lacks, and cuts no table in a file or pipe."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # else a dash would end a training
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def monitored_first(monitor: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return score name → label of the monitored score, then of the others that are shown."""
    return {monitor: columns.get(monitor, monitor.replace("_", " ")), **columns}


def scores_text(scores: Mapping[str, float], columns: Mapping[str, str]) -> str:
    """Return the scores that have a column: "PSNR 29.12, SSIM 0.8617"."""
    known = [name for name in columns if name in scores]
    return ", ".join(f"{columns[name]} {number(scores[name])}" for name in known)


def number(value: float | None, spec: str = ".4f") -> str:
    """Format a number, or `ABSENT` for None and NaN."""
    return ABSENT if value is None or math.isnan(value) else format(value, spec)


def duration(seconds: float) -> str:
    """Format a duration in seconds: "0.8s", "42s", "3:05", "1:02:03", "2d 03:04:05"."""
    if not math.isfinite(seconds):
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{whole}s"
    days, hour, minute, second = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def one_line(message: str) -> str:
    """Return the message without line breaks, so that it stays one record."""
    return " ".join(message.split())


def shown_path(path: Path) -> str:
    """Return the path relative to the working directory if it is below that, else absolute."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow links)
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)


def hydra_override(key: str, value: str) -> str:
    """Return `key=value` for the shell such that Hydra's override grammar gives back the same text.

    Source: https://hydra.cc/docs/1.3/advanced/override_grammar/basic/
    """
    # A bare word that Hydra reads as this very string, and not as a number or null.
    word = value[:1].isalpha() and value.lower() not in ("null", "true", "false", "nan", "inf")
    if not (re.fullmatch(r"[A-Za-z0-9_/.+@-]+", value) and ("/" in value or word)):
        # Hydra: a backslash escapes only in front of a quote, or of another such backslash.
        escaped = re.sub(r"(\\*)'", lambda match: match.group(1) * 2 + r"\'", value)
        escaped = re.sub(r"(\\+)$", lambda match: match.group(1) * 2, escaped)
        value = f"'{escaped}'"
    return shlex.quote(f"{key}={value}")
