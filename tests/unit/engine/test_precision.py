"""What really runs for what was asked, on cards of every age."""

import pytest
import torch

from segfit.engine import precision
from segfit.engine.precision import Precision, convolves_in_fp16, resolve_precision, set_tf32

VOLTA, GTX_16, AMPERE, APPLE = "volta", "gtx 16", "ampere", "apple"
OLD_CPU, NEW_CPU = "old cpu", "new cpu"


@pytest.fixture
def device(request, monkeypatch) -> torch.device:
    machine = request.param
    capability = (8, 0) if machine == AMPERE else (7, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(precision, "convolves_in_fp16", lambda _: machine != GTX_16)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: machine == NEW_CPU)
    return torch.device({APPLE: "mps", OLD_CPU: "cpu", NEW_CPU: "cpu"}.get(machine, "cuda"))


@pytest.mark.parametrize(
    ("device", "requested", "runs"),
    [
        (AMPERE, "auto", "bf16"),
        (AMPERE, "bf16", "bf16"),
        (AMPERE, "fp16", "fp16"),
        (AMPERE, "fp32", "fp32"),
        (VOLTA, "auto", "fp16"),
        (VOLTA, "bf16", "fp16"),
        (VOLTA, "fp16", "fp16"),
        (VOLTA, "fp32", "fp32"),
        (APPLE, "auto", "fp32"),
        (APPLE, "fp16", "fp32"),
        (OLD_CPU, "auto", "fp32"),
        (OLD_CPU, "bf16", "fp32"),
        (OLD_CPU, "fp16", "fp32"),
        (NEW_CPU, "auto", "bf16"),
        (NEW_CPU, "fp16", "bf16"),
        (NEW_CPU, "fp32", "fp32"),
    ],
    indirect=["device"],
)
def test_what_runs_and_that_a_fall_back_is_reported(device, requested, runs):
    chosen, notice = resolve_precision(requested, device)
    assert chosen == Precision(runs, device.type)
    if requested in ("auto", runs):
        assert notice is None
    else:
        assert notice is not None
        assert f"precision={requested}" in notice
        assert f"running in {runs} instead" in notice
        assert "\n" not in notice


@pytest.mark.parametrize("device", [GTX_16], indirect=True)
@pytest.mark.parametrize("requested", ["auto", "fp16", "fp32"])
def test_where_fp16_convolutions_are_wrong_fp32_runs_with_a_line(device, requested):
    chosen, notice = resolve_precision(requested, device)
    assert chosen.name == "fp32"
    assert (notice is None) == (requested == "fp32")
    assert requested == "fp32" or "fp16 convolutions of this card give NaN" in notice


def test_one_convolution_shows_whether_fp16_works(monkeypatch):
    convolves_in_fp16.cache_clear()
    monkeypatch.setattr(precision.F, "conv2d", lambda *_, **__: torch.tensor([1.0, torch.nan]))
    assert not convolves_in_fp16(torch.device("cpu"))
    monkeypatch.undo()
    convolves_in_fp16.cache_clear()
    assert convolves_in_fp16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_and_scaler_belong_to_the_precision(name, dtype):
    chosen = Precision(name, "cpu")
    with chosen.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype
    scaler = chosen.scaler(init_scale=8.0, growth_interval=5)
    assert scaler.is_enabled() == (name == "fp16")
    assert scaler.get_scale() == (8.0 if name == "fp16" else 1.0)


def test_tf32_is_switched_for_products_and_convolutions():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            set_tf32(allowed)
            assert (torch.get_float32_matmul_precision() == "highest") is not allowed
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
