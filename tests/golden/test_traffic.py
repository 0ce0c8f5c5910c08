"""What an update of a SegFormer launches and moves on a card, as it was: whatever adds to it has to be meant.

At 512 px, batch 8, in bf16, from the update's own operations on tensors without data. To write it anew:
python -m tests.golden.test_traffic
"""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from segfit.assembly.state import make_state
from segfit.assembly.task import assembly_of, planning_of
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.tuning.memory.pretend import without_data
from segfit.tuning.memory.recorder import MemoryRecorder
from tests.fakes.card import tensors_of
from tests.integration.training import ROOT, finished
from tests.unit.composing import composed

GOLDEN = Path(__file__).with_name("traffic.json")
WITHIN = 0.01
VARIANTS = ("b0", "b2", "b5")
OPTIONS = (
    *("hardware=cpu", "model.weights=null", "data=shapes", "image_size=512", "batch_size=8"),
    *("accumulate=1", "augmentation=none", "loss=ce"),
)
# No kernels, though torch does not call them views; and kernels that write without reading their argument.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
WRITING = {"zeros_like", "ones_like", "full_like", "zero_", "fill_", "new_zeros", "new_full"}


class Meter(MemoryRecorder):
    """Counts kernels, and the bytes that they read and write, cached ones too."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        space, _, name = func._schema.name.partition("::")
        returned = func._schema.returns
        view = any(one.alias_info and not one.alias_info.is_write for one in returned)
        read = [] if name in WRITING else tensors_of(args[1:] if name == "copy_" else args)
        written = tensors_of(result if isinstance(result, (tuple, list)) else (result,))
        written = written or (tensors_of(args[:1]) if name.startswith("_f") else [])
        if (
            space == "aten"
            and not (view or name in FREE)
            and any(one.is_cuda for one in (*read, *written))
        ):
            self.kernels += 1
            self.bytes += sum(map(size, (*read, *written)))
        return result


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded is there once."""
    shape = [side for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(shape).numel() * tensor.element_size()


def traffic(variant: str) -> dict[str, float]:
    config = composed(f"model=segformer_{variant}", *OPTIONS)
    meter = Meter()
    with without_data(meter) as (device, rules):
        state, _ = make_state(config, device, Precision("bf16", "cuda"), 1, lambda _: None)
        task = assembly_of(config).make_task(config, device)
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()  # its state is there from the second update on
        state.optimizer.zero_grad()
        state.forward = rules.cutting(state.forward)
        window = [planning_of(config).train_example(config)]
        meter.kernels, meter.bytes = 0, 0
        with mock.patch.object(type(task), "loss", rules.cutting(type(task).loss)):
            make_update(state, task, window, [0], config.clip_grad_norm)
    return {"kernels": meter.kernels, "GiB": round(meter.bytes / 2**30, 2)}


@pytest.mark.parametrize("variants", [("b0",), pytest.param(("b2", "b5"), marks=pytest.mark.slow)])
def test_an_update_launches_and_moves_no_more_than_before(variants):
    """Recorded in a process of its own: what other tests leave behind changes what is launched."""
    done = finished([sys.executable, __file__, *variants], ROOT)
    assert done.returncode == 0, done.stderr
    for variant, now in json.loads(done.stdout.splitlines()[-1]).items():
        golden = json.loads(GOLDEN.read_text())[variant]
        change = "; ".join(f"{name}: {golden[name]} → {value}" for name, value in now.items())
        assert now == pytest.approx(golden, rel=WITHIN), (
            f"an update of {variant} changed on a card ({change}). If that is meant: python -m tests.golden.test_traffic"
        )


if __name__ == "__main__":
    recorded = {variant: traffic(variant) for variant in sys.argv[1:] or VARIANTS}
    if sys.argv[1:]:
        print(json.dumps(recorded))
    else:
        GOLDEN.write_text(json.dumps(recorded, indent=2) + "\n")
