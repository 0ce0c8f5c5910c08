"""Measures one setting after the other within a limit of time, and remembers what is kept."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.errors import SegFitError
from segfit.tuning.bench import Bench
from segfit.tuning.measure import Speed
from segfit.tuning.settings import LEAST_GAIN, Setting
from segfit.tuning.trial import Outcome

COMPOSED, RESULT = Setting("as composed"), "result"
SURPASSED = "another is faster still"
KEPT, NOT_FASTER, NO_TIME, OUT_OF_MEMORY = "kept", "not faster", "no time left", "out of memory"

# Seconds, or times the first trial: what is not done then is left out.
_PATIENCE, _PATIENCE_TIMES = 60.0, 4.0


@dataclass
class Attempt:
    """A setting that was tried on top of those that were kept before it.

    Args:
        setting: the change.
        verdict: "kept", or why not.
        speed: None if it was not measured to the end.
        facts: of the training that was measured.
    """

    setting: Setting
    verdict: str
    speed: Speed | None = None
    facts: Mapping[str, str] | None = None

    @property
    def rate(self) -> float | None:
        """Images a second."""
        return None if self.speed is None else self.speed.samples_per_second


class Attempts:
    """Tries settings of a config, each in a process of its own.

    Args:
        config: checked, of benchmark.py.
        bench: told what is tried.
        trial: `run_trial`.
        seconds: of a measurement.
        deadline: by `time.monotonic`; whatever still runs then is killed.
    """

    def __init__(
        self,
        config: DictConfig,
        bench: Bench,
        trial: Callable[..., Outcome],
        *,
        seconds: float,
        deadline: float,
    ) -> None:
        self.composed = config
        self.bench = bench
        self.trial = trial
        self.seconds = seconds
        self.deadline = deadline
        self.made: list[Attempt] = []
        self.changes: dict[str, Any] = {}
        self.best: float | None = None  # images a second of what is kept
        self._longest = self._patience = 0.0

    def config(self, changes: Mapping[str, Any] | None = None) -> DictConfig:
        """Return the composed config with changes; None: those that are kept."""
        changed = self.composed.copy()
        for key, value in (self.changes if changes is None else changes).items():
            OmegaConf.update(changed, key, value)
        return changed

    def left(self) -> float:
        """Return the seconds that are left for trying settings, what `close` takes put aside."""
        return self.deadline - time.monotonic() - 2 * self._closing()

    def first(self) -> Attempt:
        """Measure the config as it is composed; what does not fit is no error, what cannot be built is.

        Raises:
            SegFitError: if it cannot be trained for another reason than memory.
        """
        attempt = self._measured(COMPOSED, {}, self.seconds, self.left())
        if attempt.speed is None and attempt.verdict != OUT_OF_MEMORY:
            raise SegFitError([f"the composed training does not run: {attempt.verdict}"])
        self._patience = max(_PATIENCE, _PATIENCE_TIMES * self._longest)
        if attempt.speed is not None:
            attempt.verdict = KEPT
            self.best = attempt.rate
        return attempt

    def attempt(self, setting: Setting) -> float | None:
        """Measure a setting on top of what is kept; None if it cannot be trained, or there is no time for it."""
        now = self.config()
        if self.best is not None and all(
            OmegaConf.select(now, key) == value for key, value in setting.changes.items()
        ):
            return self.best
        if self.left() < self._longest:
            self.made.append(Attempt(setting, NO_TIME))
            return None
        patience = min(self.left(), self._patience)
        changes = {**self.changes, **setting.changes}
        attempt = self._measured(setting, changes, self.seconds, patience)
        if setting.changes.get("compile") and attempt.facts and attempt.facts["compiled"] == "no":
            attempt.verdict, attempt.speed = "torch.compile failed", None
        return attempt.rate

    def keep(self, setting: Setting, rate: float) -> None:
        """Let all further settings stand on this one."""
        changes = {**self.changes, **setting.changes}
        self.changes = {
            key: value
            for key, value in changes.items()
            if OmegaConf.select(self.composed, key) != value
        }
        self.best = rate
        for attempt in self.made:
            if attempt.setting == setting and attempt.speed is not None:
                attempt.verdict = KEPT

    def climb(self, settings: Iterable[Setting]) -> bool:
        """Try settings one after the other, keep each that is faster; say whether one was."""
        kept = False
        for setting in settings:
            rate = self.attempt(setting)
            if rate is not None and rate >= LEAST_GAIN * (self.best or 0.0):
                self.keep(setting, rate)
                kept = True
        return kept

    def close(self) -> tuple[float | None, float | None]:
        """Measure the composed config and the result once more, longer, one right after the other.

        What was chosen as the fastest of many was lucky, too; and machines that others use change within minutes.

        Returns:
            Images a second of both; None if the one does not fit, or time ran out.
        """
        if self.made[0].speed is None or not self.changes:
            return self.made[0].rate, self.best
        rates = []
        for setting, changes in ((COMPOSED, {}), (Setting(RESULT, self.changes), self.changes)):
            left = max(self.deadline - time.monotonic(), 1.0)
            attempt = self._measured(
                Setting(f"{setting.name}, once more"), changes, 2 * self.seconds, left
            )
            rates.append(attempt.rate)
            attempt.verdict = "to compare" if attempt.speed is not None else attempt.verdict
        return rates[0], rates[1]

    def _closing(self) -> float:
        return self._longest + self.seconds

    def _measured(
        self, setting: Setting, changes: Mapping[str, Any], seconds: float, timeout_s: float
    ) -> Attempt:
        done = len(self.made)
        self.bench.progress(setting.name, done, max(12, done + 2))
        begun = time.monotonic()
        outcome = self.trial(
            self.config(changes),
            job="train_speed",
            timeout_s=max(timeout_s, 1.0),
            seconds=seconds,
            warmup=self.composed.benchmark.warmup,
        )
        if outcome.ok:
            taken = time.monotonic() - begun - seconds + self.seconds
            self._longest = max(self._longest, taken)
        attempt = _attempt(setting, outcome)
        self.made.append(attempt)
        return attempt


def _attempt(setting: Setting, outcome: Outcome) -> Attempt:
    if not outcome.ok:
        verdict = OUT_OF_MEMORY if outcome.reason == "oom" else outcome.message
        return Attempt(setting, verdict)
    speed = Speed(**outcome.values["speed"])
    return Attempt(setting, NOT_FASTER, speed, outcome.values["facts"])
