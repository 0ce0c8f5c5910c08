"""Data sets of different sizes to keep, and what tests of caches ask of them."""

import numpy as np
from omegaconf import OmegaConf

from segfit.data import cache
from segfit.tasks.segmentation.assembly import cached_forms
from segfit.tasks.segmentation.classes import Classes
from tests.unit.data.files import names, noise, save
from tests.unit.tasks.segmentation.data.folders import folder_sources

CLASSES = Classes(("a", "b", "c"))
SIZE = (32, 32)


def options(folder, where="disk", fit="crop", reading=""):
    data = {
        "name": "set",
        "fit": fit,
        "cache": where,
        "cache_dir": str(folder),
        "on_bad_sample": "fail",
    }
    return OmegaConf.create({"image_size": list(SIZE), "data": data}), reading


def cache_sources(sources, how, progress=None):
    config, reading = how
    return cache.cache_sources(cached_forms(config, sources), config.data, reading, progress)


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
