"""A fault of one process of torchrun is everybody's: none goes on alone, and none waits in vain."""

from pathlib import Path

import pytest
import torch

from segfit.engine.checkpoint import load_checkpoint
from tests.integration.test_resume import losses
from tests.integration.test_torchrun import SMALL, VICTIM, ours, parameters, torchrun
from tests.integration.training import the_run


def struck(folder: Path, fault: str, *arguments: str) -> "tuple[int, str]":
    return torchrun(folder, fault, *SMALL, *arguments, script=VICTIM)


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_both(tmp_path):
    code, output = struck(tmp_path, "memory")
    assert code == 0, output
    assert output.count("out of memory with a micro-batch of 4: continuing with 2") == 1
    run = the_run(tmp_path)
    assert load_checkpoint(run / "checkpoints/last.pt")["progress"]["micro_batch"] == 2
    assert list(losses(run)) == [1, 2, 3, 4]  # none was lost or made twice


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["first_backward", "first_step"])
def test_memory_that_runs_out_in_the_first_update_halves_the_micro_batch_of_both(tmp_path, fault):
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    calm.mkdir()
    hit.mkdir()
    code, output = struck(calm, "none", "accumulate=1", "max_steps=3")
    assert code == 0, output
    code, output = struck(hit, fault, "accumulate=1", "max_steps=3")
    assert code == 0, output
    assert output.count("out of memory with a micro-batch of 4: continuing with 2") == 1
    assert torch.allclose(parameters(the_run(hit)), parameters(the_run(calm)), atol=1e-5)


@pytest.mark.slow
def test_memory_that_runs_out_where_it_cannot_be_done_again_ends_both(tmp_path):
    code, output = struck(tmp_path, "backward", "accumulate=1")
    assert code != 0
    assert "process 1 of 2 ran out of memory in a step that all processes take together" in output
    assert "half the batch_size and twice the accumulate" in output
    assert load_checkpoint(the_run(tmp_path) / "checkpoints/last.pt")["progress"]["update"] == 2


@pytest.mark.slow
def test_a_batch_that_is_not_finite_in_one_process_is_left_out_by_both(tmp_path):
    code, output = struck(tmp_path, "nan", "report.log_every=100", "data.train_size=64", "epochs=2")
    assert code == 0, output
    run = the_run(tmp_path)
    progress = load_checkpoint(run / "checkpoints/last.pt")["progress"]
    assert len(progress["left_out"]) == 2
    assert parameters(run).isfinite().all()
    saved = sorted(path.name for path in (run / "bad_batches").iterdir())
    assert len(saved) == 4
    assert {name.rpartition("-")[2] for name in saved} == {"rank0.pt", "rank1.pt"}
    batches = torch.load(run / "bad_batches" / saved[0], weights_only=True)["batches"]
    named = output.partition("its batch (")[2].partition(")")[0]
    assert batches[0]["names"][0] in named
    assert "and 8 more" in named  # 16 images of both


@pytest.mark.slow
def test_a_bug_of_one_process_ends_both_and_shows_its_traceback_once(tmp_path):
    code, output = struck(tmp_path, "bug")
    assert code != 0
    assert "process 1 of 2 ended: ZeroDivisionError: of the test" in ours(output)
    assert output.count(", in _bug") == 1, output
    assert (
        output.count("Traceback (most recent call last)") == 2
    )  # the second one is torchrun's own
    assert "PeerFailed" not in output


@pytest.mark.slow
def test_a_sigterm_of_torchrun_does_not_keep_the_main_process_from_telling_why(tmp_path):
    code, output = struck(tmp_path, "bug_while_closing")
    assert code != 0
    assert "Error:\n  - process 1 of 2 ended: ZeroDivisionError: of the test" in output
