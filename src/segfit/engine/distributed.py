"""The processes that train one model together; alone, one process is the whole world."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

from segfit.engine.task import Forward

T = TypeVar("T")


class World:
    """One process alone: everybody agrees with it, and there is nothing to add up.

    Attributes:
        rank: 0-based number of this process among all.
        size: how many processes there are.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor on the device; every process has to call."""
        return tensor

    def max(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all processes, on the host; every process has to call."""
        return numbers

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, to all of them; every process has to call."""
        return [value]

    def once_a_machine(self, work: Callable[[], T]) -> T:
        """Let the first process of each machine work; return its result (picklable) to all that run there.

        Every process has to call.
        """
        return work()

    def post(self, line: str) -> None:
        """Hand a line for the person to the main process, which reads it when it logs."""

    def posted(self) -> list[str]:
        """Return the lines that were posted since the last call; only the main process calls."""
        return []

    def wrap(self, model: nn.Module, forward: Forward) -> Forward:
        """Return a forward whose backward adds up gradients over all processes.

        Args:
            model: owns the parameters.
            forward: the model, or its compiled form.
        """
        del model
        return forward

    def unwrap(self, forward: Forward) -> Forward:
        """Return what `wrap` was given."""
        return forward

    def no_sync(self, forward: Forward) -> AbstractContextManager[Any]:
        """Return a context in which passes leave their gradients in this process, for accumulation."""
        del forward
        return nullcontext()

    def average_gradients(self, model: nn.Module) -> None:
        """Give all processes the mean of the gradients that passes in `no_sync` left; every process has to call."""
        del model

    def average_buffers(self, model: nn.Module) -> None:
        """Give all processes the mean of the model's floating-point buffers (batch norm's running statistics)."""
        del model


ALONE = World()
