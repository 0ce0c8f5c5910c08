"""A pass over held-out data that memory runs out in gives the scores of one that it does not."""

import pytest
import torch
from torch import nn

from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.errors import SegFitError
from tests.unit.engine.fakes import LineTask, Recorder, make_fit, points

FP32 = Precision("fp32", "cpu")


class Small(nn.Module):
    """A model for which only so many samples fit."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits = fits
        self.sizes: list[int] = []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.sum(1, keepdim=True)


def scores(model, batches, **options):
    task = LineTask()
    result = evaluate(model, task, batches, FP32, **options)
    return result.scores, task.validated[0]


BATCHES = [points(size, seed) for seed, size in enumerate((5, 5, 3))]


@pytest.mark.parametrize("fits", [1, 2, 3, 4])
def test_batches_go_on_in_pieces_that_fit(fits):
    lowered = []
    expected = scores(Small(9), BATCHES)
    model = Small(fits)
    found = scores(model, BATCHES, lowered=lambda size, line: lowered.append((size, line)))
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    size, line = lowered[-1]
    assert size <= fits
    assert "out of memory in validation with 5 samples at once" in line
    # Later batches start with what went well.
    assert model.sizes.count(5) == 1
    assert len(lowered) == 1


def test_a_size_that_was_found_before_is_kept():
    model = Small(2)
    scores(model, BATCHES, largest=2, lowered=lambda *_: pytest.fail("it fits"))
    assert max(model.sizes) == 2


def test_a_single_sample_that_does_not_fit_names_what_to_do():
    model = Small(0).train()
    with pytest.raises(SegFitError, match=r"validation with a single sample.*Buy more memory"):
        scores(model, BATCHES)
    assert model.training


def test_other_errors_are_not_swallowed():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        scores(Broken(), BATCHES)


def test_the_loop_keeps_the_size_in_its_checkpoint(tmp_path):
    def refuse(module, inputs):
        if not module.training and len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    fit, heard = make_fit(tmp_path), Recorder()
    fit.state.model.register_forward_pre_hook(refuse)
    fit.run(heard, {})
    assert fit.state.progress.held_out_batch == 2
    assert fit.state.progress.micro_batch == 0  # training fits as it was
    assert sum("out of memory in validation" in text for text in heard.notices) == 1
    content, _ = fit.checkpoints.load_last()
    assert content["progress"]["held_out_batch"] == 2
