"""Reports on files, remembered until the files change."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from segfit.tasks.segmentation.data.inspection import ItemReport

# Part of every key: raise it when a report says something new, and old ones are forgotten.
_VERSION = 2
_LOOK_UP = 500  # keys a query; SQLite takes 999 variables at least


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/segfit`, or `~/.cache/segfit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "segfit"


def report_key(files: Iterable[Path], options: str) -> bytes:
    """Return what a report depends on: path, size and time of change of each file, and the options.

    Raises:
        OSError: if a file is not there.
    """
    digest = hashlib.blake2b(f"{_VERSION}\0{options}".encode(), digest_size=16)
    for file in files:
        stat = file.stat()
        path = os.fsencode(file if file.is_absolute() else file.absolute())
        digest.update(path + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.digest()


class ReportCache:
    """Reports by key in an SQLite file, which several runs may share.

    Remembering is a convenience: a cache that cannot be read or written (no space, no rights, a file
    that is no database) is as good as an empty one, and never an error.

    Args:
        folder: where `preflight.sqlite3` lies; made if need be. None: remember nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.connection: sqlite3.Connection | None = None
        if folder is None:
            return
        path = folder / "preflight.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(path)
        except sqlite3.OperationalError:  # locked, or no rights: somebody's, so it is left alone
            self.connection = None
        except (sqlite3.DatabaseError, OSError):
            self._replace(path)

    def _open(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, timeout=10)
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS reports (key BLOB PRIMARY KEY, report TEXT) WITHOUT ROWID"
        )

    def _replace(self, path: Path) -> None:
        """Start afresh after a file that is no database."""
        self.close()
        try:
            path.unlink(missing_ok=True)
            self._open(path)
        except (sqlite3.Error, OSError):
            self.connection = None

    def get(self, keys: Iterable[bytes]) -> dict[bytes, ItemReport]:
        """Return the reports that are known."""
        found: dict[bytes, ItemReport] = {}
        if self.connection is None:
            return found
        wanted = list(keys)
        try:
            for start in range(0, len(wanted), _LOOK_UP):
                some = wanted[start : start + _LOOK_UP]
                marks = ",".join("?" * len(some))
                rows = self.connection.execute(
                    f"SELECT key, report FROM reports WHERE key IN ({marks})", some
                )
                found.update({key: ItemReport.from_json(report) for key, report in rows})
        except (sqlite3.Error, ValueError, TypeError):
            return {}
        return found

    def put(self, reports: Mapping[bytes, ItemReport]) -> None:
        """Remember; what is put is safe from a kill once this returns."""
        if self.connection is None or not reports:
            return
        try:
            with self.connection:
                self.connection.executemany(
                    "INSERT OR REPLACE INTO reports VALUES (?, ?)",
                    [(key, report.to_json()) for key, report in reports.items()],
                )
        except sqlite3.Error:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
