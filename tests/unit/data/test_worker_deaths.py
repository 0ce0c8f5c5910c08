import multiprocessing
import os
import signal

import pytest
import torch

from segfit.data.bad_samples import CurrentSamples, explain_dead_workers
from segfit.data.loader import Loader, LoaderOptions
from segfit.data.shapes import ShapesSource
from segfit.tasks.segmentation.data.dataset import EvalDataset, collate


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
    class Noted(CurrentSamples):
        def index_of(self, worker, pid):
            return None if read is None else 7

    (problem,) = explain_dead_workers([process], Noted(1), lambda index: f"{read} {index}")
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

    assert explain_dead_workers([Living()], CurrentSamples(1), str) == []


class Noting(ShapesSource):
    """Returns what is recorded while an image is read."""

    current: CurrentSamples

    def read(self, index):
        image, mask = super().read(index)
        mask[:] = self.current.index_of(0, os.getpid())
        return image, mask


def test_the_main_process_sees_what_a_worker_reads_and_when_it_is_done():
    source = Noting(3, resolution=32)
    batches = Loader(
        EvalDataset(source, (32, 32), "crop"),
        collate,
        torch.device("cpu"),
        LoaderOptions(1),
        batch_size=1,
    )
    source.current = batches.current
    masks = [int(batch["mask"].unique()) for batch in batches]
    assert masks == [0, 1, 2]
    (process,) = batches._iterator._workers
    assert batches.current.index_of(0, process.pid) is None
    assert batches.current.index_of(0, process.pid + 1) is None
