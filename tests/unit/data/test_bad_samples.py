from itertools import chain

import pytest
import torch

from segfit.data.bad_samples import Skipping
from segfit.data.loader import Loader, LoaderOptions
from segfit.data.sampler import EpochSampler
from segfit.data.shapes import ShapesSource
from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.dataset import EvalDataset, TrainDataset, collate

CPU = torch.device("cpu")
SIZE = 16, 16


class Damaged(ShapesSource):
    def __init__(self, *bad, count=12, error=SegFitError):
        super().__init__(count, resolution=32)
        self.bad, self.error = bad, error

    def read(self, index):
        if index in self.bad:
            raise self.error(f"{index}.png: unreadable. Replace it.")
        return super().read(index)


def training(source, told, workers=0, epoch=0, start_sample=0):
    sampler = EpochSampler(len(source), 4, seed=3)
    dataset = TrainDataset(source, SIZE, "crop")
    options = LoaderOptions(workers, prefetch=2)
    batches = Loader(dataset, collate, CPU, options, Skipping(told.append), batch_sampler=sampler)
    sampler.set_epoch(epoch, start_sample=start_sample)
    return batches


def evaluation(source, told, workers=0, batch_size=4, *, share=False):
    dataset = EvalDataset(source, SIZE, "stretch")
    skipping = Skipping(told.append, share=share)
    return Loader(dataset, collate, CPU, LoaderOptions(workers), skipping, batch_size=batch_size)


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_another_image_takes_the_place(workers):
    told = []
    batches = training(Damaged(2, 7), told, workers)
    found = indices(batches)
    plain = indices(training(ShapesSource(12, resolution=32), []))
    assert [len(batch) for batch in found] == [4, 4, 4]
    for seen, planned in zip(chain(*found), chain(*plain), strict=True):
        assert seen == planned or (planned in (2, 7) and seen not in (2, 7))
    assert sorted(told) == [
        f"{index}.png: unreadable. Replace it. data.on_bad_sample=skip: another sample takes its place."
        for index in (2, 7)
    ]
    indices(batches)  # the same epoch again
    assert len(told) == 2


def test_the_place_is_taken_by_index_and_seed_alone():
    source = Damaged(*range(0, 12, 2))
    whole = list(training(source, []))
    rest = list(training(source, [], workers=1, start_sample=4))
    for one, other in zip(whole[1:], rest, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert indices(whole) != indices(training(source, [], epoch=1))
    assert indices(whole) != indices(training(Damaged(*range(0, 12, 3)), []))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_evaluation_it_counts_nowhere(workers):
    told = []
    assert indices(evaluation(Damaged(1, 4, 5, 6, 7), told, workers)) == [[0, 2, 3], [8, 9, 10, 11]]
    assert len(told) == 5
    assert told[0] == "1.png: unreadable. Replace it. data.on_bad_sample=skip: it is left out."


@pytest.mark.parametrize("start", [training, evaluation])
def test_where_no_image_can_be_read_the_end_is_clear(start):
    with pytest.raises(
        SegFitError, match=r"on_bad_sample=skip: (12|none)[^\n]*can be read\.\n\d+\.png"
    ):
        list(start(Damaged(*range(12)), []))


def test_a_process_that_can_read_none_of_its_share_leaves_the_scores_to_the_others():
    told = []
    assert indices(evaluation(Damaged(*range(12)), told, share=True)) == []
    assert len(told) == 12


def test_one_good_image_is_found_among_few():
    assert indices(training(Damaged(*range(1, 12)), [])) == [[0, 0, 0, 0]] * 3


@pytest.mark.parametrize("start", [training, evaluation])
def test_lack_of_memory_is_no_bad_image(start):
    with pytest.raises(SegFitError, match=r"train_0005: memory ran out"):
        list(start(Damaged(5, error=MemoryError), []))
