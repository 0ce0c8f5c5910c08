"""Decoded samples, kept: after the first time no epoch opens a file. Batches are the same, bit for bit."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from segfit.data.cache_stores import DiskStore, RamStore
from segfit.data.loader import Loader
from segfit.data.preflight import default_cache_dir, spread
from segfit.data.source import Arrays, Source, SourceView
from segfit.errors import SegFitError
from segfit.system.hardware import choose_workers

Store: TypeAlias = DiskStore | RamStore

_VERSION = 4  # raise it when the same files give other arrays
_PROBES = 8  # samples of a split whose sizes are taken for the others'
_BATCH = 8  # samples that a worker makes at a time
_FEW = 64  # samples that are made before a worker would have started


class CachedSource(SourceView):
    """A `Source` that reads from a store, and from the source itself where the store has lost a sample."""

    def __init__(self, source: Source, store: Store) -> None:
        super().__init__(source)
        self.store = store

    def read(self, index: int) -> Arrays:
        """Return what `source.read` does; the arrays may be read-only.

        Raises a SegFitError if the store has lost the sample and its files cannot be read.
        """
        found = self.store.get(index)
        if found is None:
            found = self.source.read(index)
            if isinstance(self.store, DiskStore):
                with contextlib.suppress(SegFitError):
                    self.store.put(index, found)
        return found

    def __getitem__(self, index: int) -> tuple[int, Arrays | None]:
        """Return the index of a sample that was missing, and its arrays where a worker cannot store them itself."""
        if self.store.has(index):  # another run made it meanwhile
            return index, None
        arrays = self.source.read(index)
        if isinstance(self.store, RamStore):
            return index, arrays
        self.store.put(index, arrays)
        return index, None


def cache_sources(
    sources: Mapping[str, tuple[Source, str]],
    data: Any,
    reading: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, CachedSource], str]:
    """Decode what is not kept yet; return sources that read what is, and a line about it.

    `sources` are split → (source, what is done to its samples, for the name of its folder); `data` has the options of
    `DataConfig`, of which cache=none is ram; `reading` is everything but the files that arrays depend on. `progress` is called
    with (done, total) samples while they are decoded. Raises a SegFitError if a sample cannot be read, or memory or disk have no
    room or refuse to be written to.
    """
    cached = {split: _cached(*source, data, reading) for split, source in sources.items()}
    missing = [(one, indices) for one in cached.values() if (indices := one.store.missing())]
    total = sum(len(source) for source in cached.values())
    new = sum(len(indices) for _, indices in missing)
    done = total - new
    for made in _build(missing, skip=data.on_bad_sample == "skip"):
        done += made
        if progress is not None:
            progress(done, total)
    lost = sum(not source.store.has(index) for source, indices in missing for index in indices)
    size = sum(source.store.nbytes() for source in cached.values()) / 2**20
    place = f"below {cache_root(data)}" if data.cache == "disk" else "of memory"
    decoded = f"{new - lost} of them decoded now" if new else "all of them decoded before"
    decoded += f", {lost} that cannot be read" if lost else ""
    line = f"data.cache={data.cache}: {total} samples, {decoded}, {size:.0f} MiB {place}."
    return cached, line


def cache_root(data: Any) -> Path:
    """Return the folder of everything that data.cache=disk keeps decoded."""
    return Path(data.cache_dir or default_cache_dir()).expanduser() / "decoded"


def label_of(data: Any) -> str:
    """Return what a data set is called, for the names of its folders."""
    name = Path(getattr(data, "root", None) or data.name).expanduser().resolve().name
    return re.sub(r"[^\w.-]", "_", name)[:64]


def _cached(source: Source, kind: str, data: Any, reading: str) -> CachedSource:
    if data.cache != "disk":
        return CachedSource(source, RamStore(len(source)))
    reading = f"{kind}\0{reading}"
    folder = cache_root(data) / f"{label_of(data)}-{kind}-{digest(4, reading)}"
    versions = "\0".join(version(name) for name in ("torch", "torchvision", "pillow", "numpy"))
    names = [_name(source, index, reading, versions) for index in range(len(source))]
    return CachedSource(source, DiskStore(folder, names))


def _name(source: Source, index: int, reading: str, versions: str) -> str:
    """Return what a sample is, "-", and the state of its files and of the libraries that decode them."""
    paths = [path.absolute() for path in source.files(index)]
    names = [repr(os.fsencode(path)) for path in paths]
    state = [str(_VERSION), versions, *names]
    for path in paths:
        with contextlib.suppress(OSError):  # reading it will raise
            state.append(f"{path.stat().st_size}\0{path.stat().st_mtime_ns}")
    return f"{digest(12, reading, source.id(index), *names[:1])}-{digest(8, *state)}"


def digest(size: int, *parts: str) -> str:
    """Return a name of so many bytes, in hexadecimal, for texts."""
    text = "\0".join(parts).encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=size).hexdigest()


def _build(missing: Sequence[tuple[CachedSource, list[int]]], *, skip: bool) -> Iterator[int]:
    """Make what is missing; yield the number of samples that were made since the last time."""
    need = 0  # bytes; a tenth more than a few samples say, for sizes differ
    for source, indices in missing:
        sizes = []
        for place in spread(len(indices), _PROBES):
            with contextlib.suppress(SegFitError):  # it is read again
                arrays = source.source.read(indices[place])
                sizes.append(sum(array.nbytes for array in arrays))
        need += round(1.1 * sum(sizes) * len(indices) / max(len(sizes), 1))
    report = (lambda _: None) if skip else None
    how: dict[str, Any] = {"share": True, "prefetch": 2, "persistent": False, "batch_size": _BATCH}
    for source, indices in missing:
        source.store.check_room(need)
        workers = choose_workers() if len(indices) > _FEW else 0
        device = torch.device("cpu")
        for items in Loader(source, list, device, workers, report, sampler=indices, **how):
            for index, arrays in items:
                if arrays is not None:
                    source.store.put(index, arrays)
            yield len(items)
