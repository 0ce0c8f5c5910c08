"""Every block of memory that a piece of torch code takes and gives back, in order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that a kernel takes and gives back by itself: (operation, arguments, result) → bytes.
Scratch = Callable[[Any, tuple[Any, ...], Any], int]


class MemoryRecorder(TorchDispatchMode):
    """Notes births and deaths of the storages on one type of device while it is active.

    Args:
        device_type: of the storages that count.
        block: sizes are rounded up to a multiple of it, as the device's allocator does.
        scratch: what kernels take besides their results.

    Attributes:
        events: +id at a birth, -id at a death; ids count from 1 in order of birth.
        sizes: bytes by id.
        parts: what the storage is part of, by id; absent: activations.
        scalars: what is "read from the device"; tensors without data hold no numbers.
    """

    def __init__(self, device_type: str, block: int, scratch: Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.block = block
        self.scratch = scratch
        self.events: list[int] = []
        self.sizes: dict[int, int] = {}
        self.parts: dict[int, str] = {}
        self.scalars: Iterator[float] = iter(())
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}  # storage → id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note the storages of its results that are new."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            value = next(self.scalars, 0.0)
            return value if args[0].dtype.is_floating_point else int(value)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        scratch = self.scratch(func, args, result)
        if scratch > 0:
            self._pass_through(scratch)
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
        number = len(self.sizes) + 1
        self.sizes[number] = -(-size // self.block) * self.block
        self.events.append(number)
        return number

    def _pass_through(self, size: int) -> None:
        number = self._born(size)
        self.parts[number] = "workspace"
        self.events.append(-number)
