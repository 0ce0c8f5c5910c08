"""Damaged files, killed writers, two at once, no room: a cache never returns a wrong pixel."""

import os
import pickle
import signal
import time
from functools import partial

import pytest
from torch.multiprocessing import get_context

from segfit.data import cache_stores
from segfit.data.cache_stores import RamStore
from segfit.data.shapes import ShapesSource
from segfit.errors import SegFitError
from tests.unit.data.caching import cache_sources, counted, decoded, equal, folders, options
from tests.unit.data.files import shapes_sources


def damage_header(content):
    return b"\xff" * 64 + content[64:]


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "header": damage_header,
    "a bit": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    "another shape": lambda content: content.replace(b"[31, 38, 3]", b"[38, 31, 3]"),
    "huge": lambda content: content.replace(b"[31, 38, 3]", b"[99999999]"),
    "zeros": lambda content: bytes(len(content)),
    "pickle": lambda content: pickle.dumps(os.getcwd) * 40,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_gives_no_wrong_pixel_and_is_mended(tmp_path, how):
    sources = folders(tmp_path)
    cached, _ = cache_sources(sources, options(tmp_path))
    store = cached["train"].store
    path = store._path(1)
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    assert store.get(1) is None
    assert equal(cached["train"].read(1), sources["train"].read(1))
    assert equal(store.get(1), sources["train"].read(1))


def test_another_items_file_in_its_place_is_refused(tmp_path):
    sources = folders(tmp_path)
    cached, _ = cache_sources(sources, options(tmp_path))
    store = cached["train"].store
    store._path(0).write_bytes(store._path(1).read_bytes())
    assert equal(cached["train"].read(0), sources["train"].read(0))


def test_a_cache_that_vanishes_is_made_again_as_it_is_read(tmp_path):
    sources = folders(tmp_path)
    cached, _ = cache_sources(sources, options(tmp_path))
    for path in decoded(cached["train"]):
        path.unlink()
    assert equal(cached["train"].read(4), sources["train"].read(4))
    assert len(decoded(cached["train"])) == 1


class Fatal(ShapesSource):
    """Kills the process that it is made in half-way, when a certain image is read, there or in a worker of it."""

    def __init__(self):
        super().__init__(200, resolution=32)
        self.made_in = os.getpid()

    def read(self, index):
        if index == 111:
            os.kill(self.made_in, signal.SIGKILL)
        return super().read(index)


class Slow(ShapesSource):
    def read(self, index):
        time.sleep(0.005)
        return super().read(index)


def fill(folder, make):
    cache_sources({"train": make()}, options(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("segfit.data.cache.choose_workers", lambda: workers)
    process = get_context("fork").Process(target=fill, args=(tmp_path, Fatal))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    source = ShapesSource(200, resolution=32)
    calls = counted(source)
    monkeypatch.setattr("segfit.data.cache.choose_workers", lambda: 0)
    cached, line = cache_sources({"train": source}, options(tmp_path))
    assert "all of them" not in line
    assert len(set(calls)) <= 150
    for index in range(0, 200, 7):
        assert equal(cached["train"].store.get(index), ShapesSource(200, resolution=32).read(index))


def test_two_runs_may_fill_it_at_once(tmp_path):
    slow = partial(Slow, 200, resolution=32)
    processes = [get_context("fork").Process(target=fill, args=(tmp_path, slow)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cached, line = cache_sources({"train": ShapesSource(200, resolution=32)}, options(tmp_path))
    assert "all of them decoded before" in line
    for index in range(0, 200, 7):
        assert equal(cached["train"].store.get(index), ShapesSource(200, resolution=32).read(index))
    assert not partials(tmp_path)


def partials(folder):
    return list(folder.rglob("*.partial"))


def test_the_next_run_removes_what_a_killed_writer_left(tmp_path):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path))
    place = cached["train"].store._path(0)
    written, writing = (place.with_name(f".{place.name}.{n}-4.partial") for n in (1, 2))
    for path in (written, writing):
        path.write_bytes(b"half")
    os.utime(written, (0, 0))
    assert cached["train"].store.missing() == []
    assert partials(tmp_path) == [writing]


def test_a_disk_without_room_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_stores, "_DISK_RESERVE", 1 << 60)
    with pytest.raises(SegFitError, match=r"decoded \(data\.cache=disk\).*data\.cache_dir"):
        cache_sources(folders(tmp_path), options(tmp_path))
    assert not list(tmp_path.glob("decoded/*/*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fills_up_is_reported_and_what_is_made_stays(tmp_path, monkeypatch, workers):
    import resource

    monkeypatch.setattr("segfit.data.cache._FEW", 0)
    monkeypatch.setattr("segfit.data.cache.choose_workers", lambda: workers)
    sources = shapes_sources(6, 1, 1, resolution=32, data_seed=0)
    cache_sources(sources, options(tmp_path))
    sources["train"].resolution = 320  # images that the limit cuts off
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SegFitError, match=r"cannot be written to \(File too large\)") as error:
            cache_sources(sources, options(tmp_path, reading="large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(error.value.problems) == 1
    assert not partials(tmp_path)
    sources["train"].resolution = 32
    assert "all of them" in cache_sources(sources, options(tmp_path))[1]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SegFitError, match=r"file/decoded.*cannot be written to.*data\.cache_dir"):
        cache_sources(folders(tmp_path), options(tmp_path / "file"))


def test_memory_without_room_is_refused_before_and_during(tmp_path, monkeypatch):
    sources = folders(tmp_path)
    monkeypatch.setattr(cache_stores, "free_memory", lambda: 1 << 29)
    with pytest.raises(SegFitError, match=r"data\.cache=ram: the samples need about .* 0\.5 GiB"):
        cache_sources(sources, options(tmp_path, "ram"))
    check = RamStore.check_room
    later = lambda store, size, *what: check(store, size, *what) if what else None  # noqa: E731
    monkeypatch.setattr(RamStore, "check_room", later)
    with pytest.raises(SegFitError, match=r"data\.cache=ram: the next samples.*data\.cache=disk"):
        cache_sources(sources, options(tmp_path, "ram"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    sources = folders(tmp_path)
    path = sources["val"].files(2)[0]
    path.write_bytes(b"damaged")
    with pytest.raises(SegFitError) as error:
        cache_sources(sources, options(tmp_path, "ram"))
    assert error.value.problems == [
        f"{path}: unreadable (not an image). Replace the file or delete it."
    ]
