"""What an LSTM takes, without data: on a CPU as torch records it, on a card as was published."""

import pytest
import torch
from torch import nn

from segfit.tuning.measure import recorded_peak
from segfit.tuning.memory.pretend import without_data
from segfit.tuning.memory.recorder import MemoryRecorder

SHAPE = (64, 40, 7)  # (B, T, columns)


def update(device_type, precision, shape=SHAPE, units=64, layers=2, **options):
    """Train an LSTM for a step; return its gradients."""
    model = nn.LSTM(shape[2], units, layers, **{"batch_first": True, "dropout": 0.1, **options})
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    series = torch.zeros(shape)
    with torch.autocast(device_type, dtype, enabled=dtype is not None):
        outputs = model(series)[0]
        last = outputs[:, -1]
    loss = last.float().square().mean()
    del outputs, last
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def predicted(device_type, precision, **options):
    recorder = MemoryRecorder(device_type)
    with without_data(recorder):
        gradients = update(device_type, precision, **options)
        assert all(gradient is not None for gradient in gradients)
        del gradients
    living = recorder.living().sum(1)
    assert living[-1] == 0
    return living.max(), recorder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_on_a_cpu_it_is_what_torch_records(precision, batch_first):
    with recorded_peak(torch.device("cpu")) as peak:
        update("cpu", precision, batch_first=batch_first)
    assert predicted("cpu", precision, batch_first=batch_first)[0] == pytest.approx(
        peak.bytes, rel=0.03
    )


@pytest.mark.parametrize(
    ("precision", "shape", "units", "layers", "published"),
    [("fp32", (25, 1000, 123), 320, 4, 736_000_000), ("fp16", (64, 50, 256), 768, 1, 24_576_016)],
)
def test_on_a_card_cudnn_keeps_what_was_published(precision, shape, units, layers, published):
    options = {"shape": shape, "units": units, "layers": layers, "dropout": 0.0}
    _, recorder = predicted("cuda", precision, **options)
    assert any(abs(size - published) < 512 for size in recorder.sizes.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_card_it_grows_with_the_batch_and_takes_less_in_half_precision(precision):
    small, large = (predicted("cuda", precision, shape=(batch, 40, 7))[0] for batch in (64, 128))
    kept = 2 * 40 * 64 * 64 * 11 / 2 * (2 if precision == "bf16" else 4)
    assert kept < small < 1.6 * kept
    assert large == pytest.approx(2 * small, rel=0.1)
