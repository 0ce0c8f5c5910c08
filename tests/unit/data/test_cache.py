import os
import pickle

import numpy as np
import pytest
import torch
from torch.multiprocessing import get_context

from segfit.data import cache_stores
from segfit.data.batches import EpochSampler
from segfit.data.cache import CachedSource
from segfit.data.cache_stores import DiskStore, RamStore
from segfit.data.loader import Loader
from segfit.data.shapes import ShapesSource
from segfit.tasks.segmentation.data.dataset import EvalDataset, FittedSource, TrainDataset, collate
from tests.contracts.source_contract import SourceContract
from tests.unit.data.caching import (
    CLASSES,
    SIZE,
    cache_sources,
    counted,
    decoded,
    equal,
    folders,
    options,
)
from tests.unit.data.files import names, noise, save, shapes_sources, write_pairs
from tests.unit.tasks.segmentation.data.folders import folder_sources


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
        pytest.param("ram", "spawn", marks=pytest.mark.slow),
        pytest.param("tensor", "spawn", marks=pytest.mark.slow),
        pytest.param("disk", "spawn", marks=pytest.mark.slow),
    ],
)
def test_workers_read_it_however_they_are_started(tmp_path, monkeypatch, where, method):
    if where == "tensor":
        monkeypatch.delattr(os, "memfd_create")
        where = "ram"
    sources = shapes_sources(8, 1, 1, resolution=32, data_seed=0)
    cached, _ = cache_sources(sources, options(tmp_path, where))
    sampler = EpochSampler(8, 4, seed=1)
    plain, kept = (TrainDataset(splits["train"], SIZE, "crop") for splits in (sources, cached))
    plain = list(Loader(plain, collate, torch.device("cpu"), batch_sampler=sampler))
    monkeypatch.setattr(ShapesSource, "read", None)  # a forked worker has nothing else to read
    loader = Loader(kept, collate, torch.device("cpu"), 1, batch_sampler=sampler)
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
    assert line.startswith("data.cache=disk: 12 samples, 12 of them decoded now, 0 MiB below")
    assert str(tmp_path / "decoded") in line
    calls, progress = counted(sources["train"]), []
    cached, line = cache_sources(sources, options(tmp_path), lambda *now: progress.append(now))
    assert "all of them decoded before" in line
    assert equal(cached["train"].read(3), folders(tmp_path)["train"].read(3))
    assert calls == []
    assert progress == []


def test_a_changed_file_is_decoded_again_and_no_other(tmp_path):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in decoded(cached["train"])}
    changed = tmp_path / "train" / "images" / "002.png"
    save(changed, noise(32, 36, 3, seed=99))
    sources = folder_sources(tmp_path, classes=CLASSES)
    progress = []
    cached, line = cache_sources(sources, options(tmp_path), lambda *now: progress.append(now))
    assert "1 of them decoded now" in line
    assert progress == [(12, 12)]
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


def test_memory_is_taken_in_as_many_blocks_as_it_needs(monkeypatch):
    monkeypatch.setattr(cache_stores, "_BLOCK", 10_000)
    store = RamStore(5)
    pairs = [(noise(30 + i, 40, 3, seed=i), noise(9, 9 + i, seed=i)) for i in range(5)]
    pairs[3] = (noise(80, 90, 3), noise(80, 90))  # larger than a block
    for index, pair in enumerate(pairs):
        store.put(index, pair)
    assert len(store.blocks) > 2
    assert store.missing() == []
    assert all(equal(store.get(index), pair) for index, pair in enumerate(pairs))
    pixels = sum(image.size + mask.size for image, mask in pairs)
    assert pixels <= store.nbytes() <= pixels + 5 * 3 * 64
    copy = pickle.loads(pickle.dumps(store))
    assert all(equal(copy.get(index), pair) for index, pair in enumerate(pairs))


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_arrays_of_any_kind_are_kept(tmp_path, where):
    store = RamStore(2) if where == "ram" else DiskStore(tmp_path, ["a-1", "b-1"])
    series = np.arange(12, dtype=np.float64).reshape(2, 6)[:, ::2]
    items = [
        (series, np.array(3, np.int16), np.zeros((0, 4), np.float32)),
        (noise(5, 7, 3, dtype="uint16"),),
    ]
    for index, arrays in enumerate(items):
        store.put(index, arrays)
    for index, arrays in enumerate(items):
        found = store.get(index)
        assert [array.dtype for array in found] == [array.dtype for array in arrays]
        assert [array.shape for array in found] == [array.shape for array in arrays]
        assert equal(found, arrays)
        assert all(array.flags.aligned for array in found)


def test_progress_counts_every_image_once(tmp_path):
    progress = []
    cache_sources(folders(tmp_path), options(tmp_path), lambda *now: progress.append(now))
    assert progress[-1] == (12, 12)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})


def test_reading_outside_is_an_error(tmp_path):
    cached, _ = cache_sources(folders(tmp_path), options(tmp_path, "ram"))
    with pytest.raises(IndexError):
        cached["train"].read(6)
    assert isinstance(cached["train"], CachedSource)
