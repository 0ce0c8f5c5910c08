"""The files of a data set and their names."""

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from segfit.errors import printable

_SHOWN = 5  # files named per problem


def some(items: Sequence[object], limit: int = _SHOWN) -> str:
    """Return "a, b, c and 4 more", each once: slices of one volume have one file."""
    texts = list(dict.fromkeys(map(str, items)))
    text = ", ".join(texts[:limit])
    return f"{text} and {len(texts) - limit} more" if len(texts) > limit else text


def list_files(folder: Path, suffixes: Collection[str], skip: Path | None = None) -> list[Path]:
    """Return the files below `folder` whose suffix (any case) is one of `suffixes`, sorted.

    Links to folders are followed, once; hidden files (such as macOS's `._name`) are left out.

    Args:
        folder: where to look.
        suffixes: lower case, with the dot; empty: any.
        skip: a folder below that is left out.
    """
    files: list[Path] = []
    seen: set[str] = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen or (skip is not None and Path(current) == skip):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(current, name) for name in names if not name.startswith(".")]
    if suffixes:
        files = [file for file in files if file.suffix.lower() in suffixes]
    return sorted(files, key=str)


def relative_name(file: Path, folder: Path) -> str:
    """Return the name below `folder` without suffix, / between folders, composed Unicode.

    macOS and archives made there write "é" as two characters; names pair all the same. Bytes that are no UTF-8 are
    spelt out (\\udce9), for a name is printed, logged and used for new files.
    """
    # Text, not paths: a tenth of the time, for sets of 100,000s of files.
    above = 0 if str(folder) == "." else len(str(folder))
    name = os.path.splitext(str(file)[above:].lstrip(os.sep))[0]  # noqa: PTH122
    name = name.replace(os.sep, "/")
    if ".nii" in name:  # a slice of a volume
        name = re.sub(r"\.nii(\.gz)?/", "/", name)
    return name if name.isascii() else unicodedata.normalize("NFC", printable(name))


def files_by_name(
    files: Sequence[Path],
    folder: Path,
    name_of: Callable[[Path, Path], str | None] = relative_name,
) -> tuple[dict[str, Path], list[str]]:
    """Return name → file, and one message if two files share a name; files whose name is None are left out."""
    named: dict[str, Path] = {}
    twice = []
    for file in files:
        name = name_of(file, folder)
        if name in named:
            twice.append(f"{named[name].name} and {file.name}")
        elif name is not None:
            named[name] = file
    text = f"{folder}: {len(twice)} names stand for two files: {some(twice)}. Keep one of each."
    return named, [text] if twice else []
