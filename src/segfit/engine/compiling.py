"""Faster forwards of a model: compiled, with a trial (what does not compile runs eager, with a notice that says why); with
weights that are copied to half precision all at once.
"""

import contextlib
import gc
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.precision import Precision
from segfit.engine.task import Forward

# Errors defined here mean that compiling failed; by name, since torch moves them between versions.
_COMPILERS = ("torch._dynamo.", "torch._inductor.", "torch._functorch.", "torch.fx.", "triton.")
# These call compilers: the lazy compilation of a backward raises a compiler's own error, of any type.
_CALLERS = (
    "torch/_dynamo/convert_frame.py",
    "torch/_dynamo/backends/common.py",
    "torch/_inductor/compile_fx.py",
)
_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


def compiled_or_eager(
    model: nn.Module,
    example: Tensor,
    precision: Precision,
    distributed: Distributed = SINGLE_PROCESS,
    mode: str | None = None,
) -> tuple[Forward, str | None]:
    """Return a compiled forward that was tried on `example`, or the model and a notice that says why not.

    Where memory runs out, it stays compiled: the update finds what fits. The forward is wrapped by `distributed`, every process
    of which has to call, before it is tried: within DistributedDataParallel the compiler cuts the backward where a bucket of
    gradients is full, so that buckets travel while the rest is computed.
    `model` is in training mode, on its device; its buffers and the generators of random numbers are restored. `example` is
    an input (B, …) of the shape that will be trained on, `mode` torch.compile's.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cuda = [example.device] if example.device.type == "cuda" else []
    forward, reason = model, None  # type: Forward, str | None
    try:
        forward = distributed.wrap(cast(nn.Module, torch.compile(model, mode=mode)))
        with torch.random.fork_rng(devices=cuda), distributed.no_sync(forward):
            for _ in range(1 if mode is None else 3):  # CUDA graphs: warm-up, recording, replay
                with precision.autocast():
                    output = forward(example)
                output.float().sum().backward()
                model.zero_grad(set_to_none=True)
    except Exception as error:  # no Triton, no C++ compiler, a bug of the compiler, …
        if not any(map(is_out_of_memory, _chain(error))):
            reason = give_up_compiling(error)
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    reasons = [one for one in distributed.gather(reason) if one]  # all compile, or none
    if not reasons:
        return forward, None
    del forward
    gc.collect()  # removes the wrapper's hooks from the parameters
    return distributed.wrap(model), reasons[0]


def without_graphs(model: nn.Module) -> tuple[Forward, str]:
    """Return a model that is compiled anew, without CUDA graphs, whose memory is freed, and a notice that says why."""
    torch._dynamo.reset()
    release_memory()
    return torch.compile(model), (
        "compile_mode=reduce-overhead: off, for an update now takes several passes, and CUDA graphs overwrite the gradients of "
        "all but the last. Next time: a smaller batch_size, or compile_mode=default."
    )


def is_compile_error(error: BaseException) -> bool:
    """Return whether a forward or backward pass failed because something did not compile.

    That may happen late: for another batch size, in eval mode, or in a backward, which is compiled when first needed.
    Errors of operations that were compiled and run do not count, nor does memory that ran out, also while compiling.
    """
    chain = list(_chain(error))
    if any(map(is_out_of_memory, chain)):
        return False
    kinds = [kind for one in chain for kind in type(one).__mro__]
    frames = traceback.walk_tb(error.__traceback__)
    files = [frame.f_code.co_filename.replace("\\", "/") for frame, _ in frames]
    compilers = any(f"{kind.__module__}.".startswith(_COMPILERS) for kind in kinds)
    return compilers or any(file.endswith(_CALLERS) for file in files)


def give_up_compiling(error: BaseException) -> str:
    """Discard everything compiled so far; return a notice that says why."""
    with contextlib.suppress(Exception):  # where importing the compiler is what fails
        torch._dynamo.reset()
    *_, first = _chain(error)
    said = str(first).strip().splitlines() or [""]
    reason = said[0] if type(first) is RuntimeError else f"{type(first).__name__}: {said[0]}"
    return f"compile=true: torch.compile failed, running eager ({reason.rstrip(': ')[:200]})."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes; the one that occurred first comes last."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = getattr(one, "inner_exception", None) or one.__cause__


class HalfWeights(nn.Module):
    """A model whose weights of products are cast to bf16 or fp16 all by one call, and their gradients back by another.

    Autocast would launch a kernel for each of them, in every pass forward and again backward. Values are the same. Weights
    of layers that compute with them first, as weight standardisation does, are left to autocast, and so are frozen ones.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = [
            f"{path}.{name}".removeprefix(".")
            for path, layer in model.named_modules()
            if isinstance(layer, _PRODUCTS)
            and type(layer).__module__.startswith(("torch.", "segfit."))
            for name, _ in layer.named_parameters(recurse=False)
        ]

    def forward(self, inputs: Tensor) -> Any:
        """Return what the model makes of its input, under autocast."""
        weights = {name: self.model.get_parameter(name) for name in self.names}
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        copies = _Copied.apply(*weights.values()) if weights else ()
        return functional_call(self.model, dict(zip(weights, copies, strict=True)), (inputs,))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        context.set_materialize_grads(False)  # what is not used has no gradient
        return tuple(_copies(weights, torch.get_autocast_dtype(weights[0].device.type)))

    @staticmethod
    @once_differentiable
    def backward(_: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([one for one in gradients if one is not None], torch.float32))
        return tuple(None if one is None else next(copies) for one in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
