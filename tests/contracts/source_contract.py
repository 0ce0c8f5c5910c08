"""What every data source must keep; a new one inherits this and says how it is made."""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from segfit.data.source import Source
from segfit.tasks.segmentation.classes import IGNORE_INDEX


class SourceContract(ABC):
    @abstractmethod
    def make_sources(self, folder: Path) -> Mapping[str, Source]:
        """Return small sources; called twice with one folder, it returns equal ones."""

    @pytest.fixture
    def sources(self, tmp_path: Path) -> Mapping[str, Source]:
        return self.make_sources(tmp_path)

    def test_has_train_and_val(self, sources):
        assert {"train", "val"} <= set(sources) <= {"train", "val", "test"}
        assert all(len(source) > 0 for source in sources.values())

    def test_is_deterministic(self, sources, tmp_path):
        again = self.make_sources(tmp_path)
        for split, source in sources.items():
            assert [source.id(i) for i in range(len(source))] == [
                again[split].id(i) for i in range(len(again[split]))
            ]
            last = len(source) - 1
            for first, second in zip(source.read(last), again[split].read(last), strict=True):
                np.testing.assert_array_equal(first, second)

    def test_ids_are_unique_relative_names(self, sources):
        for source in sources.values():
            ids = [source.id(i) for i in range(len(source))]
            assert len(set(ids)) == len(ids)
            assert not any(i.startswith("/") or "\\" in i for i in ids)

    def test_splits_share_nothing(self, sources):
        seen: set[object] = set()
        for source in sources.values():
            items = {(source.files(i) or [source.id(i)])[0] for i in range(len(source))}
            assert not items & seen
            seen |= items

    def test_files_exist(self, sources):
        for source in sources.values():
            assert all(path.is_file() for path in source.files(0))

    def test_survives_pickling(self, sources):
        source = sources["train"]
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy.id(0) == source.id(0)
        for first, second in zip(source.read(0), copy.read(0), strict=True):
            np.testing.assert_array_equal(first, second)


class LabelledSourceContract(SourceContract):
    """Images with masks."""

    def test_gives_uint8_images_with_masks_of_their_size(self, sources):
        for source in sources.values():
            image, mask = source.read(0)
            assert image.dtype == np.uint8
            assert mask.dtype == np.uint8
            assert image.shape == (*mask.shape, 3)
            assert image.flags.c_contiguous
            assert image.max() > image.min()

    def test_masks_hold_classes_or_ignore_and_some_foreground(self, sources):
        source = sources["train"]
        seen = {int(v) for i in range(len(source)) for v in np.unique(source.read(i)[1])}
        assert seen <= {*range(len(source.classes)), IGNORE_INDEX}
        assert len(seen - {IGNORE_INDEX}) >= 2
