"""What CUDA does by products, and linear layers by oneDNN, is what torch's kernels do; the device alone decides which runs."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import SegformerConfig

from segfit.assembly.task import assembly_of, planning_of
from segfit.models import layers
from segfit.models.cnn import CNN
from segfit.models.layers import (
    FastLinear,
    by_products,
    linear,
    resize_and_sum,
    shrink_by_products,
    sum_by_products,
)
from segfit.models.restorers import NAFNet, ResidualUNet
from segfit.models.segformer import SegFormer
from segfit.models.segformer_fast import use_fast
from segfit.models.timm_unet import TimmUnet
from segfit.tuning.memory.pretend import without_data
from segfit.tuning.memory.recorder import MemoryRecorder
from tests.unit.composing import composed
from tests.unit.models.test_segformer import TINY

LAYOUTS = [torch.contiguous_format, torch.channels_last]
REFERENCES = {
    "bilinear": lambda x, size: F.interpolate(x, size=size, mode="bilinear"),
    "bicubic": lambda x, size: F.interpolate(x, size=size, mode="bicubic", antialias=True),
    "average": F.adaptive_avg_pool2d,
}


def pair(function, reference, inputs):
    """Results and gradients of both, for inputs in fp64."""
    found = []
    for one in (function, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = one(leaves)
        weigh = torch.randn(
            out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        found.append([out, *torch.autograd.grad(out, leaves, weigh)])
    return zip(*found, strict=True)


def some_map(*shape, layout=torch.channels_last):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[2]))
    return x.to(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize(
    ("source", "size"),
    [((4, 4), (8, 8)), ((3, 5), (17, 29)), ((1, 1), (9, 4)), ((13, 7), (3, 6)), ((6, 6), (6, 6))],
)
def test_products_are_exact(source, size, kind, layout):
    x = some_map(2, 3, *source, layout=layout)
    for found, expected in pair(
        lambda leaves: by_products(leaves[0], size, kind),
        lambda leaves: REFERENCES[kind](leaves[0], size),
        [x],
    ):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert by_products(x, size, kind).is_contiguous(memory_format=layout)


def test_the_sum_of_stages_is_exact():
    maps = [some_map(2, 3, *size) for size in ((17, 25), (9, 13), (5, 7), (3, 4))]
    for found, expected in pair(sum_by_products, resize_and_sum, maps):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    leaves = [one.clone().requires_grad_() for one in maps]
    weigh = some_map(2, 3, 17, 25)
    grads = torch.autograd.grad(resize_and_sum(leaves), leaves[1:], weigh)
    shrunk = shrink_by_products(weigh.permute(0, 2, 3, 1), [one.shape[2:] for one in maps[1:]])
    for found, expected in zip(shrunk, grads, strict=True):
        torch.testing.assert_close(found.permute(0, 3, 1, 2), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_half_precision_costs_a_rounding_or_two(scale):
    """Atomics in bf16 would be off by 3 % at 8 times the size."""
    x = some_map(2, 16, 8, 8)
    reference = pair(
        lambda leaves: by_products(
            leaves[0].bfloat16(), (8 * scale, 8 * scale), "bilinear"
        ).double(),
        lambda leaves: REFERENCES["bilinear"](leaves[0], (8 * scale, 8 * scale)),
        [x],
    )
    for found, expected in reference:
        assert (found - expected).norm() < 0.005 * expected.norm()


def test_weights_of_a_validation_serve_training():
    x = torch.randn(1, 2, 5, 5)
    with torch.inference_mode():
        by_products(x, (11, 11), "bilinear")
    by_products(x.requires_grad_(), (11, 11), "bilinear").sum().backward()
    assert x.grad.sum() == pytest.approx(2 * 121)


@pytest.mark.parametrize(
    ("device", "compiling", "exporting", "products"),
    [
        ("cuda", False, False, True),
        ("cpu", False, False, False),
        ("cpu", True, False, True),
        ("cpu", True, True, False),
        ("mps", True, False, False),
    ],
)
def test_maps_are_resized_by_products_on_cuda_and_in_code_for_a_cpu(
    monkeypatch, device, compiling, exporting, products
):
    """Not on Apple's GPUs, which lack the float64 that the weights are made in."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    monkeypatch.setattr(layers, "by_products", lambda *_: "products")
    monkeypatch.setattr(F, "interpolate", lambda *_, **__: "interpolation")
    found = layers.resize(SimpleNamespace(device=torch.device(device)), (4, 4))
    assert found == ("products" if products else "interpolation")


def test_products_compile_into_one_graph():
    maps = [some_map(2, 3, *size).float() for size in ((8, 12), (4, 6), (2, 3), (1, 2))]

    def work(maps):
        full = by_products(sum_by_products(maps), (9, 20), "bilinear")
        return by_products(full.contiguous(), (2, 2), "average")

    compiled = torch.compile(work, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(maps), work(maps))


def fast_segformer():
    model = SegFormer(SegformerConfig(**TINY))
    use_fast(model)
    return model


class Kernels(MemoryRecorder):
    """Notes the names of all operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


MAKERS = {
    "segformer": fast_segformer,
    "cnn": lambda: CNN(5, 8),
    "timm_unet": lambda: TimmUnet("resnet10t", 5, weights=None),
    "vit": lambda: TimmUnet("test_vit2", 5, weights=None),
    "restoring": lambda: ResidualUNet(3, 8, 1),
    "nafnet": lambda: NAFNet(3, 8, 1),
}
# of torch's list (`torch.use_deterministic_algorithms`), by what their names hold
NOT_DETERMINISTIC = re.compile(
    "upsample_(bi|tri)?(linear|cubic)|adaptive|re(flection|plication)_pad.*backward|scatter|index_add"
    "|index_put|grid_sampler|nll_loss2d|embedding.*backward|max_pool3d|unpool|cumsum|put_|median|histc"
    "|attention_backward"  # while torch only warns of the others
)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_card_runs_no_kernel_that_is_not_deterministic(make):
    """On tensors without data that claim to be on one; in half precision, logits are, too."""
    recorder = Kernels("cuda")
    recorder.names = set()
    with without_data(recorder) as (device, _):
        model = make().to(device).to(memory_format=torch.channels_last).train()
        images = torch.randn(2, 3, 70, 90, device=device).to(memory_format=torch.channels_last)
        recorder.names.clear()
        for training in (False, True):
            with torch.inference_mode(not training), torch.autocast("cuda", torch.bfloat16):
                found = model.train(training)(images)
            full = isinstance(model, ResidualUNet)  # which adds to the pictures
            assert found.dtype == (torch.float32 if full else torch.bfloat16)
        found.sum().backward()
    assert "convolution_backward" in recorder.names
    assert not [name for name in recorder.names if NOT_DETERMINISTIC.search(name)]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "options", [("linear",), ("linear", "model.kind=dlinear"), ("lstm",), ("transformer",)]
)
def test_nor_does_a_forecaster_with_its_loss(options):
    """As far as tensors without data show it: what happens inside of cuDNN's LSTM they do not."""
    config = composed(
        "task=forecasting", "hardware=cpu", "data=waves", f"model={options[0]}", *options[1:]
    )
    recorder = Kernels("cuda")
    recorder.names = set()
    with without_data(recorder) as (device, rules):
        model = assembly_of(config).make_network(config, pretrained=False)[0].to(device).train()
        task = assembly_of(config).make_task(config, device)
        inputs, targets = task.prepare(planning_of(config).train_example(config), 0)
        with torch.autocast("cuda", torch.bfloat16):
            found = rules.cut(model(inputs))
        task.loss(found, targets, task.totals(targets)).backward()
    assert "mm" in recorder.names
    assert not [name for name in recorder.names if NOT_DETERMINISTIC.search(name)]


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    monkeypatch.setattr(layers, "onednn_multiplies_faster", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [40, 16])
@pytest.mark.parametrize("shape", [(2, 37, 24), (2, 5, 7, 24), (1, 1, 24), (2, 2500, 24)])
def test_values_and_gradients_are_those_of_f_linear(shape, width, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    layer = FastLinear(24, width)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], width)
    results = []
    for forward in (layer, lambda t: F.linear(t, layer.weight, layer.bias)):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, atol=2e-4, rtol=1e-4)  # sums of 5,000 numbers
        assert ours.shape == torchs.shape


@pytest.mark.usefixtures("library")
def test_slices_expanded_gradients_and_frozen_weights():
    whole, x = torch.randn(8, 48), torch.randn(3, 7, 16).transpose(0, 1).requires_grad_()
    weight = whole[:, 16:32]
    y = linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight))
    (ours,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ours, weight.sum(0).expand_as(x))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = torch.randn(2, 9, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("library")
def test_autocast_decides_the_dtype():
    x, weight = torch.randn(2, 9, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
