"""A look at every sample before the first step, remembered until its files change."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from segfit.data.source import some
from segfit.errors import SegFitError
from segfit.system.hardware import available_cores

SAMPLE = 100  # samples of each split that check="sample" opens
# Part of every key: raise it when a report holds something new, and old ones are forgotten.
_VERSION = 8
_CHUNK = 256  # samples between two saves of reports
_TABLE = "CREATE TABLE IF NOT EXISTS reports (key BLOB PRIMARY KEY, report TEXT) WITHOUT ROWID"
_KNOWN = "SELECT key, report FROM reports WHERE key = ?"
_REMEMBER = "INSERT OR REPLACE INTO reports VALUES (?, ?)"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Preflight:
    """What a look at the data found that does not keep a training from starting."""

    notices: list[str] = field(default_factory=list)  # lines for the log


@dataclass(frozen=True)
class Seen:
    """A sample that was looked at."""

    split: str
    source: Any
    index: int
    report: dict[str, Any]  # what `inspect` returned, or "unreadable": why

    @property
    def files(self) -> list[Path]:
        """The sample's files."""
        files: list[Path] = self.source.files(self.index)
        return files


def inspect_sources(
    sources: Mapping[str, Any], check: str, progress: Progress | None = None
) -> list[Seen]:
    """Return what was found about samples, split by split; reports on unchanged files come from `default_cache_dir()`.

    `sources` are split → a `Source` of files with `inspect(index)`, which reads a sample and returns a report of plain
    values, or raises a SegFitError; `options`, everything but the files that it depends on; and `contents`, which gets name →
    key of its files' contents. The check "full" looks at every sample, "sample" at a hundred of each split, spread evenly.
    `progress` is called with (done, total) samples while files are opened; remembered ones count as done.
    """
    items = [
        (split, index)
        for split, source in sources.items()
        for index in spread(len(source), len(source) if check == "full" else SAMPLE)
    ]
    keys = {item: _key(sources[item[0]], item[1]) for item in items}
    ask = partial(_remembered, default_cache_dir() / "preflight.sqlite3")
    known = dict(ask(_KNOWN, [(key,) for key in keys.values() if key]))
    reports = {item: known[key] for item, key in keys.items() if key in known}
    new = [item for item in items if item not in reports]
    _content.cache_clear()  # files may have changed since
    # Threads: decoders release the interpreter's lock.
    with ThreadPoolExecutor(min(32, max(2, available_cores()))) as pool:
        for start in range(0, len(new), _CHUNK):
            chunk = new[start : start + _CHUNK]
            texts = pool.map(lambda item: _look(sources[item[0]], item[1]), chunk)
            reports.update(zip(chunk, texts, strict=True))
            ask(_REMEMBER, [(keys[item], reports[item]) for item in chunk if keys[item]])
            if progress is not None:
                progress(len(reports), len(items))
    seen = []
    for split, index in items:
        source = sources[split]
        source.contents[source.id(index)], _, report = reports[split, index].partition("\n")
        seen.append(Seen(split, source, index, json.loads(report)))
    return seen


def unreadable(seen: Sequence[Seen], *, skip: bool) -> tuple[list[str], list[str]]:
    """Return (problems, notices) about samples that cannot be read; with `skip` a notice, as long as others of a split can."""
    texts = (one.report.get("unreadable") for one in seen)
    unread = list(dict.fromkeys(filter(None, texts)))
    good = {one.split for one in seen if "unreadable" not in one.report}
    problems = [
        f"{split}: none of the images can be read; data.on_bad_sample=skip has nothing to take their place."
        for split in dict.fromkeys(one.split for one in seen)
        if skip and split not in good
    ]
    if problems or not skip:
        more = [f"… and {len(unread) - 5} more unreadable files."] if len(unread) > 5 else []
        return problems + unread[:5] + more, []
    images = f"{len(unread)} image{'s' if len(unread) != 1 else ''}"
    return [], [f"data.on_bad_sample=skip leaves out {images}: {some(unread)}"] if unread else []


def _look(source: Any, index: int) -> str:
    """Return two lines: digests of a sample's files (of the first, and of the others together), and its report."""
    first, *others = map(_content, source.files(index))
    rest = hashlib.blake2b("".join(others).encode(), digest_size=8).hexdigest()
    try:
        report = source.inspect(index)
    except SegFitError as error:
        report = {"unreadable": str(error)}
    except MemoryError as error:  # no fault of the file's, and nothing to remember
        raise SegFitError(
            f"{source.files(index)[0]}: memory ran out while this was read. Cut large images into tiles."
        ) from error
    return f"{first} {rest}\n{json.dumps(report)}"


@lru_cache(64)  # a table is a file of many samples
def _content(file: Path) -> str:
    if not file.is_file():  # a pipe would be waited for, a device read without end
        return "unreadable"
    digest = hashlib.blake2b(digest_size=8)
    with suppress(OSError), file.open("rb") as stream:
        while piece := stream.read(2**20):  # not hashlib.file_digest, which Python 3.10 lacks
            digest.update(piece)
        return digest.hexdigest()
    return "unreadable"


def spread(length: int, limit: int) -> list[int]:
    """Return at most `limit` different indices below `length`, evenly spread."""
    if length <= limit:
        return list(range(length))
    return [index * length // limit for index in range(limit)]


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/segfit`, or `~/.cache/segfit`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "segfit"


def _key(source: Any, index: int) -> bytes:
    """Return what a report depends on: path, size and time of change of each file, and the options.

    b"" where a file is gone: then nothing is remembered.
    """
    about = f"{_VERSION}\0{source.options}\0{source.id(index)}"
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    with suppress(OSError):
        for file in source.files(index):
            stat = file.stat()
            digest.update(os.fsencode(file.absolute()))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return digest.digest()
    return b""


def _remembered(path: Path, query: str, rows: Sequence[tuple[Any, ...]]) -> list[tuple[bytes, str]]:
    """Return what a query finds for rows of values in the SQLite file of reports, which several runs may share.

    What it writes is safe from a kill once this returns. A damaged file is replaced. One that cannot be read or written
    (no space, no rights) remembers nothing, and is never an error.
    """
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=10)) as database, database:
                database.execute(_TABLE)
                return [found for row in rows for found in database.execute(query, row)]
        except (sqlite3.Error, OSError) as error:
            if type(error) is not sqlite3.DatabaseError:  # but a subclass: no space, no rights
                break
            with suppress(OSError):
                for name in (path.name, f"{path.name}-journal"):
                    path.with_name(name).unlink(missing_ok=True)
    return []
