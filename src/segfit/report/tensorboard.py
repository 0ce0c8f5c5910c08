"""The training as TensorBoard shows it."""

import io
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary

from segfit.engine.events import EndLog, EpochLog, RunInfo
from segfit.engine.findings import Findings
from segfit.errors import SegFitError
from segfit.report.files import image_of, png
from segfit.report.loggers import COMPLETE, Logger
from segfit.report.text import one_line

_PICTURE_SHARE = 0.02  # of the wall-clock time may go into drawing, while the device is idle


def _ignore_writer_thread(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writing thread: the next call to it raises the same."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


threading.excepthook = _ignore_writer_thread


class TensorBoardLogger(Logger):
    """Writes one TensorBoard run; the x axis is the number of updates.

    TensorBoard sorts groups of tags by name, which is why loss and scores come first. Beside the tags of `Loggers`:

    - score_best/<name>: of the best validation so far, shown in the HPARAMS tab
    - validation/<figure>, validation/panel/<sample>: images
    - config, facts: texts

    The HPARAMS tab shows one row a run, from the first validation on; with the parent folder as logdir, a sweep is
    one table. Images come with the first and the last validation, and with those between as long as drawing takes
    no more than 2 % of the time. Everything else is on disk when a method returns, so a killed run loses nothing
    of it.

    Args:
        hparams: what the HPARAMS tab has columns for. Runs that are to be compared need the same keys:
            TensorBoard takes the columns from one of them.
        resume_step: updates of the checkpoint that the run resumes from; None for a new run. Whatever
            the folder holds of later updates is hidden, so that no step appears twice.

    Raises:
        SegFitError: if the folder cannot be written.
    """

    def __init__(
        self,
        log_dir: Path,
        config_text: str,
        hparams: Mapping[str, float | str | bool],
        resume_step: int | None = None,
    ) -> None:
        self._config_text = config_text
        # torch writes a bool as a number
        flags = {k: str(v).lower() for k, v in hparams.items() if isinstance(v, bool)}
        self._hparams = {**hparams, **flags}
        self._best_written: dict[str, float] = {}
        self._undrawn: tuple[Findings, int] | None = None
        self._begun, self._drawing = time.monotonic(), 0.0
        self._session_step = 0 if resume_step is None else resume_step + 1
        self._resume_step = resume_step
        try:
            # A run that was killed between logging and saving logs the checkpoint's own step again.
            self._known = _tags_at(log_dir, resume_step) if resume_step is not None else set()
            # A new run marks its start too: TensorBoard takes the first mark of a folder for the start,
            # and only those after it for a resumption that hides what it replaces.
            self._writer = SummaryWriter(str(log_dir), purge_step=self._session_step)
            self._writer.flush()
        except OSError as error:
            raise SegFitError(
                f"{log_dir}: cannot write TensorBoard events: {error.strerror}. "
                f"Make the folder writable, or set report.logger=[]."
            ) from error

    def start(self, info: RunInfo) -> None:
        """Write the config, the facts and the row of the HPARAMS tab."""
        step = self._session_step
        self._writer.add_text("config", f"```yaml\n{self._config_text.rstrip()}\n```", step)
        self._writer.add_text("facts", _markdown_table(info.facts), step)
        _, session_start, _ = hparams_summary(self._hparams, {})
        self._add(session_start)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Write the numbers that are not there yet."""
        for tag, value in values.items():
            if self._is_new(tag, update):
                self._writer.add_scalar(tag, value, update)
        self._writer.flush()

    def epoch(self, log: EpochLog) -> None:
        """Draw the pictures of a validation, and note the best scores."""
        if log.result is None:
            return
        self._undrawn = (log.result, log.update)
        if self._drawing <= _PICTURE_SHARE * (time.monotonic() - self._begun):
            self._draw(log.result, log.update)
        if log.is_best:
            self._best(log.result.scores, log.update)
        self._writer.flush()

    def end(self, log: EndLog) -> None:
        """Write the final scores; mark the row in the HPARAMS tab as done, unless to be resumed."""
        if self._undrawn is not None:
            self._draw(*self._undrawn)
        self._best(log.best_scores, log.updates)
        if log.reason in COMPLETE:
            *_, session_end = hparams_summary({}, {})
            self._add(session_end)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        with suppress(OSError):
            self._writer.close()

    def _draw(self, result: Findings, update: int) -> None:
        start = time.monotonic()
        for name, picture in result.panels.items():
            self._image(f"validation/panel/{name}", partial(_jpeg, picture), update)
        for name, figure in result.figures.items():
            self._image(f"validation/{name}", partial(png, figure), update)
        self._drawing += time.monotonic() - start
        self._undrawn = None

    def _best(self, scores: Mapping[str, float], update: int) -> None:
        finite = {name: value for name, value in scores.items() if math.isfinite(value)}
        if not finite or finite == self._best_written:
            return
        metrics = {f"score_best/{name}": value for name, value in finite.items()}
        if not self._best_written:
            experiment, *_ = hparams_summary(self._hparams, metrics)
            self._add(experiment)
        self._best_written = finite
        self.scalars(metrics, update)

    def _image(self, tag: str, encoded: Callable[[], bytes], update: int) -> None:
        if self._is_new(tag, update):
            value = Summary.Value(tag=tag, image=image_of(encoded()))
            self._add(Summary(value=[value]), update)

    def _is_new(self, tag: str, update: int) -> bool:
        return update != self._resume_step or tag not in self._known

    def _add(self, summary: Summary, update: int | None = None) -> None:
        # SummaryWriter has no public way to write a summary as it is: add_hparams would open a second
        # run for the row, add_image would encode the picture its own way.
        self._writer._get_file_writer().add_summary(summary, update)


def _jpeg(picture: Callable[[], NDArray[np.uint8]]) -> bytes:
    # add_image always writes PNG, which takes a photograph 30 times as long.
    encoded = io.BytesIO()
    Image.fromarray(picture()).save(encoded, "jpeg", quality=92, subsampling=0)
    return encoded.getvalue()


def _markdown_table(facts: Mapping[str, str]) -> str:
    cells = [(label, one_line(text).replace("|", "\\|")) for label, text in facts.items()]
    rows = [f"| {label} | {text} |" for label, text in cells]
    return "\n".join(["| fact | value |", "|---|---|", *rows])


def _tags_at(log_dir: Path, step: int) -> set[str]:
    """Return the tags that the folder's event files have at a step, as TensorBoard would show them."""
    tags: set[str] = set()
    for path in sorted(log_dir.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            purged = event.session_log.status == SessionLog.START and event.step <= step
            if event.HasField("session_log") and purged:
                tags.clear()
            if event.step == step:
                tags |= {value.tag for value in event.summary.value}
    return tags
