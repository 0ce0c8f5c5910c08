"""Every block of memory that a piece of torch code takes and gives back, in order."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segfit.tuning.memory.lstm import onednn_scratch, onednn_workspace

aten = torch.ops.aten
_BLOCK = {"cuda": 512, "cpu": 1}  # CUDACachingAllocator.cpp's kMinBlockSize


class MemoryRecorder(TorchDispatchMode):
    """Notes births and deaths of the storages on one type of device while it is active.

    Sizes are rounded up as the device's allocator does. On CUDA, what kernels take besides their results counts; of
    the CPU's kernels, an LSTM's: that of others is too little to count (docs/plan.md).
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.events: list[int] = []  # +id at a birth, -id at a death; ids count births from 1
        self.sizes: dict[int, int] = {}  # bytes by id
        self.parts: dict[int, str] = {}  # what the storage is part of, by id; absent: activations
        # What is "read from the device", then 1: tensors without data hold no numbers, and optimizers divide by steps.
        self.scalars: Iterator[float] = iter(())
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage → id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note the storages of its results that are new."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            value = next(self.scalars, 1.0)
            return value if args[0].dtype.is_floating_point else int(value)
        packet = func._overloadpacket
        if packet is aten._fused_sgd_:  # in place, and not known for tensors without data
            return None
        result = func(*args, **kwargs)
        if packet is aten.mkldnn_rnn_layer and torch.is_grad_enabled():
            result = (*result[:3], onednn_workspace(args[0], args[1]))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        scratch = cuda_scratch(func, args, result) if self.device_type == "cuda" else 0
        if packet is aten.mkldnn_rnn_layer_backward:
            scratch = onednn_scratch(args)
        if scratch > 0:
            number = self._born(scratch)
            self.parts[number] = "workspace"
            self.events.append(-number)
        return result

    def assign(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what tensors are part of."""
        for tensor in tensors:
            if tensor is not None and tensor.device.type == self.device_type:
                number = self._note(tensor)
                if number is not None:
                    self.parts[number] = part

    def _note(self, tensor: Tensor) -> int | None:
        if tensor.device.type != self.device_type or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._living.get(key)
        if known is not None and known[1]() is not None:
            return known[0]
        number = self._born(storage.nbytes())

        def died(_: Any) -> None:
            if self._living.get(key, (0,))[0] == number:
                del self._living[key]
            self.events.append(-number)

        self._living[key] = number, weakref.ref(storage, died)
        return number

    def _born(self, size: int) -> int:
        number, block = len(self.sizes) + 1, _BLOCK[self.device_type]
        self.sizes[number] = -(-size // block) * block
        self.events.append(number)
        return number


def cuda_scratch(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation on CUDA takes from the caching allocator besides its results."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_backward:
        # fp32 sums of dq, and one number a row: flash_attn's mha_bwd
        batch, heads, length, width = map(int, args[1].shape)
        return 4 * batch * heads * (-(-length // 128) * 128) * (width + 1)
    if packet is aten._scaled_dot_product_efficient_attention_backward:
        q, k = args[1], args[2]
        rows: int = 4 * q.numel() // q.shape[-1]
        sums: int = 0 if q.dtype == torch.float32 else 4 * (q.numel() + 2 * k.numel())
        return rows + sums
    if packet is aten.convolution and args[8] == 1:
        return _bytes(args[0], args[1], result)
    if packet is aten.convolution_backward and args[9] == 1:
        return _bytes(args[0], args[1], args[2])
    return 0


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
