"""The processes that train one model together; by default there is one."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from segfit.engine.task import Forward
from segfit.errors import SegFitError

T = TypeVar("T")


class Distributed:
    """A single process, where nothing has to be exchanged; `engine.torchrun` overrides every method for several.

    Every process has to call every method, except `post` and `posted`.
    """

    rank = 0  # 0-based number of this process among all
    size = 1  # number of processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor on the device; the host does not wait for it."""
        return tensor

    def max(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all processes; waits for the other hosts, not for the device."""
        return numbers

    def gather(self, value: T) -> list[T]:
        """Return the value (picklable) of every process, by rank."""
        return [value]

    def once_a_machine(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process of each machine; return its result (picklable) in all of that machine."""
        return work()

    def post(self, line: str) -> None:
        """Send a notice to the main process, which reads it when it logs."""

    def posted(self) -> list[str]:
        """Return the notices that were posted since the last call; only the main process calls."""
        return []

    def wrap(self, _model: nn.Module, forward: Forward) -> Forward:
        """Return a forward whose backward averages gradients over all processes; weights become the main process's."""
        return forward

    def unwrap(self, forward: Forward) -> Forward:
        """Return what `wrap` was given."""
        return forward

    def no_sync(self, _forward: Forward) -> AbstractContextManager[Any]:
        """Return a context in which passes leave their gradients in this process, for accumulation."""
        return nullcontext()

    def average_gradients(self, _model: nn.Module) -> None:
        """Average over all processes the gradients that passes in `no_sync` left."""

    def average_buffers(self, _model: nn.Module) -> None:
        """Average the model's floating-point buffers (batch norm's running statistics) over all processes."""


SINGLE_PROCESS = Distributed()


def refuse_differences(distributed: Distributed, values: Mapping[str, Any]) -> None:
    """Compare plain values by name with those of the other processes; every process has to call.

    Machines differ: `hardware=auto` is another recipe on each kind of card, `precision=auto` another precision. Raises a
    SegFitError if values differ, the same in every process.
    """
    every = distributed.gather(dict(values))
    problems = []
    for name in sorted({name for one in every for name in one}):
        found = [one.get(name) for one in every]
        odd = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            problems.append(
                f"the processes do not train the same: {name} is {found[0]} in process 0, {found[odd]} in process {odd}. "
                f"Give {name.split('.')[0]}= on the command line, and the same command to every machine."
            )
    if problems:
        raise SegFitError(problems)
