"""The listeners of one training run."""

from collections.abc import Callable, Mapping, Sequence

from segfit.engine.events import Listener, Listeners
from segfit.errors import SegFitError
from segfit.report.curves import CurvesFile
from segfit.report.files import RunFiles
from segfit.report.lines import LogFile, ScoresFile
from segfit.report.loggers import CsvLogger, Logger, Loggers, MlflowLogger, WandbLogger
from segfit.system.monitor import Monitor


def run_listener(
    files: RunFiles,
    console: Listener,
    loggers: Sequence[str],
    config_text: str,
    hparams: Mapping[str, str | float | bool],
    *,
    monitor: Monitor | None = None,
    page: bool = False,
    resume_step: int | None = None,
    notices: Sequence[str] = (),
    posted: Callable[[], list[str]] = lambda: [],
) -> Listeners:
    """Return console, log file, scores file, with `page` curves.png, and `loggers` by the names in `report.logger`.

    The log file also gets `notices`, which the console has shown before. `posted` returns the new notices of other
    processes; each is shown and logged once.
    """
    log = LogFile(files.log)
    for line in notices:
        log.notice(line)
    shown = Listeners(console, log)
    parts = [console, log, ScoresFile(files.scores), _Posted(posted, shown, notices)]
    if page:
        parts.append(CurvesFile(files.scores, files.curves))
    made = _loggers(loggers, files, config_text, hparams, resume_step, shown.notice)
    parts.append(Loggers(made, monitor, shown.notice))
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


def _loggers(
    names: Sequence[str],
    files: RunFiles,
    config_text: str,
    hparams: Mapping[str, str | float | bool],
    resume_step: int | None,
    notice: Callable[[str], None],
) -> dict[str, Logger]:
    """Return loggers by the names that `report.logger` has; nothing but a notice of one that cannot be made."""

    def tensorboard() -> Logger:
        from segfit.report.tensorboard import TensorBoardLogger

        return TensorBoardLogger(files.tensorboard, config_text, hparams, resume_step)

    kinds: dict[str, Callable[[], Logger]] = {
        "tensorboard": tensorboard,
        "csv": lambda: CsvLogger(files.scalars),
        "wandb": lambda: WandbLogger(files.path, config_text),
        "mlflow": lambda: MlflowLogger(files.path, hparams),
    }
    made: dict[str, Logger] = {}
    for name in names:
        try:
            made[name] = kinds[name]()
        except SegFitError as error:
            notice(str(error))
        except Exception as error:  # not installed, or at odds with protobuf or NumPy; no server
            notice(
                f"report.logger={name} cannot be used ({type(error).__name__}: {error}): training continues without it. "
                f"pip install {name}, or leave it away."
            )
    return made
