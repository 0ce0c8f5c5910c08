import fcntl
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import get_context

from segfit.data import cache_disk, cache_ram
from segfit.data.cache import CachedSource, FittedSource
from segfit.data.cache_build import CacheOptions, cache_sources
from segfit.data.cache_ram import RamStore, SharedTensor
from segfit.data.dataset import EvalDataset, TrainDataset
from segfit.data.folder import folder_sources
from segfit.data.loader import LoaderOptions, train_loader
from segfit.data.sampler import EpochSampler
from segfit.data.shapes import ShapesSource, shapes_sources
from segfit.errors import SegFitError
from segfit.labels import Classes
from tests.contracts.source_contract import SourceContract
from tests.unit.data.files import names, noise, save, write_pairs

CLASSES = Classes(("a", "b", "c"))
SIZE = (24, 20)


def options(folder, where="disk", fit="crop", reading=""):
    return CacheOptions(where, SIZE, fit, reading, "set", folder)


def folders(root, count=6):
    """Return train and val of images of different sizes."""
    for split in ("train", "val"):
        for seed, name in enumerate(names(count)):
            size = (30 + seed, 40 - 2 * seed)
            save(root / split / "images" / f"{name}.png", noise(*size, 3, seed=seed))
            save(root / split / "masks" / f"{name}.png", noise(*size, seed=seed, high=3))
    return folder_sources(root, classes=CLASSES)


def decoded(cached):
    """Return the files behind a source, sorted."""
    return sorted(cached.store.folder.glob("??/*"))


def counted(source):
    """Count what is read of a source from now on, in this process."""
    read, calls = source.read, []

    def counting(index):
        calls.append(index)
        return read(index)

    source.read = counting
    return calls


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


class TestDiskContract(SourceContract):
    def make_sources(self, folder):
        sources = shapes_sources(6, 2, 2, resolution=64, data_seed=3)
        return cache_sources(sources, options(folder))[0]


class TestRamContract(SourceContract):
    def make_sources(self, folder):
        if not (folder / "images").exists():
            write_pairs(folder, names(8))
        return cache_sources(folder_sources(folder, classes=CLASSES), options(folder, "ram"))[0]


class TestFittedContract(SourceContract):
    def make_sources(self, folder):
        sources = shapes_sources(6, 2, 2, resolution=64, data_seed=3)
        return {split: FittedSource(source, SIZE, "pad") for split, source in sources.items()}


def flip(image, mask, *, seed):
    return (image.flip(-1), mask.flip(-1)) if seed % 2 else (image, mask)


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_batches_are_the_same_bit_for_bit(tmp_path, where, fit):
    sources = folders(tmp_path)
    cached, _ = cache_sources(sources, options(tmp_path, where, fit))
    for index in range(len(sources["train"])):
        plain, kept = (
            TrainDataset(splits["train"], SIZE, fit, flip)[index, 7 + index]
            for splits in (sources, cached)
        )
        assert torch.equal(plain["image"], kept["image"])
        assert torch.equal(plain["mask"], kept["mask"])
        plain, kept = (EvalDataset(splits["val"], SIZE, fit)[index] for splits in (sources, cached))
        assert plain.keys() == kept.keys()
        for key in ("image", "mask", "content"):
            assert torch.equal(plain[key], kept[key])


@pytest.mark.parametrize(
    ("where", "method"),
    [
        ("ram", "fork"),
        ("tensor", "fork"),
        ("disk", "fork"),
        ("ram", "spawn"),
        pytest.param("tensor", "spawn", marks=pytest.mark.slow),
        pytest.param("disk", "spawn", marks=pytest.mark.slow),
    ],
)
def test_workers_read_it_however_they_are_started(tmp_path, monkeypatch, where, method):
    if where == "tensor":
        monkeypatch.setattr(cache_ram, "MemoryFile", SharedTensor)
        where = "ram"
    sources = shapes_sources(8, 1, 1, resolution=32, data_seed=0)
    cached, _ = cache_sources(sources, options(tmp_path, where))
    sampler = EpochSampler(8, 4, seed=1)
    plain = list(
        train_loader(TrainDataset(sources["train"], SIZE, "crop"), sampler, torch.device("cpu"))
    )
    monkeypatch.setattr(ShapesSource, "read", None)  # a forked worker has nothing else to read
    loader = train_loader(
        TrainDataset(cached["train"], SIZE, "crop"), sampler, torch.device("cpu"), LoaderOptions(1)
    )
    loader.multiprocessing_context = get_context(method)
    for first, second in zip(plain, loader, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["mask"], second["mask"])


def test_what_is_read_cannot_change_what_is_kept(tmp_path):
    for where in ("ram", "disk"):
        cached, _ = cache_sources(folders(tmp_path), options(tmp_path, where))
        sample = TrainDataset(cached["train"], SIZE, "crop")[0, 0]
        before = sample["image"].clone()
        sample["image"].zero_()
        sample["mask"].zero_()
        assert torch.equal(TrainDataset(cached["train"], SIZE, "crop")[0, 0]["image"], before)


def test_a_second_run_decodes_nothing(tmp_path):
    sources = folders(tmp_path)
    _, line = cache_sources(sources, options(tmp_path))
    assert line.startswith("data.cache=disk: 12 images, 12 of them decoded now, 0 MiB below")
    assert str(tmp_path / "decoded") in line
    calls, told = counted(sources["train"]), []
    cached, line = cache_sources(sources, options(tmp_path), lambda *now: told.append(now))
    assert "all of them decoded before" in line
    assert equal(cached["train"].read(3), folders(tmp_path)["train"].read(3))
    assert calls == []
    assert told == []


def test_a_changed_file_is_decoded_again_and_no_other(tmp_path):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in decoded(cached["train"])}
    changed = tmp_path / "train" / "images" / "002.png"
    save(changed, noise(32, 36, 3, seed=99))
    sources = folder_sources(tmp_path, classes=CLASSES)
    told = []
    cached, line = cache_sources(sources, options(tmp_path), lambda *now: told.append(now))
    assert "1 of them decoded now" in line
    assert told == [(12, 12)]
    assert equal(cached["train"].read(2), sources["train"].read(2))
    after = {path: path.stat().st_mtime_ns for path in decoded(cached["train"])}
    assert len(after) == len(before)  # what was made from the old file is gone
    assert len(after.items() & before.items()) == len(before) - 1


def test_other_options_are_another_cache(tmp_path):
    sources = folders(tmp_path)
    for index, other in enumerate(
        [
            options(tmp_path),
            options(tmp_path, reading="label_map={}"),
            options(tmp_path, fit="pad"),
            options(tmp_path, fit="stretch"),
        ]
    ):
        cached, line = cache_sources(sources, other)
        assert "12 of them decoded now" in line, index
        assert len(decoded(cached["train"])) >= 6


def test_drawn_images_are_kept_by_number_and_options(tmp_path):
    one, _ = cache_sources(shapes_sources(4, 1, 1, 32, 0), options(tmp_path, reading="seed 0"))
    more, line = cache_sources(shapes_sources(6, 1, 1, 32, 0), options(tmp_path, reading="seed 0"))
    assert "2 of them decoded now" in line
    other, line = cache_sources(shapes_sources(4, 1, 1, 32, 5), options(tmp_path, reading="seed 5"))
    assert "6 of them decoded now" in line
    assert equal(one["train"].read(3), more["train"].read(3))
    assert equal(other["train"].read(3), shapes_sources(4, 1, 1, 32, 5)["train"].read(3))


def damage_header(content):
    return b"\xff" * 64 + content[64:]


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "header": damage_header,
    "a bit": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    "another shape": lambda content: content[:56] + content[60:64] + content[56:60] + content[64:],
    "huge": lambda content: content[:56] + b"\xff" * 16 + content[72:],
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


class Slow(ShapesSource):
    def read(self, index):
        time.sleep(0.02)
        return super().read(index)


def fill(folder):
    # Many enough for workers, which outlive their parent for a moment.
    source = Slow(200, resolution=32)
    cache_sources({"train": source}, options(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("segfit.data.cache_build.choose_workers", lambda _: workers)
    process = get_context("fork").Process(target=fill, args=(tmp_path,))
    process.start()
    while len(list(tmp_path.glob("decoded/*/??/*"))) < 20:
        time.sleep(0.005)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    source = ShapesSource(200, resolution=32)
    calls = counted(source)
    monkeypatch.setattr("segfit.data.cache_build.choose_workers", lambda _: 0)
    cached, line = cache_sources({"train": source}, options(tmp_path))
    assert "all of them" not in line
    assert len(set(calls)) <= 180
    for index in range(0, 200, 7):
        assert equal(cached["train"].store.get(index), ShapesSource(200, resolution=32).read(index))


def test_two_runs_may_fill_it_at_once(tmp_path):
    processes = [get_context("fork").Process(target=fill, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cached, line = cache_sources({"train": ShapesSource(200, resolution=32)}, options(tmp_path))
    assert "all of them decoded before" in line
    for index in range(0, 200, 7):
        assert equal(cached["train"].store.get(index), ShapesSource(200, resolution=32).read(index))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("date", [1, 4_000_000_000])
def test_what_a_killed_writer_left_is_removed_whatever_the_clock_says(tmp_path, date):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path))
    place = cached["train"].store._path(0)
    written, abandoned = (place.with_name(f"{place.name}.{name}.tmp") for name in "ab")
    for part in (written, abandoned):
        part.write_bytes(b"half")
        os.utime(part, (date, date))
    with written.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert cached["train"].store.missing() == []
        assert written.exists()
        assert not abandoned.exists()


def test_a_file_that_another_run_takes_for_abandoned_is_written_again(tmp_path, monkeypatch):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path))
    store = cached["train"].store
    image, mask = store.get(0)
    store._path(0).unlink()
    taken = []

    def lock(file):
        if len(taken) < 2:
            taken.append(Path(file.name))
            taken[-1].unlink()
        return True

    monkeypatch.setattr("segfit.data.cache_disk._lock", lock)
    store.put(0, image, mask)
    assert equal(store.get(0), (image, mask))
    assert len({path.name for path in taken}) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_disk_without_room_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_disk, "_RESERVE", 1 << 60)
    with pytest.raises(SegFitError, match=r"decoded \(data\.cache=disk\).*data\.cache_dir"):
        cache_sources(folders(tmp_path), options(tmp_path))
    assert not list(tmp_path.glob("decoded/*/*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fills_up_is_told_and_what_is_made_stays(tmp_path, monkeypatch, workers):
    import resource

    monkeypatch.setattr("segfit.data.cache_build._FEW", 0)
    monkeypatch.setattr("segfit.data.cache_build.choose_workers", lambda _: workers)
    sources = shapes_sources(6, 1, 1, resolution=32, data_seed=0)
    cache_sources(sources, options(tmp_path))
    sources["train"].resolution = 320  # images that the limit cuts off
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SegFitError, match=r"the disk is full \(data\.cache=disk\)") as error:
            cache_sources(sources, options(tmp_path, reading="large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(error.value.problems) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    sources["train"].resolution = 32
    assert "all of them" in cache_sources(sources, options(tmp_path))[1]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SegFitError, match=r"file/decoded.*cannot be written to.*data\.cache_dir"):
        cache_sources(folders(tmp_path), options(tmp_path / "file"))


def test_memory_without_room_is_refused_before_and_during(tmp_path, monkeypatch):
    sources = folders(tmp_path)
    monkeypatch.setattr(cache_ram, "free_memory", lambda: 1 << 29)
    with pytest.raises(SegFitError, match=r"data\.cache=ram: the images need about .* 0\.5 GiB"):
        cache_sources(sources, options(tmp_path, "ram"))
    monkeypatch.setattr(RamStore, "check_room", lambda store, size: None)
    with pytest.raises(SegFitError, match=r"data\.cache=ram: the next images.*data\.cache=disk"):
        cache_sources(sources, options(tmp_path, "ram"))


def test_memory_is_taken_in_as_many_blocks_as_it_needs(monkeypatch):
    monkeypatch.setattr(cache_ram, "_BLOCK", 10_000)
    store = RamStore(5)
    pairs = [(noise(30 + i, 40, 3, seed=i), noise(9, 9 + i, seed=i)) for i in range(5)]
    pairs[3] = (noise(80, 90, 3), noise(80, 90))  # larger than a block
    for index, pair in enumerate(pairs):
        store.put(index, *pair)
    assert len(store.blocks) > 2
    assert store.missing() == []
    assert all(equal(store.get(index), pair) for index, pair in enumerate(pairs))
    assert store.nbytes() == sum(image.size + mask.size for image, mask in pairs)
    copy = pickle.loads(pickle.dumps(store))
    assert all(equal(copy.get(index), pair) for index, pair in enumerate(pairs))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    sources = folders(tmp_path)
    path = sources["val"].files(2)[0]
    path.write_bytes(b"damaged")
    with pytest.raises(SegFitError) as error:
        cache_sources(sources, options(tmp_path, "ram"))
    assert error.value.problems == [
        f"{path}: unreadable (not an image). Replace the file or delete it."
    ]


def test_progress_counts_every_image_once(tmp_path):
    told = []
    cache_sources(folders(tmp_path), options(tmp_path), lambda *now: told.append(now))
    assert told[-1] == (12, 12)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_reading_outside_is_an_error(tmp_path):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path, "ram"))
    with pytest.raises(IndexError):
        cached["train"].read(6)
    assert isinstance(cached["train"], CachedSource)
