"""The listeners of one training run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from segfit.engine.events import Listener, Listeners
from segfit.errors import SegFitError
from segfit.report.lines import LogFile, ScoresFile
from segfit.system.monitor import Monitor


class RunFiles(Protocol):
    """What a run writes; `segfit.runs.folder.RunFolder` knows where."""

    log: Path
    scores: Path
    tensorboard: Path


def run_listener(
    files: RunFiles,
    console: Listener,
    config_text: str | None,
    hparams: Mapping[str, str | float | bool],
    *,
    resume_step: int | None = None,
    notices: Sequence[str] = (),
    posted: Callable[[], list[str]] = lambda: [],
) -> Listeners:
    """Return console, log file, scores file and, unless `config_text` is None, a `TensorBoardReport`.

    The log file also gets `notices`, which the console has shown before. `posted` returns the new notices of other
    processes; each is shown and logged once.
    """
    log = LogFile(files.log)
    for line in notices:
        log.notice(line)
    shown = Listeners(console, log)
    parts = [console, log, ScoresFile(files.scores), _Posted(posted, shown, notices)]
    if config_text is not None:
        parts += _tensorboard(files.tensorboard, config_text, hparams, resume_step, shown.notice)
    return Listeners(*parts)


class _Posted(Listener):
    """A listener that passes on the notices of other processes, each once, when the loop logs."""

    def __init__(
        self, posted: Callable[[], list[str]], listener: Listener, known: Sequence[str]
    ) -> None:
        self._posted, self._listener, self._known = posted, listener, set(known)

    def notice(self, message: str) -> None:
        self._known.add(message)

    def _pass_on(self, _event: object) -> None:
        for line in self._posted():
            if line not in self._known:
                self._known.add(line)
                self._listener.notice(line)

    start = log = epoch = end = _pass_on  # type: ignore[assignment]


def _tensorboard(
    folder: Path,
    config_text: str,
    hparams: Mapping[str, str | float | bool],
    resume_step: int | None,
    notice: Callable[[str], None],
) -> list[Listener]:
    """Return TensorBoard's listener with a monitor; nothing but a notice where events cannot be written."""
    try:
        from segfit.report.tensorboard import TensorBoardReport

        return [TensorBoardReport(folder, config_text, hparams, resume_step, Monitor(), notice)]
    except SegFitError as error:
        notice(str(error))
    except Exception as error:  # not there, or at odds with protobuf or NumPy
        notice(
            f"TensorBoard cannot be imported ({type(error).__name__}: {error}): training continues without it. "
            f"pip install tensorboard, or set report.tensorboard=false."
        )
    return []
