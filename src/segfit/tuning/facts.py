"""What diagnose records of a training, as plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segfit.tuning.change import Change

ARITHMETIC = ("augmentation", "forward", "backward", "optimizer")  # phases
RARELY = 20  # updates between two readings of the device that cost nothing


@dataclass(frozen=True)
class Costs:
    """Seconds that one process takes for one sample.

    Args:
        wait: of reading, without the processor: the disk, or the network.
        decode: of reading, on the processor.
        fit: to bring it to image_size.
        augment: in the worker.
    """

    wait: float = 0.0
    decode: float = 0.0
    fit: float = 0.0
    augment: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.wait + self.decode + self.fit + self.augment


@dataclass(frozen=True)
class Resident:
    """What an update takes on a resident batch with a change.

    Args:
        change: named by the bottleneck that it removes.
        seconds: of an update.
        samples: of an update.
    """

    change: Change
    seconds: float
    samples: int


@dataclass(frozen=True)
class Facts:
    """What was recorded. Times are seconds an update.

    Args:
        cuda: whether the device is a CUDA card.
        samples: of an update.
        update: wall-clock, without validation and checkpoints.
        phases: name → time on the host's clock: data, copy, augmentation, forward, backward, optimizer, logging.
        resident: of the arithmetic alone, with a batch that lies on the device.
        restart: that the loop waits for data at the turns of epochs, starting and ending workers included.
        refill: as much of it as would be left if workers were kept: they make the first batch first.
        costs: of a sample.
        cached: of a sample if decoded images were kept; None: they are already.
        workers: processes that read.
        cores: that this process may use.
        threads: of the arithmetic on the CPU.
        pin_memory: whether batches are page-locked.
        non_blocking: whether the host goes on while a batch is copied.
        persistent: whether workers are kept between epochs.
        log_every: updates between two readings of the device.
        cache: where decoded images would be kept: "ram" or "disk".
        tried: other settings of the arithmetic.
    """

    cuda: bool
    samples: int
    update: float
    phases: Mapping[str, float]
    resident: float
    costs: Costs
    workers: int
    cores: int
    threads: int
    restart: float = 0.0
    refill: float = 0.0
    cached: Costs | None = None
    pin_memory: bool = True
    non_blocking: bool = True
    persistent: bool = True
    log_every: int = 20
    cache: str = "ram"
    tried: Sequence[Resident] = ()

    def phase(self, name: str) -> float:
        """Seconds of a phase; 0 if it never came."""
        return self.phases.get(name, 0.0)

    @property
    def host(self) -> float:
        """What the host does beside waiting: for data and, on CUDA, for the device to be read."""
        waiting = self.phase("data")
        if self.cuda and self.log_every >= RARELY:
            waiting += self.phase("logging")
        return max(self.update - waiting, 0.0)

    @property
    def in_step(self) -> bool:
        """Whether host and device work one after the other: on the CPU, or where the host waits at every update."""
        return not self.cuda or self.log_every < RARELY or not self.non_blocking

    @property
    def disturbed(self) -> float:
        """What workers take from the arithmetic, which has the same cores: on the CPU, where no core is spare."""
        if self.cuda or self.workers == 0 or self.threads < self.cores:
            return 0.0
        return max(sum(self.phase(name) for name in ARITHMETIC) - self.resident, 0.0)

    @property
    def loader(self) -> float:
        """What the data side takes for the samples of an update."""
        waited = self.phase("data") - self.restart
        if self.workers == 0:
            return max(waited, 0.0)
        if waited > 0.1 * self.update:  # the loop waits, so the data side sets the pace
            return self.update - self.restart
        return min(self.samples * self.costs.total / self.workers, self.update - self.restart)
