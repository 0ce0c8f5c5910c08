"""A CUDA card that is not there: what only runs on one goes through on tensors without data, and is watched.

What lies on the host is real. What is copied to `cuda:0`, or made there, becomes a FakeTensor, which knows shape, type and
device, and refuses to be mixed with tensors of the host. A copy back to the host is full of zeros. The card cannot see waits
inside a kernel's own C++.
"""

import ast
import contextlib
import linecache
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import dataloader

import segfit.tasks
from segfit.tuning.memory import pretend
from segfit.tuning.memory.pretend import Rules, no_driver_asked

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
SOURCES = Path(segfit.__file__).parent

# Kernels that read something back before they return: how many there are, a minimum, whether a matrix was singular.
READING = {
    "nonzero", "masked_select", "unique_consecutive", "_unique", "_unique2", "unique_dim", "bincount", "histc",
    "equal", "repeat_interleave", "_linalg_check_errors", "multinomial",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"_to_copy", "copy_", "to"}


@dataclass(frozen=True)
class Wait:
    """The host waited for the card, or could not be sure that it need not."""

    phase: str
    what: str
    where: str  # file and number of the project's own line that asked for it
    line: str
    said: bool  # a comment or docstring there says that it waits


class Card(TorchDispatchMode):
    """Runs what concerns the card on tensors without data, and notes waits.

    Attributes:
        phase: what is going on, for the notes.
        reads: numbers that are "read" from the card; 0 when they are used up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rules = Rules(cuda=True)
        self.phase = ""
        self.reads: Iterator[float] = iter(())
        self.waits: set[Wait] = set()
        self.kernels: Counter[str] = Counter()  # how often each was launched
        self.main = Stream()
        self.stream = self.main
        # Kept alive, so that no address is used twice.
        self._pinned: dict[int, Tensor] = {}
        self._made_aside: dict[int, Aside] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        given = tensors_of(args)
        on_card = any(type(tensor) is FakeTensor for tensor in given)
        if not on_card and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            self.note("reads a number")
            value = next(self.reads, 0.0)
            return value if given[0].is_floating_point() else int(value)
        self._watch(name, args, kwargs, given)
        self.kernels[name] += 1
        if name == "_fused_sgd_":  # in place; torch has no shapes for it
            return None
        result = func(*args, **kwargs)
        made = tensors_of(result if isinstance(result, (tuple, list)) else (result,))
        if self.stream is not self.main:
            self._made_aside.update((address(one), Aside(one, self.stream)) for one in made)
        if all(tensor.device.type == "cuda" for tensor in made):
            return result
        with unset_fake_temporarily():  # what has arrived on the host has numbers: 0
            if name == "copy_":
                return args[0].zero_()
            return tree_map_only(
                FakeTensor, lambda one: torch.zeros(one.shape, dtype=one.dtype), result
            )

    def _watch(self, name: str, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> None:
        if name in READING and kwargs.get("output_size") is None:
            self.note(f"{name} reads how large its result is")
        if name in INDEXING:
            for index in filter(torch.is_tensor, args[1]):
                if index.dtype in (torch.bool, torch.uint8):
                    self.note(f"{name} by a mask reads how many it has")
                elif index.device.type == "cpu" and index.dim():
                    self.note(f"{name} by an index on the host copies it")
        if name in COPYING:
            source = args[1] if name == "copy_" else args[0]
            target = (
                args[0].device
                if name == "copy_"
                else torch.device(kwargs.get("device") or source.device)
            )
            if source.device.type != target.type:
                waits = not (
                    kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
                )
                self._copied(source, target, waits)
        if self.stream is self.main and self._made_aside:
            for tensor in given:
                aside = self._made_aside.get(address(tensor))
                if aside is not None:
                    aside.check(self)

    def _copied(self, source: Tensor, target: torch.device, waits: bool) -> None:
        if target.type == "cpu":
            self.note("copies to the host")
        elif address(source) not in self._pinned:
            self.note("copies from pageable memory")
        elif waits:
            self.note("a blocking copy")

    def pin(self, tensor: Tensor) -> Tensor:
        """Stand for `Tensor.pin_memory`."""
        copy = tensor.clone()
        self._pinned[address(copy)] = copy
        return copy

    def record_stream(self, tensor: Tensor, stream: Any) -> None:
        """Stand for `Tensor.record_stream`."""
        if stream is self.main and address(tensor) in self._made_aside:
            self._made_aside[address(tensor)].recorded = True

    def note(self, what: str) -> None:
        """Note a wait, with the project's line that is running."""
        frame = sys._getframe(1)
        while frame is not None and (not ours(frame.f_code.co_filename) or passes_on(frame)):
            frame = frame.f_back
        if frame is None:
            self.waits.add(Wait(self.phase, what, "", "", said=False))
            return
        file, number = frame.f_code.co_filename, frame.f_lineno
        line = linecache.getline(file, number).strip()
        self.waits.add(Wait(self.phase, what, f"{file}:{number}", line, says_so(file, number)))


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, *_: Any) -> None:
        self.waited_for: set[Stream] = set()
        self.cuda_stream = id(self)  # what other libraries know it by

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.add(other)

    def synchronize(self) -> None:
        """Wait; `card` puts what notes it in its place."""


@dataclass
class Aside:
    """A tensor that was made on another stream than that which uses it."""

    tensor: Tensor
    stream: Stream
    recorded: bool = False

    def check(self, card: Card) -> None:
        """Note what was forgotten; as of now it is in order."""
        if self.stream not in card.main.waited_for:
            card.note("is used before the other stream has made it")
        if not self.recorded:
            card.note("the other stream may overwrite it: no record_stream")


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of an operation's arguments or results."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_of(value)
    return found


def ours(file: str) -> bool:
    return file.startswith((*segfit.tasks.__path__, str(SOURCES))) and file != pretend.__file__


def passes_on(frame: FrameType) -> bool:
    """Say whether a TorchFunctionMode runs here, as it is, what another line has asked for."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return frame.f_code.co_name == "__torch_function__" and "func(*args" in line


@cache
def says_so(file: str, line: int) -> bool:
    """Say whether a comment at a line's statement, or above it, or its function's docstring says that it waits."""
    tree = ast.parse("".join(linecache.getlines(file)))
    around = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]  # fmt: skip
    innermost = max(around, key=lambda node: node.lineno)
    first, last = innermost.lineno, innermost.end_lineno or 0
    if hasattr(innermost, "body"):  # its head alone
        last = innermost.body[0].lineno - 1
    while linecache.getline(file, first - 1).strip().startswith("#"):
        first -= 1
    texts = [linecache.getline(file, number).partition("#")[2] for number in range(first, last + 1)]
    functions = [node for node in around if isinstance(node, ast.FunctionDef)]
    texts += [ast.get_docstring(function) or "" for function in functions[-1:]]
    return any("ynchronis" in text for text in texts)


@contextlib.contextmanager
def card() -> Iterator[Card]:
    """Yield a card to run on; nothing that is made inside may be used outside."""
    fake = Card()
    made = dataloader._SingleProcessDataLoaderIter.__init__

    def pinning(iterator: Any, loader: Any) -> None:
        made(iterator, loader)
        iterator._pin_memory = loader.pin_memory  # torch asks for a driver

    @contextlib.contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        before, fake.stream = fake.stream, stream
        yield
        fake.stream = before

    def waiting(*_: Any) -> None:
        fake.note("waits for the card")

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (Tensor, "pin_memory", lambda tensor, *_: fake.pin(tensor)),
            (Tensor, "record_stream", lambda *given: fake.record_stream(*given)),
            (torch.cuda, "Stream", Stream),
            (Stream, "synchronize", waiting),
            (torch.cuda.Event, "synchronize", waiting),
            (torch.cuda, "stream", switched),
            (torch.cuda, "current_stream", lambda *_: fake.stream),
            (torch.cuda, "synchronize", waiting),
            (torch.cuda, "mem_get_info", lambda *_: (2**34, 2**34)),
            (dataloader._SingleProcessDataLoaderIter, "__init__", pinning),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(fake)
        stack.enter_context(no_driver_asked(fake.rules))
        yield fake
