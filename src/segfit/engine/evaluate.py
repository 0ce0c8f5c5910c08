"""One pass over held-out data."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from segfit.engine.findings import Findings
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.precision import Precision
from segfit.engine.task import Batch, Task, count_samples
from segfit.errors import SegFitError


def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    precision: Precision,
    on_batch: Callable[[int], None] | None = None,
    *,
    largest: int = 0,
    lowered: Callable[[int, str], None] | None = None,
) -> Findings:
    """Return the scores of `model` on held-out batches, which are on its device; its mode is restored.

    When memory runs out, a batch is evaluated again in halves, and the following ones in pieces of that size: `lowered` is
    called with the new `largest` (samples that a forward pass may take; 0 is no limit) and a notice. `on_batch` is called
    after each batch with the number done, and may raise to end the pass. Raises a SegFitError if a single sample does not
    fit.
    """
    start, training, meter = time.perf_counter(), model.training, task.meter()
    model.eval()

    def forward(inputs: Tensor) -> Tensor:
        with precision.autocast():
            outputs: Tensor = model(inputs)
        return outputs.float()  # scores are computed in fp32 whatever the pass ran in

    def count(batch: Batch, largest: int) -> int:
        """Count a batch in pieces of at most `largest` samples; return the size that fitted."""
        done, samples = 0, count_samples(batch)
        while done < samples:
            size = min(largest or samples, samples - done)
            piece = {key: tensor[done : done + size] for key, tensor in batch.items()}
            try:
                meter.update(forward, piece)
                done += size
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside of `except`, where no traceback holds the failed pass's tensors.
            largest = size // 2
            if largest == 0:
                raise SegFitError(
                    f"out of memory in validation with a single sample. {task.memory_advice} Or set device=cpu. "
                    f"The error was: {reason}"
                )
            release_memory()
        return largest

    try:
        with torch.inference_mode():
            for done, batch in enumerate(batches, start=1):
                fitted = count(batch, largest)
                if fitted != largest and lowered is not None:
                    lowered(
                        fitted,
                        f"out of memory in validation with {count_samples(batch)} samples at once: continuing with "
                        f"{fitted}. The scores stay the same.",
                    )
                largest = fitted
                if on_batch is not None:
                    on_batch(done)
            result = meter.result()  # synchronises: the scores are read from the device
    finally:
        model.train(training)
    return replace(result, seconds=time.perf_counter() - start)
