"""Every block of memory that a piece of torch code takes and gives back, in order."""

import math
import operator
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from segfit.tuning.memory.lstm import onednn_scratch, onednn_workspace
from segfit.tuning.memory.planner import PARTS

aten = torch.ops.aten
_BLOCK = {"cuda": 512, "cpu": 1}  # CUDACachingAllocator.cpp's kMinBlockSize


class MemoryRecorder(TorchDispatchMode):
    """Notes births and deaths of the storages on one type of device while it is active.

    Sizes are rounded up as the device's allocator does. On CUDA, what kernels take besides their results counts; of
    the CPU's kernels, what `cpu_scratch` knows: that of others is too little to count (docs/plan.md).
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.events: list[int] = []  # +id at a birth, -id at a death; ids count births from 1
        self.sizes: dict[int, int] = {}  # bytes by id
        self.parts: dict[int, str] = {}  # what the storage is part of, by id
        # What is "read from the device", then 1: tensors without data hold no numbers, and optimizers divide by steps.
        self.scalars: Iterator[float] = iter(())
        self._living: MutableMapping[Any, int] = WeakIdKeyDictionary()  # storage → id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note the storages of its results that are new."""
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            value = next(self.scalars, 1.0)
            return value if args[0].dtype.is_floating_point else int(value)
        if packet is aten._fused_sgd_:  # in place, and not known for tensors without data
            return None
        result = func(*args, **kwargs or {})
        if packet is aten.mkldnn_rnn_layer and torch.is_grad_enabled():
            result = (*result[:3], onednn_workspace(args[0], args[1]))
        self.note(filter(torch.is_tensor, tree_leaves(result)))
        of_device = cuda_scratch if self.device_type == "cuda" else cpu_scratch
        if (scratch := of_device(packet, args, result)) > 0:
            self.events.append(-self._born(scratch, "workspace"))
        return result

    def note(self, tensors: Iterable[Tensor], part: str = "") -> None:
        """Note the storages that are new among those of tensors; if `part` is given, all of them count as that part."""
        for tensor in tensors:
            if tensor.device.type != self.device_type or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage not in self._living:
                number = self._living[storage] = self._born(storage.nbytes(), "activations")
                weakref.finalize(storage, self.events.append, -number)
            if part:
                self.parts[self._living[storage]] = part

    def _born(self, size: int, part: str) -> int:
        number, block = len(self.sizes) + 1, _BLOCK[self.device_type]
        self.sizes[number], self.parts[number] = -(-size // block) * block, part
        self.events.append(number)
        return number

    def living(self) -> NDArray[np.float64]:
        """Return the bytes that live after each event, (events, PARTS)."""
        changes = np.zeros((len(self.events), len(PARTS)))
        for row, event in enumerate(self.events):
            part = PARTS.index(self.parts[abs(event)])
            changes[row, part] = math.copysign(self.sizes[abs(event)], event)
        return changes.cumsum(0)


def cuda_scratch(packet: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation on CUDA takes from the caching allocator besides its results."""
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
        return int(args[0].nbytes + args[1].nbytes + result.nbytes)
    if packet is aten.convolution_backward and args[9] == 1:
        return int(args[0].nbytes + args[1].nbytes + args[2].nbytes)
    return 0


def cpu_scratch(packet: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation on the CPU takes besides its results: an LSTM, or a depthwise convolution.

    Of contiguous images (SSIM's windows), oneDNN works on copies whose channels fill whole vectors.
    """
    if packet is aten.mkldnn_rnn_layer_backward:
        return onednn_scratch(args)
    if packet is aten.convolution_backward:
        return _depthwise_backward(args[1], args[2], groups=args[9])
    depthwise = packet is aten.convolution and args[1].shape[:2] == (args[0].shape[1], 1)
    if not depthwise or result.ndim != 4 or not args[0].is_contiguous():
        return 0
    images, channels = args[0], args[0].shape[1]
    vector = 16 if "512" in torch.backends.cpu.get_cpu_capability() else 8
    filled = math.ceil(channels / vector) * vector
    # One channel is not copied. The result is copied back once the images' copy is gone.
    copied = 0 if channels == 1 else images.nbytes // channels * filled - result.nbytes
    return int(result.nbytes // channels * filled + copied)


def _depthwise_backward(images: Tensor, weight: Tensor, groups: int) -> int:
    """Return the bytes of oneDNN's own filters where the images are smaller than one: it fills each to 16 by 16."""
    smaller = any(map(operator.lt, images.shape[2:], weight.shape[2:]))
    bytes_each = 6 if weight.dtype.itemsize == 2 else 4  # 16-bit filters are kept in fp32 as well
    return 256 * bytes_each * weight.numel() if smaller and weight.shape[0] == groups > 1 else 0
