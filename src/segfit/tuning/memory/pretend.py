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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import GraphExecGroup

from segfit.tuning.memory.backward import backward
from segfit.tuning.memory.lstm import lstm
from segfit.tuning.memory.recorder import MemoryRecorder

aten = torch.ops.aten


class Rules(TorchFunctionMode):
    """Answers calls that would ask a driver: which attention kernel to take, cuDNN's LSTM, and backward.

    Where a caller keeps a tensor of the graph, cut the graph, so that the caller does not hold it. torch's engine frees
    what a node saved once the node is done. The walk in Python frees the node itself, which it can only while nobody
    else holds it. With `cuda`, attention and LSTMs are as a card of Ampere or later does them; else torch decides.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        # (leaf that the caller has, what it stands for)
        self._made: list[tuple[Tensor, Tensor]] = []

    def cut(self, tensor: Tensor) -> Tensor:
        """Return a leaf that shares the tensor's memory; `backward` continues behind it."""
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._made.append((leaf, tensor))
        return leaf

    def cutting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function whose result is cut off from the graph, as by `cut`."""
        return lambda *given: self.cut(function(*given))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        if func is Tensor.backward:
            with self:  # for what checkpoint() computes again
                return self._backward(args[0])
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            if not torch.are_deterministic_algorithms_enabled():
                return attention(*args, **(kwargs or {}))
            with sdpa_kernel(SDPBackend.MATH):  # as `seed_everything` sees to
                return func(*args, **(kwargs or {}))
        if func is torch.lstm and self.cuda:
            return lstm(*args)
        return func(*args, **(kwargs or {}))

    def _backward(self, loss: Tensor) -> None:
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
def without_data(recorder: MemoryRecorder) -> Iterator[tuple[torch.device, Rules]]:
    """Make every tensor one without data on the recorder's type of device; yield that device, and what cuts graphs.

    Nothing that is made inside may be used outside, or the other way round.
    """
    rules = Rules(cuda=recorder.device_type == "cuda")
    device = torch.device("cuda:0" if rules.cuda else "cpu")
    # On a card it would read whether a gradient overflowed.
    step = mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _step)
    with step, FakeTensorMode(), recorder, no_driver_asked(rules), device:
        yield device, rules


@contextlib.contextmanager
def no_driver_asked(rules: Rules) -> Iterator[None]:
    """Keep from the driver, and from code that asks for their data, tensors that have none."""
    replaced: list[tuple[Any, str, Any]] = [
        # There, operations that are made of others come whole, and what happens inside is not seen.
        (torch, "inference_mode", _no_grad),
        # It asks where weights lie, and the driver.
        (nn.RNNBase, "flatten_parameters", lambda _: None),
        # Module.to() swaps tensors in place, and copies ask for their data: those without refuse both.
        (nn.Module, "_apply", _convert),
        (Tensor, "__deepcopy__", _copy),
    ]
    if rules.cuda:  # else autocast and GradScaler switch themselves off
        replaced += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch, "Generator", _HostGenerator),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        ]
    if torch.__version__ < "2.13":
        replaced.append((torch.autograd.Function, "apply", classmethod(_apply_and_hold)))
    with contextlib.ExitStack() as stack:
        for one in replaced:
            stack.enter_context(mock.patch.object(*one))
        stack.enter_context(rules)
        # checkpoint() takes it for one backward of the engine
        stack.enter_context(GraphExecGroup())
        yield


# In Python before torch 2.13, which machines with a card may have in place of what requirements.txt asks for
_apply: Any = getattr(torch.autograd.Function.apply, "__func__", None)


def _apply_and_hold(owner: Any, *given: Any) -> Any:
    """Stand for `Function.apply`: before torch 2.13 a node of Python's needs one of torch's that holds it."""
    results = _apply(owner, *given)
    for result in results if isinstance(results, tuple) else (results,):
        if result.grad_fn is not None:
            result.grad_fn.holder = result.view_as(result).grad_fn
    return results


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
