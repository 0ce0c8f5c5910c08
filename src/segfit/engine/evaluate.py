"""One pass over held-out data."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from segfit.engine.findings import Findings
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.precision import Precision
from segfit.engine.task import Batch, Forward, Meter, Task, count_samples, device_of
from segfit.errors import SegFitError


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    precision: Precision,
    between: Callable[[int], None] | None = None,
    *,
    largest: int = 0,
    lowered: Callable[[int, str], None] | None = None,
) -> Findings:
    """Return the scores of `model`; its mode is restored.

    Where memory runs out, a batch is done again in halves, and those that follow in pieces of that size.

    Args:
        model: on the device of the batches.
        task: makes the meter.
        batches: held-out batches on the device.
        precision: of forward passes.
        between: called after each batch with the number done; may raise to end the pass.
        largest: samples that a forward pass may take; 0: no limit.
        lowered: called with a new `largest` and a line for the person.

    Raises:
        SegFitError: if a single sample does not fit.
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
                smaller = _count(meter, forward, batch, largest)
                if smaller != largest:
                    told = (
                        f"out of memory in validation with {count_samples(batch)} samples at once: going on with "
                        f"{smaller}. The scores stay the same."
                    )
                    largest = smaller
                    if lowered is not None:
                        lowered(largest, told)
                if between is not None:
                    between(done)
            result = meter.result()  # synchronises: the scores are read from the device
    finally:
        model.train(training)
    return replace(result, seconds=time.perf_counter() - start)


def _count(meter: Meter, forward: Forward, batch: Batch, largest: int) -> int:
    """Count a batch in pieces of at most `largest` samples; return the size that went well."""
    waiting = _pieces(batch, largest)
    while waiting:
        piece = waiting.pop(0)
        try:
            meter.update(forward, piece)
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        # Outside of the `except`, where the traceback no longer holds the pass's tensors.
        largest = count_samples(piece) // 2
        if largest == 0:
            raise SegFitError(
                "out of memory in validation with a single sample. Lower image_size, choose a smaller model, or take "
                f"device=cpu. The error was: {said}"
            )
        release_memory(device_of(piece))
        waiting = [small for one in (piece, *waiting) for small in _pieces(one, largest)]
    return largest


def _pieces(batch: Batch, largest: int) -> list[Batch]:
    count = count_samples(batch)
    if not 0 < largest < count:
        return [batch]
    starts = range(0, count, largest)
    return [{key: tensor[at : at + largest] for key, tensor in batch.items()} for at in starts]
