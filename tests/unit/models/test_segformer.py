"""Ours against transformers' own: same keys, same logits, same gradients."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segfit.models import layers
from segfit.models.segformer import VARIANTS, SegFormer, make_segformer, merge
from segfit.models.segformer_fast import drop_paths, use_fast
from segfit.tasks.segmentation.export import make_exported
from tests.contracts.model_contract import SIZES, ModelContract, images
from tests.unit.composing import composed

TINY = {
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "depths": [1, 2, 1, 1],
    "decoder_hidden_size": 24,
    "num_labels": 5,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.5,
}


# Seconds each, of the code that b0 and the tiny ones go through too.
LARGER = pytest.param("b2", marks=pytest.mark.slow)


class TestFastSegFormer(ModelContract):
    def make(self, num_classes):
        return make_segformer("b0", num_classes, weights=None, dropout=0.2)[0]


class TestStockSegFormer(ModelContract):
    def make(self, num_classes):
        return make_segformer("b0", num_classes, weights=None, fast=False, dropout=0.2)[0]


@pytest.fixture(autouse=True)
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(variant: str, **options: float) -> SegformerConfig:
    with torch.device("meta"):
        return make_segformer(variant, 7, weights=None, **options)[0].config


def stock_and_fast(config: SegformerConfig, dtype: torch.dtype):
    """transformers' own model and our fast one, with the same random weights, none of them zero."""
    torch.manual_seed(0)
    stock = SegformerForSemanticSegmentation(config).to(dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        stock.decode_head.batch_norm.running_mean.normal_()
        stock.decode_head.batch_norm.running_var.uniform_(0.5, 2)
    fast = SegFormer(config).to(dtype)
    fast.load_state_dict(stock.state_dict(), strict=True)
    use_fast(fast)
    return stock, fast


def stock_logits(model, batch):
    logits = model(batch).logits
    return F.interpolate(logits, size=batch.shape[-2:], mode="bilinear", align_corners=False)


def run(forward, model, batch):
    """Logits, and the gradients of a loss that weighs every logit differently."""
    model.zero_grad()
    torch.manual_seed(1)
    logits = forward(batch)
    torch.manual_seed(2)
    (logits * torch.randn(logits.shape).to(logits.dtype)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_parity(stock, fast, batch, tolerance):
    expected, expected_grads = run(lambda b: stock_logits(stock, b), stock, batch)
    found, found_grads = run(fast, fast, batch)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    largest = max(g.abs().max() for g in expected_grads.values())
    for name, grad in expected_grads.items():
        # against the largest of all gradients too: some are zero but for rounding (a key's bias)
        scale = grad.abs().max() + 1e-3 * largest
        assert (found_grads[name] - grad).abs().max() <= 100 * tolerance * scale, name
    for (name, buffer), other in zip(stock.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(
            other, buffer, rtol=10 * tolerance, atol=10 * tolerance, msg=name
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", SIZES)
def test_tiny_parity(size, training, dtype, tolerance):
    """With drop path on in training: one seed drops the same blocks on both paths."""
    stock, fast = stock_and_fast(SegformerConfig(**TINY), dtype)
    batch = images(*size, batch=3).to(dtype)
    assert_parity(stock.train(training), fast.train(training), batch, tolerance)


@pytest.mark.parametrize("variant", ["b0", LARGER])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_published_sizes_parity(variant, training):
    stock, fast = stock_and_fast(config_of(variant, dropout=0.0), torch.float64)
    assert_parity(stock.train(training), fast.train(training), images(33, 65).double(), 1e-13)


@pytest.mark.parametrize("variant", ["b0", LARGER])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_errors_are_of_the_size_of_transformers(variant, training, dtype):
    """Both against double precision: logits, and all gradients together."""
    config = config_of(variant, dropout=0.0, drop_path=0.0)
    stock, fast = stock_and_fast(config, torch.float64)
    stock.train(training), fast.train(training)
    batch = images(33, 65)
    exact, exact_grads = run(lambda b: stock_logits(stock, b), stock, batch.double())

    def error(model, forward):
        model.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, grads = run(forward, model, batch)
        off = sum((grads[n].double() - g).square().sum() for n, g in exact_grads.items())
        return (logits.double() - exact).norm().item(), off.sqrt().item()

    stock_error = error(stock, lambda b: stock_logits(stock, b))
    fast_error = error(fast, fast)
    assert stock_error[0] < 0.1 * exact.norm()
    assert fast_error[0] <= 2 * stock_error[0]
    assert fast_error[1] <= 2 * stock_error[1]


def test_parity_with_dropout(monkeypatch):
    """The head's masks are drawn otherwise than transformers'; given the same ones, all is equal."""
    stock, fast = stock_and_fast(SegformerConfig(**TINY), torch.float64)

    def keep_mask(like, p):
        draws = torch.rand(like.numel(), generator=torch.Generator().manual_seed(4))
        return (draws >= p).to(like.dtype)

    class MaskedDropout(torch.nn.Module):
        def forward(self, x):
            batch, channels, height, width = x.shape
            kept = keep_mask(x, 0.25).view(batch, height, width, channels)
            return x * kept.permute(0, 3, 1, 2) / 0.75

    monkeypatch.setattr(layers, "keep_mask", keep_mask)
    stock.decode_head.dropout = MaskedDropout()
    fast.decode_head.dropout.p = 0.25
    assert_parity(stock.train(), fast.train(), images(65, 97).double(), 1e-13)


def test_head_dropout_has_the_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4, 32, 64, 64).to(memory_format=torch.channels_last) + 0.5
    out, factor = layers.relu_dropout_(x.clone(), 0.3)
    dropped = (out == 0).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.003)
    assert (out * factor).mean().item() == pytest.approx(x.mean().item(), rel=0.01)
    kept = out != 0
    assert torch.equal(out[kept], x[kept])
    by_channel = (out == 0).double().mean((0, 2, 3))
    assert by_channel.max() - by_channel.min() < 0.05


def test_stock_path_is_transformers_own():
    stock, _ = stock_and_fast(SegformerConfig(**TINY), torch.float32)
    ours = SegFormer(stock.config)
    ours.load_state_dict(stock.state_dict())
    batch = images(65, 97)
    assert torch.equal(ours.eval()(batch), stock_logits(stock.eval(), batch))


@pytest.mark.parametrize("fast", [False, True])
def test_attention_is_torchs(fast):
    model, _ = make_segformer("b0", 3, weights=None, fast=fast)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fast", [False, True])
def test_checkpointing_changes_no_gradient(fast, dropout):
    options = {"weights": None, "fast": fast, "dropout": dropout, "drop_path": 0.5}
    torch.manual_seed(0)
    plain, _ = make_segformer("b0", 3, **options)
    recomputing, _ = make_segformer("b0", 3, checkpointing=True, **options)
    recomputing.load_state_dict(plain.state_dict())
    expected, expected_grads = run(plain, plain, images())
    found, found_grads = run(recomputing, recomputing, images())
    assert torch.equal(found, expected)
    assert all(torch.equal(found_grads[name], grad) for name, grad in expected_grads.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_drop_path_is_drawn_once_for_all_layers(checkpointing):
    """Seven of b0's eight layers may be left out, each with its own probability, and in either branch."""
    model, _ = make_segformer(
        "b0", 3, weights=None, dropout=0.0, drop_path=0.7, checkpointing=checkpointing
    )
    draws, factors, rand = [], [], torch.rand
    for block in (block for stage in model.segformer.stages for block in stage.blocks):
        block.register_forward_pre_hook(
            lambda _, given, named: factors.append(named["factors"]), with_kwargs=True
        )

    def drawing(size, **options):
        draws.append(tuple(size))
        return rand(size, **options)

    with mock.patch.object(torch, "rand", drawing), torch.autocast("cpu", torch.bfloat16):
        model(images(batch=3)).sum().backward()
    assert draws == [(14, 3, 1, 1)]  # none where a backward computes blocks again
    assert factors[0] == ()
    for layer, own in enumerate(factors[1:8], start=1):
        assert len(own) == 2
        kept = torch.cat(own)[torch.cat(own) > 0]
        assert kept.tolist() == pytest.approx([1 / (1 - 0.1 * layer)] * len(kept), rel=0.01)


def test_what_is_frozen_drops_no_path_and_the_rest_does():
    model, _ = make_segformer("b0", 3, weights=None, dropout=0.0, drop_path=0.7)
    model.segformer.stages[0].eval()  # as `freeze` does
    model.segformer.stages[2].blocks[0].eval()
    found = [
        len(own)
        for drawn in drop_paths(model.segformer.stages, images())
        for own in drawn["factors"]
    ]
    assert found == [0, 0, 2, 2, 0, 2, 2, 2]


def test_checkpointing_keeps_fewer_activations():
    def kept(checkpointing: bool) -> int:
        model, _ = make_segformer("b0", 3, weights=None, checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(images())
        return sum(sizes)

    assert kept(True) < 0.6 * kept(False)


@pytest.mark.parametrize("size", SIZES)
def test_merged_form_has_the_same_logits(size):
    _, fast = stock_and_fast(SegformerConfig(**TINY), torch.float64)
    merged = merge(fast)
    with torch.no_grad():
        expected = fast.eval()(images(*size).double())
        torch.testing.assert_close(merged(images(*size).double()), expected, rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in merged.parameters())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in merged.modules())


@pytest.mark.parametrize("size", SIZES)
def test_without_gradients_the_head_is_merged_on_the_fly(size):
    _, fast = stock_and_fast(SegformerConfig(**TINY), torch.float64)
    expected = fast.eval()(
        images(*size).double()
    )  # with gradients on: batch norm as a step of its own
    normed = []
    fast.decode_head.batch_norm.register_forward_hook(lambda *_: normed.append(1))
    with torch.inference_mode():
        torch.testing.assert_close(fast(images(*size).double()), expected, rtol=1e-12, atol=1e-12)
    assert not normed


@pytest.mark.parametrize("use", ["merge", "export"])
def test_weights_are_merged_and_exported_without_tf32(use):
    _, fast = stock_and_fast(SegformerConfig(**TINY), torch.float32)
    precisions = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.__matmul__, torch.Tensor.matmul):
                precisions.add(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        config = composed("model=segformer_b0", "data=shapes")
        with Watch():
            merge(fast) if use == "merge" else make_exported(config, fast)
        assert precisions == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_merging_leaves_the_model_alone():
    _, fast = stock_and_fast(SegformerConfig(**TINY), torch.float32)
    fast.train()
    before = copy.deepcopy(fast.state_dict())
    merge(fast)
    assert fast.training
    assert all(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(before[key], value) for key, value in fast.state_dict().items())


def test_saved_model_loads_in_transformers(tmp_path):
    names = ["sky", "road", "car"]
    model, _ = make_segformer("b0", 3, weights=None, class_names=names)
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    stock = SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    assert list(stock.config.id2label.values()) == names
    assert stock.config.architectures == ["SegformerForSemanticSegmentation"]
    with torch.no_grad():
        expected = model.eval()(images())
        torch.testing.assert_close(
            stock_logits(stock.eval(), images()), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("fast", [False, True])
def test_state_dict_keys_are_transformers(fast):
    model, _ = make_segformer("b0", 3, weights=None, fast=fast)
    stock = SegformerForSemanticSegmentation(model.config)
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.slow
def test_compiles_into_one_graph():
    _, fast = stock_and_fast(
        SegformerConfig(**{**TINY, "classifier_dropout_prob": 0.3}), torch.float32
    )
    compiled = torch.compile(fast.train(), backend="aot_eager", fullgraph=True)
    results = []
    for forward in (compiled, fast):
        torch.manual_seed(3)  # drop path and dropout draw the same
        logits = forward(images())
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in fast.parameters()]))
        fast.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), fast(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "millions"),
    list(zip(VARIANTS, [3.7, 13.7, 27.4, 47.2, 64.0, 84.6], strict=True)),
)
def test_parameters_are_those_of_the_paper(variant, millions):
    with torch.device("meta"):
        model, _ = make_segformer(variant, 19, weights=None)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.15)


def test_dropout_and_drop_path_reach_the_config():
    model, _ = make_segformer("b0", 3, weights=None, dropout=0.3, drop_path=0.4)
    assert model.decode_head.dropout.p == 0.3
    assert model.segformer.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
