"""One pass over held-out data."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from segfit.engine.events import EvalResult
from segfit.engine.precision import Precision
from segfit.engine.task import Batch, Task


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    precision: Precision,
    between: Callable[[int], None] | None = None,
) -> EvalResult:
    """Return the scores of `model`; its mode is restored.

    Args:
        model: on the device of the batches.
        task: makes the meter.
        batches: held-out batches on the device.
        precision: of forward passes.
        between: called after each batch with the number done; may raise to end the pass.
    """
    start = time.perf_counter()
    training = model.training
    model.eval()
    meter = task.meter()

    def forward(inputs: Tensor) -> Tensor:
        with precision.autocast():
            outputs: Tensor = model(inputs)
        return outputs.float()  # scores are counted in fp32 whatever the pass ran in

    try:
        with torch.inference_mode():
            for done, batch in enumerate(batches, start=1):
                meter.update(forward, batch)
                if between is not None:
                    between(done)
            result = meter.result()  # synchronises: the scores are read from the device
    finally:
        model.train(training)
    return replace(result, seconds=time.perf_counter() - start)
