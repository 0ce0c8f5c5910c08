import contextlib
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from segfit.data.batches import DevicePrefetcher, EpochSampler
from segfit.data.loader import Loader, init_worker
from segfit.data.shapes import ShapesSource
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import EvalDataset, TrainDataset, collate
from tests.unit.data.files import names, write_pairs
from tests.unit.tasks.segmentation.data.folders import folder_sources

CPU = torch.device("cpu")
SOURCE = ShapesSource(10, resolution=32)


def jitter(image, mask, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return image ^ torch.randint(0, 255, image.shape, generator=generator, dtype=torch.uint8), mask


def loader(workers, sampler, dataset=None, **options):
    dataset = dataset or TrainDataset(SOURCE, (16, 16), "crop", jitter)
    return Loader(dataset, collate, CPU, workers, prefetch=2, batch_sampler=sampler, **options)


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def epochs():
    """Return two epochs of batches, made in this process."""
    sampler = EpochSampler(len(SOURCE), 3, seed=5)
    found = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found.append(list(loader(0, sampler)))
    return found


def test_batches_are_uint8_and_random_by_epoch(epochs):
    assert [len(epoch) for epoch in epochs] == [3, 3]
    batch = epochs[0][0]
    assert batch["image"].shape == (3, 3, 16, 16)
    assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
    assert not same(*epochs)


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_change_nothing(epochs, persistent):
    sampler = EpochSampler(len(SOURCE), 3, seed=5)
    batches = loader(2, sampler, persistent=persistent)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert same(list(batches), epochs[epoch])


def test_an_epoch_can_be_left_and_resumed_with_persistent_workers(epochs):
    sampler = EpochSampler(len(SOURCE), 3, seed=5)
    batches = loader(1, sampler)
    assert same([next(iter(batches))], epochs[0][:1])
    sampler.set_epoch(1, start_sample=3)
    assert same(list(batches), epochs[1][1:])
    sampler.batch_size = 1
    sampler.set_epoch(0, start_sample=3)
    images = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(images[:6], torch.cat([batch["image"] for batch in epochs[0][1:]]))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_no_global_random_number(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(workers, EpochSampler(len(SOURCE), 3, seed=5), persistent=False))
    list(Loader(EvalDataset(SOURCE, (16, 16), "pad"), collate, CPU, workers, batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_sees_every_image_once_in_order():
    batches = Loader(EvalDataset(SOURCE, (16, 16), "stretch"), collate, CPU, batch_size=4)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_is_named_without_a_traceback(tmp_path, workers):
    write_pairs(tmp_path, names(4))
    source = folder_sources(tmp_path, classes=Classes(("a", "b", "c")))["train"]
    path = source.files(0)[0]
    path.write_bytes(b"damaged")
    with pytest.raises(SegFitError) as error:
        list(
            Loader(
                EvalDataset(source, (8, 8), "pad"),
                collate,
                CPU,
                workers,
                batch_size=2,
            )
        )
    assert error.value.problems == [
        f"{path}: unreadable (not an image). Replace the file or delete it."
    ]


class Broken(ShapesSource):
    def __init__(self, error, *size, **options):
        super().__init__(*size, **options)
        self.error = error

    def read(self, index):
        raise self.error


ERRORS = [SegFitError("broken"), KeyError("gone"), RuntimeError("no"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("persistent", [True, False])
def test_workers_end_with_the_error(error, persistent):
    others = multiprocessing.active_children()
    gc.disable()  # which ends them too, but seconds later
    try:
        dataset = EvalDataset(Broken(error, 40, resolution=32), (8, 8), "pad")
        batches = Loader(dataset, collate, CPU, 1, persistent=persistent, batch_size=2)
        with contextlib.suppress(SegFitError):
            list(batches)
        assert [child for child in multiprocessing.active_children() if child not in others] == []
    finally:
        gc.enable()


def broken_augmentation(image, mask, *, seed):
    raise ZeroDivisionError("no\nway")


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_goes_wrong_is_one_message_with_the_images_name(workers):
    def problems(dataset):
        batches = Loader(dataset, collate, CPU, workers, sampler=[(0, 1)], batch_size=1)
        with pytest.raises(SegFitError) as error:
            list(batches)
        return error.value.problems

    (read,) = problems(TrainDataset(Broken(KeyError("gone"), 10), (8, 8), "pad"))
    assert read.startswith("train_0000: no sample can be made of this: KeyError: 'gone' (")
    (memory,) = problems(TrainDataset(Broken(MemoryError(), 10), (8, 8), "pad"))
    assert memory.startswith("train_0000: memory ran out while this was read.")
    (augmented,) = problems(TrainDataset(SOURCE, (8, 8), "pad", broken_augmentation))
    assert augmented.startswith(
        "train_0000: no sample can be made of this: ZeroDivisionError: no way (test_loader.py:"
    )


class Killed(ShapesSource):
    def read(self, index):
        if multiprocessing.parent_process() is not None and index == 2:
            time.sleep(0.2)  # the batch before is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_killed_worker_is_explained_and_disturbs_nothing_before_its_batch_is_due(monkeypatch):
    # torch looks after its workers every 5 s
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))
    dataset = EvalDataset(Killed(4, resolution=32), (8, 8), "pad")
    batches = iter(Loader(dataset, collate, CPU, 1, batch_size=2))
    handler = signal.getsignal(signal.SIGCHLD)
    next(batches)
    for _ in range(50):  # the main process is at work when the worker dies
        time.sleep(0.01)
    with pytest.raises(SegFitError) as error:
        next(batches)
    (problem,) = error.value.problems
    assert re.fullmatch(
        r"train_0002: the data worker \(pid \d+\) that read this was killed by SIGKILL\. Most likely memory ran "
        r"out.*loader\.workers.*",
        problem,
    )
    assert signal.getsignal(signal.SIGCHLD) is handler


class Signalled(ShapesSource):
    """Sends its worker what Ctrl-C and Slurm send to every process."""

    def read(self, index):
        assert multiprocessing.parent_process() is not None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().read(index)


def test_workers_survive_the_signals_that_the_main_process_handles():
    dataset = EvalDataset(Signalled(4, resolution=32), (8, 8), "pad")
    assert len(list(Loader(dataset, collate, CPU, 1, batch_size=2))) == 2


def signalled_at_birth(worker):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    init_worker(worker)


def test_workers_survive_them_from_the_moment_they_are_born():
    """torch's own handler, in force until `init_worker`, would end the worker and the training with it."""
    batches = Loader(EvalDataset(SOURCE, (8, 8), "pad"), collate, CPU, 1, batch_size=4)
    batches.worker_init_fn = signalled_at_birth
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert sum(len(batch["image"]) for batch in batches) == len(SOURCE)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before


class Resetting:
    """Stands for torch's queue where the worker at its other end was killed in the midst of a batch."""

    def __init__(self, error: Exception, worker) -> None:
        self.error, self.worker = error, worker

    def get(self, timeout=None):
        os.kill(self.worker.pid, signal.SIGKILL)
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()], ids=repr)
def test_a_worker_killed_while_it_hands_a_batch_over_is_explained(error):
    batches = Loader(EvalDataset(SOURCE, (8, 8), "pad"), collate, CPU, 1, prefetch=2, batch_size=1)
    iterator = iter(batches)
    next(iterator)
    made = batches._iterator
    made._data_queue = Resetting(error, made._workers[0])
    with pytest.raises(SegFitError, match=r"the data worker \(pid \d+\).*was killed by SIGKILL"):
        list(iterator)


class Priority(ShapesSource):
    def read(self, index):
        image, mask = super().read(index)
        return image, np.full_like(mask, os.nice(0))


@pytest.mark.skipif(not hasattr(os, "nice"), reason="no priorities here")
def test_workers_leave_the_cores_to_the_model_and_to_launching():
    dataset = EvalDataset(Priority(2, resolution=32), (8, 8), "pad")
    (batch,) = Loader(dataset, collate, CPU, 1, batch_size=2)
    assert batch["mask"].unique().tolist() == [min(19, os.nice(0) + 10)]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_what_goes_to_cuda_is_page_locked(device, pinned):
    dataset = EvalDataset(SOURCE, (8, 8), "pad")
    batches = Loader(dataset, collate, torch.device(device), batch_size=2, pin_memory=True)
    assert batches.pin_memory == pinned


def test_everything_can_be_sent_to_a_spawned_worker(epochs):
    sampler = EpochSampler(len(SOURCE), 3, seed=5)
    batches = loader(1, sampler)
    batches.multiprocessing_context = "spawn"
    assert same(list(batches), epochs[0])


def test_the_prefetcher_passes_batches_through(epochs):
    prefetcher = DevicePrefetcher(epochs[0], CPU)
    assert same(list(prefetcher), epochs[0])
    assert same(list(prefetcher), epochs[0])


def test_an_abandoned_prefetcher_can_be_started_again():
    sampler = EpochSampler(len(SOURCE), 3, seed=5)
    prefetcher = DevicePrefetcher(loader(1, sampler), CPU)
    first = next(iter(prefetcher))
    assert same([first], [next(iter(prefetcher))])


def test_shared_data_folder_is_read_if_it_is_there():
    root = Path(__file__).parents[3] / "../shared/data/camvid"
    if not root.is_dir():
        pytest.skip("../shared/data/camvid is missing")
    classes = Classes(tuple(f"class_{i}" for i in range(11)))
    sources = folder_sources(root, classes=classes, ignore_index=11)
    assert {split: len(source) for split, source in sources.items()} == {"train": 367, "val": 101}
    sample = EvalDataset(sources["val"], (96, 128), "stretch")[0]
    assert sample["mask"].shape == (360, 480)
    assert set(sample["mask"].unique().tolist()) <= {*range(11), 255}


def test_the_thread_that_hands_batches_over_says_nothing_when_the_main_process_is_killed():
    """What a worker of its own thinks of errors is only seen in a process of its own."""
    program = (
        "import sys\nfrom segfit.data.loader import init_worker\n"
        "init_worker(0)\n"
        "for error in (ConnectionResetError('gone'), EOFError(), ValueError('a bug')):\n"
        "    sys.excepthook(type(error), error, None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stderr.splitlines() == ["ValueError: a bug"]
