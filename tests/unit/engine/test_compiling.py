"""What does not compile runs eager, a notice gives the reason, and the trial leaves no trace."""

import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from segfit.assembly.training import make_training
from segfit.engine.compiling import compiled_or_eager, give_up_compiling, is_compile_error
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.tuning.measure import windows
from tests.unit.composing import composed
from tests.unit.engine.fakes import LineTask, Points, Recorder, make_fit, weights

FP32 = Precision("fp32", "cpu")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_failure_falls_back_with_its_reason_and_without_a_trace(model, monkeypatch):
    def fails_after_a_pass(module, mode):
        def forward(images):
            module(images)  # moves the statistics of batch norm and the random numbers
            raise RuntimeError("no C++ compiler found\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", fails_after_a_pass)
    example = torch.randn(2, 3, 8, 8)
    before, random = snapshot(model), torch.get_rng_state()
    forward, reason = compiled_or_eager(model, example, FP32)
    assert forward is model
    assert reason is not None
    assert "running eager (no C++ compiler found)" in reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_success_restores_buffers_gradients_and_random_numbers(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, mode: lambda images: module(images))
    example = torch.randn(2, 3, 8, 8)
    before, random = snapshot(model), torch.get_rng_state()
    forward, reason = compiled_or_eager(model, example, FP32)
    assert reason is None
    assert forward is not model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_where_memory_runs_out_it_stays_compiled(model, monkeypatch):
    def compiled(module, mode):
        def forward(images):
            module(images)
            raise RuntimeError("the compiler") from torch.OutOfMemoryError("CUDA out of memory.")

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    before = snapshot(model)
    forward, reason = compiled_or_eager(model, torch.randn(8, 3, 8, 8), FP32)
    assert forward is not model
    assert reason is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


IMAGES = torch.zeros(2, 3, 8, 8)


def test_cuda_graphs_are_recorded_and_replayed_in_the_trial(model, monkeypatch):
    """A first pass warms up, a second records; gradients of one are gone when the next begins."""
    modes, passes = [], []

    def compiled(module, mode):
        modes.append(mode)

        def forward(images):
            passes.append(all(parameter.grad is None for parameter in module.parameters()))
            return module(images)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    compiled_or_eager(model, torch.randn(2, 3, 8, 8), FP32, mode="reduce-overhead")
    assert modes == ["reduce-overhead"]
    assert passes == [True] * 3


def test_cuda_graphs_are_off_once_an_update_takes_several_passes(tmp_path, monkeypatch):
    """They overwrite the gradients of all passes but the last: pytorch issue 169545."""
    whole, fit = (make_fit(tmp_path / name, train=Points(size=4)) for name in ("whole", "tight"))
    whole.run(Recorder(), {})
    passes, heard = [], Recorder()

    def replaying(inputs):
        passes.append(len(inputs))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fit.state.model(inputs)

    monkeypatch.setattr(torch, "compile", lambda module: module)
    fit.state.forward, fit.state.graphs = replaying, True
    fit.run(heard, {})
    assert passes == [4, 4, 4]
    assert not fit.state.graphs
    (off,) = [text for text in heard.notices if text.startswith("compile_mode=reduce-overhead")]
    assert "takes several passes" in off
    torch.testing.assert_close(weights(fit.state.model), weights(whole.state.model))

    again = make_fit(tmp_path / "again", train=Points(size=4))  # what fits is known from before
    again.state.forward, again.state.graphs = replaying, True
    again.state.progress.micro_batch = 2
    again.run(Recorder(), {})
    assert passes == [4, 4, 4]


class Counting:
    """A backend that runs what it is given, until it fails."""

    def __init__(self, good: int, error: Exception) -> None:
        self.good = good
        self.error = error

    def __call__(self, graph, inputs):
        if self.good == 0:
            raise self.error
        self.good -= 1
        return graph.forward


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def late_failure(model: nn.Module, error: Exception) -> BaseException:
    """What the first pass in eval mode raises, after training has compiled."""
    forward = torch.compile(model, backend=Counting(1, error))
    forward(IMAGES).sum().backward()
    model.eval()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        forward(IMAGES)
    return caught.value


def test_a_recompilation_that_fails(model, fresh):
    error = late_failure(model, RuntimeError("no such instruction"))
    assert is_compile_error(error)
    assert give_up_compiling(error).endswith("running eager (no such instruction).")


def test_a_backward_that_is_compiled_late(model, fresh):
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph.forward,
        bw_compiler=Counting(0, RuntimeError("no such instruction")),
    )
    loss = torch.compile(model, backend=backend, dynamic=True)(IMAGES).sum()
    with pytest.raises(RuntimeError, match="no such instruction") as caught:
        loss.backward()
    assert type(caught.value) is RuntimeError  # not wrapped in an error of the compiler
    assert is_compile_error(caught.value)


class Transposing(LineTask):
    """Gives inputs of another layout from the sixth update on, for which a forward is compiled anew."""

    def prepare(self, batch, seed):
        inputs, targets = super().prepare(batch, seed)
        return inputs if len(self.seeds) < 6 else inputs.t().contiguous().t(), targets


def test_a_training_whose_compiled_model_fails_later_goes_on_and_says_so_once(tmp_path, fresh):
    whole, fit = (make_fit(tmp_path / name, task=Transposing()) for name in ("whole", "late"))
    expected, heard = Recorder(), Recorder()
    whole.run(expected, {})
    backend = Counting(1, RuntimeError("no such instruction"))
    fit.state.forward = torch.compile(fit.state.model, backend=backend)
    fit.run(heard, {})
    assert backend.good == 0
    (notice,) = heard.notices
    assert "torch.compile failed" in notice
    assert "eager" in notice
    assert "no such instruction" in notice
    assert fit.state.forward is fit.state.model
    assert heard.losses == pytest.approx(expected.losses)
    torch.testing.assert_close(weights(fit.state.model), weights(whole.state.model))


def test_memory_that_runs_out_while_compiling_is_no_failure_to_compile(model, fresh):
    assert not is_compile_error(late_failure(model, torch.OutOfMemoryError("CUDA out of memory.")))


def test_what_fails_while_running_is_no_failure_to_compile(model, fresh):
    def breaks(graph, inputs):
        def run(*arguments):
            raise RuntimeError("the device is lost")

        return run

    with pytest.raises(RuntimeError, match="the device is lost") as caught:
        torch.compile(model, backend=breaks)(IMAGES)
    assert not is_compile_error(caught.value)
    with pytest.raises(RuntimeError, match="channels") as caught:
        model(torch.zeros(2, 5, 8, 8))
    assert not is_compile_error(caught.value)


def test_triton_and_what_stems_from_it():
    missing = type("TritonMissing", (Exception,), {"__module__": "torch._inductor.exc"})("none")
    kernel = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})("smem")
    outer = RuntimeError("outer")
    outer.__cause__ = missing
    assert all(map(is_compile_error, (missing, kernel, outer)))
    assert not is_compile_error(outer.__class__("outer"))


COMPILE = """
import os, sys, torch
from segfit.engine.compiling import compiled_or_eager
from segfit.engine.precision import Precision
for compiler, cache in (("nowhere", "cache"), ("g++", "file")):
    os.environ["CXX"], os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiler, cache
    model = torch.nn.Conv2d(3, 4, 3)
    forward, reason = compiled_or_eager(model, torch.zeros(2, 3, 8, 8), Precision("fp32", "cpu"))
    assert forward is model
    print(reason)
"""


def test_without_what_the_compiler_needs(tmp_path: Path):
    """No C++ compiler; then a file where the folder of its results should be."""
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    no_compiler, no_folder = done.stdout.splitlines()
    for reason in (no_compiler, no_folder):
        assert "torch.compile failed, running eager" in reason
    assert "No working C++ compiler" in no_compiler
    assert "FileExistsError" in no_folder


CNN = ("model=cnn", "model.base_channels=8")
PRETRAINED = ("image_size=64", "model.weights=null")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*CNN, "image_size=64"), id="cnn"),
        pytest.param((*CNN, "task=restoration", "patch_size=64"), id="restoration"),
        pytest.param(
            ("task=restoration", "model=nafnet", "patch_size=64", "model.num_blocks=1"),
            id="nafnet",
            marks=pytest.mark.slow,
        ),
        pytest.param(("model=segformer_b0", *PRETRAINED), id="segformer"),
        pytest.param(
            ("model=segformer_b0", "model.fast=false", *PRETRAINED),
            id="stock",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("model=timm_unet", "model.encoder=test_resnet", *PRETRAINED),
            id="timm_unet",
            marks=pytest.mark.slow,
        ),
        pytest.param(("model=vit", "model.encoder=test_vit", *PRETRAINED), id="vit"),
    ],
)
def test_updates_compile_nothing_after_the_probe(options, tmp_path, monkeypatch, fresh):
    """The probe's example has the shape, strides and precision of what training passes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    sizes = ("batch_size=2", "data.train_size=8", "data.resolution=64")
    small = (*sizes, "data.val_size=2", "loader.workers=0", "compile=true", "device=cpu")
    notices = []
    fit = make_training(composed("hardware=cpu", *options, *small), tmp_path, notices.append).fit
    assert fit.state.forward is not fit.state.model, notices
    probed = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fit.state.model.train()
    for number, window in enumerate(islice(windows(fit), 2)):
        make_update(fit.state, fit.task, window, [number], None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == probed == 1
