import multiprocessing
import os
import signal
from itertools import chain

import pytest
import torch

from segfit.data.bad_samples import explain_deaths
from segfit.data.batches import EpochSampler
from segfit.data.loader import Loader
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


def training(source, reported, workers=0, epoch=0, start_sample=0):
    sampler = EpochSampler(len(source), 4, seed=3)
    dataset = TrainDataset(source, SIZE, "crop")
    how = {"prefetch": 2, "batch_sampler": sampler}
    batches = Loader(dataset, collate, CPU, workers, reported.append, **how)
    sampler.set_epoch(epoch, start_sample=start_sample)
    return batches


def evaluation(source, reported, workers=0, batch_size=4, *, share=False):
    dataset = EvalDataset(source, SIZE, "stretch")
    how = {"share": share, "batch_size": batch_size}
    return Loader(dataset, collate, CPU, workers, reported.append, **how)


def indices(batches):
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_another_image_takes_the_place(workers):
    reported = []
    batches = training(Damaged(2, 7), reported, workers)
    found = indices(batches)
    plain = indices(training(ShapesSource(12, resolution=32), []))
    assert [len(batch) for batch in found] == [4, 4, 4]
    for seen, planned in zip(chain(*found), chain(*plain), strict=True):
        assert seen == planned or (planned in (2, 7) and seen not in (2, 7))
    assert sorted(reported) == [
        f"{index}.png: unreadable. Replace it. data.on_bad_sample=skip: another sample takes its place."
        for index in (2, 7)
    ]
    indices(batches)  # the same epoch again
    assert len(reported) == 2


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
    reported = []
    assert indices(evaluation(Damaged(1, 4, 5, 6, 7), reported, workers)) == [
        [0, 2, 3],
        [8, 9, 10, 11],
    ]
    assert len(reported) == 5
    assert reported[0] == "1.png: unreadable. Replace it. data.on_bad_sample=skip: it is left out."


@pytest.mark.parametrize("start", [training, evaluation])
def test_where_no_image_can_be_read_the_end_is_clear(start):
    with pytest.raises(
        SegFitError, match=r"on_bad_sample=skip: (12|none)[^\n]*can be read\.\n\d+\.png"
    ):
        list(start(Damaged(*range(12)), []))


def test_a_process_that_can_read_none_of_its_share_leaves_the_scores_to_the_others():
    reported = []
    assert indices(evaluation(Damaged(*range(12)), reported, share=True)) == []
    assert len(reported) == 12


def test_one_good_image_is_found_among_few():
    assert indices(training(Damaged(*range(1, 12)), [])) == [[0, 0, 0, 0]] * 3


@pytest.mark.parametrize("start", [training, evaluation])
def test_lack_of_memory_is_no_bad_image(start):
    with pytest.raises(SegFitError, match=r"train_0005: memory ran out"):
        list(start(Damaged(5, error=MemoryError), []))


def end_by(number):
    if number != signal.SIGKILL:  # whose handler nobody sets
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def ended(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process


def explained(process, read=None):
    current = torch.tensor([[process.pid, -1 if read is None else 7]])
    (problem,) = explain_deaths([process], current, lambda index: f"{read} {index}")
    return problem.replace(str(process.pid), "N")


@pytest.mark.parametrize(
    ("number", "meaning"),
    [
        (signal.SIGKILL, "Most likely memory ran out"),
        (signal.SIGBUS, "Shared memory (/dev/shm) is too small"),
        (signal.SIGSEGV, "A decoder crashed"),
        (signal.SIGTERM, "Another process sent it."),
    ],
)
def test_a_signal_is_named_with_what_it_means(number, meaning):
    problem = explained(ended(end_by, number), "a.png")
    start = f"a.png 7: the data worker (pid N) that read this was killed by {number.name}. "
    assert problem.startswith(start + meaning)


def test_an_exit_and_an_idle_worker_are_explained_too():
    assert explained(ended(os._exit, 3)) == (
        "the data worker (pid N), between two samples, ended with exit code 3. What it printed says why."
    )


def test_workers_that_live_are_not_explained():
    class Living:
        pid = 1

        def is_alive(self):
            return True

    assert explain_deaths([Living()], torch.full((1, 2), -1), str) == []


class Noting(ShapesSource):
    """Returns what is recorded while an image is read."""

    current: torch.Tensor

    def read(self, index):
        image, mask = super().read(index)
        pid, current = self.current[0].tolist()
        assert pid == os.getpid()
        mask[:] = current
        return image, mask


def test_the_main_process_sees_what_a_worker_reads_and_when_it_is_done():
    source = Noting(3, resolution=32)
    batches = Loader(
        EvalDataset(source, (32, 32), "crop"),
        collate,
        torch.device("cpu"),
        1,
        batch_size=1,
    )
    source.current = batches.current
    masks = [int(batch["mask"].unique()) for batch in batches]
    assert masks == [0, 1, 2]
    (process,) = batches._iterator._workers
    assert batches.current.tolist() == [[process.pid, -1]]
