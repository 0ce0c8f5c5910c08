"""The peak of the bytes that torch allocates, in a piece of work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._C._profiler import _ExtraFields_Allocation  # no public name gives what is allocated
from torch.profiler import ProfilerActivity, profile


@dataclass
class Peak:
    """The largest sum of allocated bytes; 0 while the work runs."""

    bytes: int = 0


@contextmanager
def recorded_peak(device: torch.device) -> Iterator[Peak]:
    """Record the peak of allocated bytes of the work inside.

    On CUDA it is the allocator's, of everything that is allocated on the device. On the CPU it is torch's own record of
    what is allocated while the context is open, to the byte and the same in every run: so build the model inside. What
    libraries allocate without torch (oneDNN's weights in its own layouts, NumPy's arrays) is not in it.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    # Without it Kineto prints "USDT: … profiler_start", and an ERROR where there is no CUDA driver.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield peak
    results = record.profiler.kineto_results if record.profiler is not None else None
    assert results is not None  # the profiler has run
    events = list(results.experimental_event_tree())
    allocations = []
    while events:
        event = events.pop()
        events += event.children
        fields = event.typed[1]
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            allocations.append((event.start_time_ns, fields.alloc_size, fields.total_allocated))
    if allocations:
        _, size, total = min(allocations)
        # The count continues where an earlier record of this process ended.
        peak.bytes = int(max(total for _, _, total in allocations) - (total - size))
