"""A data set, as everything that makes batches sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

Arrays: TypeAlias = tuple[NDArray[Any], ...]


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
