"""A data set, as everything that makes batches sees it; and its files and their names."""

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from segfit.errors import SegFitError, printable

Arrays: TypeAlias = tuple[NDArray[Any], ...]

_SHOWN = 5  # files named per problem


class Source(Protocol):
    """Samples by index, each a tuple of NumPy arrays; deterministic, picklable, safe in many processes."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def id(self, index: int) -> str:
        """Return a unique name without suffix, relative, with / between its parts."""

    def files(self, index: int) -> list[Path]:
        """Return the files behind a sample, for messages; empty for synthetic data."""

    def read(self, index: int) -> Arrays:
        """Return the arrays of a sample; the task says which, and their dtypes and shapes.

        Raises a SegFitError if a file is unreadable, or its content makes no sense.
        """


class Named:
    """What a `Source` of files with names has in common with others."""

    names: Sequence[str]  # relative, without suffix, / between folders, in the order of the indices

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        """Return a sample's name, as `Source.id`."""
        return self.names[index]


class SourceView:
    """The samples of another source; a subclass says how they are read, or as a dataset what is made of them."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def id(self, index: int) -> str:
        """Return the source's name of the sample."""
        return self.source.id(index)

    def files(self, index: int) -> list[Path]:
        """Return the source's files."""
        return self.source.files(index)

    def where(self, index: int) -> str:
        """Return the files behind a sample, or its name where there is none, for messages."""
        return ", ".join(map(str, self.files(index))) or self.id(index)


def some(items: Sequence[object], limit: int = _SHOWN) -> str:
    """Return "a, b, c and 4 more", each once: slices of one volume have one file."""
    texts = list(dict.fromkeys(map(str, items)))
    text = ", ".join(texts[:limit])
    return f"{text} and {len(texts) - limit} more" if len(texts) > limit else text


def list_files(folder: Path, suffixes: Collection[str], skip: Path | None = None) -> list[Path]:
    """Return the files below a folder with one of the suffixes (lower case, with the dot, for any case; empty: any), sorted.

    Links to folders are followed, once; hidden files (such as macOS's `._name`) and the folder `skip` are left out. Raises
    a SegFitError if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise SegFitError(f"{error.filename}: cannot be read ({error.strerror}).") from error

    files: list[Path] = []
    seen: set[str] = set()
    for current, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
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
    files: Sequence[Path], folder: Path, name_of: Callable[[Path, Path], str | None] = relative_name
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
