"""Train under a random fault every few seconds; end with the weights of the training that nothing happened to.

    make soak                                # ten minutes
    python -m tests.soak --minutes 1 --seed 3

Faults that the process survives: a weight that becomes not a number, a full disk for a while. Faults that end it,
after which the run is resumed: SIGKILL of the process or of its whole group, SIGTERM, Ctrl-C, a data worker that is
killed, and, while nothing runs, a last checkpoint that is cut short, gets a flipped bit or disappears.

Exit code 0: the weights are equal bit for bit, and neither memory nor open files grew while a process lived.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from segfit.engine.checkpoint import load_checkpoint
from tests.integration.training import ROOT, TINY, environment, same, the_run

_BASE = (
    *(text for text in TINY if not text.startswith(("epochs", "data.train", "loader", "report"))),
    *("data.train_size=256", "loader.workers=1", "precision=fp32", "augmentation=cpu"),
    *("augmentation.mixup=0.3", "model.dropout=0.2", "ema_decay=0.9", "scheduler=cosine"),
    *("checkpoint.every_steps=10", "max_left_out=1000", "deterministic=true"),
)
_PAUSE = (1.0, 6.0)  # seconds between two faults
_DISK = 100_000  # bytes that a file may have on the full disk; batches in shared memory have fewer, checkpoints more
_GROWTH_MIB = 40.0  # of a process from the first third of its life to the last
_SURVIVED = ("weight becomes NaN", "disk full for a while")
_MORE_FILES = 4
_MORE_SHARED = (
    40  # on their way from the workers: 5 batches of training and of validation, some tensors each
)


@dataclass
class Life:
    """One process, from its second epoch to its end."""

    memory: list[float] = field(default_factory=list)  # MiB, once a look
    files: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)  # those in shared memory, which hold batches

    def look(self, process: psutil.Process) -> None:
        """Take down memory and open files of a process and its workers; nothing once it has gone."""
        try:
            memory = process.memory_info().rss / 2**20
            targets = _open_files(process.pid)
        except (psutil.Error, OSError):
            return
        shared = sum(target.startswith("/dev/shm/") for target in targets)
        self.memory.append(memory)
        self.files.append(len(targets) - shared)
        self.shared.append(shared)

    def growth(self) -> tuple[float, int, int] | None:
        """Return (MiB, files, shared) between the first third and the last third of the looks, medians.

        None: there are too few.
        """
        third = len(self.memory) // 3
        if third < 5:
            return None
        memory, files, shared = (
            median(values[-third:]) - median(values[:third])
            for values in (self.memory, self.files, self.shared)
        )
        return memory, int(files), int(shared)


def _open_files(pid: int) -> list[str]:
    """Return what a process has open: files, pipes, sockets."""
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            targets.append(str(link.readlink()))
    return targets


class Soak:
    """A run, and what is done to it.

    Args:
        folder: a scratch folder, which becomes the working directory.
        seed: of the faults.
        epochs: of the training.
    """

    def __init__(self, folder: Path, seed: int, epochs: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.arguments = (*_BASE, f"epochs={epochs}")
        self.faults: Counter[str] = Counter()
        self.endings: Counter[int] = Counter()
        self.lives: list[Life] = []
        self.output = (folder / "output.txt").open("w")

    def start(self) -> "subprocess.Popen[bytes]":
        """Start the run, or go on with it."""
        configs = list(self.folder.glob("outputs/*/*/config.yaml"))
        saved = [path for path in configs if any((path.parent / "checkpoints").glob("*.pt"))]
        arguments = [f"resume={saved[0].parent}"] if saved else self.arguments
        return subprocess.Popen(
            [sys.executable, "-m", "tests.soak.victim", *arguments],
            cwd=self.folder,
            env={**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def undisturbed(self, process: "subprocess.Popen[bytes]") -> Path:
        """Wait for a training without faults that was started; return the run."""
        if process.wait() != 0:
            raise AssertionError((self.folder / "output.txt").read_text())
        return the_run(self.folder)

    def disturbed(self, seconds: float) -> Path:
        """Train with faults for some time, then to the end; return the run."""
        deadline = time.monotonic() + seconds
        while True:
            quiet = time.monotonic() >= deadline
            code = self._live(None if quiet else deadline)
            self.endings[code] += 1
            said = (self.folder / "output.txt").read_text()
            if "Traceback" in said:
                raise AssertionError(f"{said[-5000:]}\nafter {dict(self.faults)}")
            if self._is_over() and any(self.folder.glob("outputs/*/*/metrics.json")):
                return the_run(self.folder)
            # Ending takes a moment in which the signal that spoils a weight is no longer handled.
            if code not in (0, 2, 130, -signal.SIGKILL, -signal.SIGRTMIN) or (quiet and code):
                raise AssertionError(f"{said[-5000:]}\nended with {code} after {dict(self.faults)}")
            if not quiet:
                self._damage()

    def _is_over(self) -> bool:
        logs = list(self.folder.glob("outputs/*/*/train.log"))
        return bool(logs) and "all epochs are done" in logs[0].read_text()

    def _live(self, deadline: float | None) -> int:
        """Run one process with faults until one of them ends it; return its exit code."""
        process = self.start()
        watched, life = psutil.Process(process.pid), Life()
        self.lives.append(life)
        epochs = self._count(" done: ")
        began = self._wait_for_updates(process)
        while process.poll() is None:
            pause = time.monotonic() + self.random.uniform(*_PAUSE)
            while time.monotonic() < pause and process.poll() is None:
                # The first validation and its pictures bring workers and fonts that stay.
                if self._count(" done: ") >= epochs + 2:
                    life.look(watched)
                time.sleep(0.1)
            if process.poll() is None and began and deadline is not None:
                if time.monotonic() >= deadline:
                    deadline = None
                else:
                    self._strike(process, epochs)
        return process.wait()

    def _wait_for_updates(self, process: "subprocess.Popen[bytes]") -> bool:
        """Wait until this process trains: faults before that are those of `test_resume.py`."""
        updates = self._count(" update ")
        while process.poll() is None:
            if self._count(" update ") > updates:
                return True
            time.sleep(0.05)
        return False

    def _count(self, words: str) -> int:
        """Return how often train.log holds some words."""
        logs = self.folder.glob("outputs/*/*/train.log")
        return sum(path.read_text().count(words) for path in logs)

    def _strike(self, process: "subprocess.Popen[bytes]", epochs: int) -> None:
        choices = {
            "weight becomes NaN": lambda: process.send_signal(signal.SIGRTMIN),
            "disk full for a while": lambda: self._fill_disk(process),
            "SIGKILL": process.kill,
            "SIGKILL of the group": lambda: os.killpg(process.pid, signal.SIGKILL),
            "SIGTERM of the group": lambda: os.killpg(process.pid, signal.SIGTERM),
            "Ctrl-C": lambda: os.killpg(process.pid, signal.SIGINT),
            "worker killed": lambda: self._kill_worker(process),
        }
        # Workers that start on a full disk would find no shared memory either, which it has nothing to do with.
        full = 4 if self._count(" done: ") > epochs else 0
        fault = self.random.choices(list(choices), weights=[5, full, 1, 1, 1, 1, 1])[0]
        self.faults[fault] += 1
        try:
            choices[fault]()
        except (ProcessLookupError, psutil.Error):
            return  # it has just ended by itself
        if fault not in _SURVIVED:
            process.wait(timeout=300)

    def _fill_disk(self, process: "subprocess.Popen[bytes]") -> None:
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (_DISK, hard))
        time.sleep(self.random.uniform(0.2, 2.0))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    def _kill_worker(self, process: "subprocess.Popen[bytes]") -> None:
        workers = psutil.Process(process.pid).children()
        if workers:
            self.random.choice(workers).kill()

    def _damage(self) -> None:
        """Damage the last checkpoint in one of three ways, every third time."""
        paths = list(self.folder.glob("outputs/*/*/checkpoints/last.pt"))
        before = list(self.folder.glob("outputs/*/*/checkpoints/previous.pt"))
        if not paths or not before or self.random.random() > 1 / 3:
            return
        content = bytearray(paths[0].read_bytes())
        way = self.random.choice(["checkpoint cut short", "bit flipped", "checkpoint gone"])
        self.faults[way] += 1
        if way == "checkpoint gone":
            paths[0].unlink()
        elif way == "bit flipped":
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
            paths[0].write_bytes(content)
        else:
            paths[0].write_bytes(content[: self.random.randrange(len(content))])


def compare(run: Path, undisturbed: Path) -> list[str]:
    """Return what differs between two runs: weights of the last and the best state, and their averages."""
    differences = []
    for name, key in (("last.pt", "model"), ("last.pt", "ema"), ("best.pt", "model")):
        ends = [load_checkpoint(one / "checkpoints" / name) for one in (run, undisturbed)]
        if not same(ends[0][key], ends[1][key]):
            differences.append(f"{name}: {key}")
    return differences


def main() -> int:
    """Run both trainings, print what was done and what came out; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults")
    parser.add_argument("--epochs", type=int, default=0, help="0: enough for the minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    epochs = options.epochs or max(4, round(20 * options.minutes))

    with tempfile.TemporaryDirectory() as scratch:
        calm, rough = Path(scratch) / "calm", Path(scratch) / "rough"
        for folder in (calm, rough):
            folder.mkdir()
        reference, soak = (Soak(folder, options.seed, epochs) for folder in (calm, rough))
        start = time.monotonic()
        process = reference.start()  # beside the other: there are two cores
        try:
            run = soak.disturbed(60 * options.minutes)
            seconds = time.monotonic() - start
            undisturbed = reference.undisturbed(process)
        finally:
            process.kill()
        print(f"{epochs} epochs in {seconds:.0f} s and {len(soak.lives)} processes")
        for fault, count in sorted(soak.faults.items()):
            print(f"  {count:4d} × {fault}")
        print(f"  endings: {dict(soak.endings)}")
        differences = compare(run, undisturbed)
        growth = [found for life in soak.lives if (found := life.growth()) is not None]
        if not growth or not soak.faults:
            print("too short: no fault struck, or no process lived long enough to show its growth")
            return 1
        memory, files, shared = (max(one[part] for one in growth) for part in range(3))
        longest = max(len(life.memory) for life in soak.lives) / 10
        print(
            f"growth in one of {len(growth)} lives (longest {longest:.0f} s): {memory:.1f} MiB, {files} open files, "
            f"{shared} in shared memory"
        )
        print(f"differences: {', '.join(differences) or 'none, bit for bit'}")
        if differences:
            print((run / "train.log").read_text())
        grown = memory > _GROWTH_MIB or files > _MORE_FILES or shared > _MORE_SHARED
        return int(bool(differences) or grown)


if __name__ == "__main__":
    sys.exit(main())
