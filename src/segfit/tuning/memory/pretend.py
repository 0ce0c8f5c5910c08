"""CUDA's rules where there is no CUDA: which kernels run, in which types, on tensors without data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import GraphExecGroup

from segfit.tuning.memory.backward import backward
from segfit.tuning.memory.lstm import lstm
from segfit.tuning.memory.recorder import MemoryRecorder

aten = torch.ops.aten


class Cuts:
    """Cuts the graph where a caller keeps a tensor of it, so that the caller does not hold the graph.

    torch's engine frees what a node saved once the node is done. The walk in Python frees the node itself,
    which it can only while nobody else holds it.
    """

    def __init__(self) -> None:
        # (leaf that the caller has, what it stands for)
        self._made: list[tuple[Tensor, Tensor]] = []

    def cut(self, tensor: Tensor) -> Tensor:
        """Return a leaf that shares the tensor's memory; `backward` continues behind it."""
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._made.append((leaf, tensor))
        return leaf

    def backward(self, loss: Tensor) -> None:
        """Do what `loss.backward()` would have done without cuts."""
        ends = [leaf for leaf, _ in self._made]
        if loss.grad_fn is None:
            loss.grad = torch.ones_like(loss)
        else:
            backward([(loss.grad_fn, torch.ones_like(loss))], ends)
        del loss
        while self._made:
            leaf, tensor = self._made.pop()
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None  # whoever asks for a backward used what was cut
            roots = [(tensor.grad_fn, gradient)]
            del tensor, gradient
            backward(roots, ends)


class Rules(TorchFunctionMode):
    """Answers calls that would ask a driver: which attention kernel to take, cuDNN's LSTM, and backward.

    Args:
        cuts: made in the graphs that are walked.
        cuda: attention and LSTMs as a card of Ampere or later does them; False: torch decides.
    """

    def __init__(self, cuts: Cuts, cuda: bool) -> None:
        super().__init__()
        self.cuts = cuts
        self.cuda = cuda

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        if func is Tensor.backward:
            with self:  # for what checkpoint() computes again
                return self.cuts.backward(args[0])
        if func is F.scaled_dot_product_attention and self.cuda:
            return attention(*args, **(kwargs or {}))
        if func is torch.lstm and self.cuda:
            return lstm(*args)
        return func(*args, **(kwargs or {}))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Return SDPA by the kernel that a card takes: flash for 16 bits, else memory-efficient.

    Without a driver torch takes the one that keeps the whole attention matrix.
    """
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if attn_mask is None and q.dtype != torch.float32:
        q, k, v = (F.pad(x, (0, -width % 8)) if width % 8 else x for x in (q, k, v))
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0][..., :width]  # type: ignore[no-any-return]
    efficient = aten._scaled_dot_product_efficient_attention
    keep = torch.is_grad_enabled()
    return efficient(q, k, v, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


class _HostGenerator(torch.Generator):
    """A generator on the host, wherever it is wanted."""

    def __new__(cls, *_: Any, **__: Any) -> _HostGenerator:
        return super().__new__(cls)


@contextlib.contextmanager
def without_data(recorder: MemoryRecorder, cuts: Cuts) -> Iterator[torch.device]:
    """Make every tensor one without data on the recorder's type of device, and yield that device.

    Nothing that is made inside may be used outside, or the other way round.
    """
    cuda = recorder.device_type == "cuda"
    device = torch.device("cuda:0" if cuda else "cpu")
    # It would read whether a gradient overflowed.
    step = mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _step)
    driverless = no_driver_asked(cuts, cuda)
    with step if cuda else contextlib.nullcontext(), FakeTensorMode(), recorder, driverless, device:
        yield device


@contextlib.contextmanager
def no_driver_asked(cuts: Cuts, cuda: bool) -> Iterator[None]:
    """Keep from the driver, and from code that asks for their data, tensors that have none; the arguments are `Rules`'."""
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        # There, operations that are made of others come whole, and what happens inside is not seen.
        replace(torch, "inference_mode", _no_grad)
        if cuda:  # else autocast and GradScaler switch themselves off
            replace(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            replace(torch, "Generator", _HostGenerator)
            replace(torch.cuda, "is_bf16_supported", lambda *_: True)
            replace(torch.cuda, "get_device_capability", lambda *_: (8, 0))
        # It asks where weights lie, and the driver.
        replace(nn.RNNBase, "flatten_parameters", lambda _: None)
        # Module.to() swaps tensors in place, and copies ask for their data: those without refuse both.
        replace(nn.Module, "_apply", _convert)
        replace(Tensor, "__deepcopy__", _copy)
        stack.enter_context(Rules(cuts, cuda))
        # checkpoint() takes it for one backward of the engine
        stack.enter_context(GraphExecGroup())
        yield


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Stand for `Tensor.__deepcopy__`."""
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]  # type: ignore[no-any-return]


def _step(_: Any, optimizer: torch.optim.Optimizer, *__: Any) -> None:
    """Stand for `GradScaler._maybe_opt_step`."""
    optimizer.step()


@contextlib.contextmanager
def _no_grad(mode: bool = True) -> Iterator[None]:
    """Stand for `torch.inference_mode`, in which autocast keeps no weights that it converted."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(kept and not mode)
    try:
        with torch.no_grad() if mode else contextlib.nullcontext():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def _convert(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """Give a module, and all below it, new parameters and buffers: `nn.Module._apply` on a new model."""
    made: dict[Tensor, nn.Parameter] = {}  # shared ones stay shared
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in made:
                new = convert(parameter.detach())
                made[parameter] = nn.Parameter(new, parameter.requires_grad)
            setattr(owner, name, made[parameter])  # an LSTM keeps a list of them, too
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, convert(buffer))
    return module
