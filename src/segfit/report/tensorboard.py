"""The training, and what a benchmark found, as TensorBoard shows them.

Importing this imports no torch, which takes longer than a remembered answer of `benchmark=plan`.
"""

import io
import math
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from segfit.engine.events import EndLog, EpochLog, RunInfo
from segfit.errors import SegFitError
from segfit.report.files import png
from segfit.report.lines import Pictures
from segfit.report.loggers import Logger
from segfit.report.panels import encoded
from segfit.report.text import one_line
from segfit.runs.files import COMPLETE


def _ignore_writer_thread(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writing thread: the next call to it raises the same."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


threading.excepthook = _ignore_writer_thread


class TensorBoardLogger(Pictures, Logger):
    """Writes one TensorBoard run; the x axis is the number of updates. Beside the tags of `Loggers`:

    - score_best/<name>: of the best validation so far, shown in the HPARAMS tab
    - validation/<figure>, validation/panel/<sample>: images, of the validations that `Pictures` draws
    - config, facts: texts

    The HPARAMS tab shows one row a run, from the first validation on, with columns for `hparams`; TensorBoard takes the columns
    from one of the runs. All but images is on disk when a method returns, so a killed run loses nothing of it. A run that
    resumes from a checkpoint after `resume_step` updates hides what the folder holds of later ones. Raises a SegFitError if
    the folder cannot be written.
    """

    def __init__(
        self,
        log_dir: Path,
        config_text: str,
        hparams: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        super().__init__()
        self._config_text = config_text
        # torch, which makes the row, takes no list and writes a bool as a number
        plain = (int, float, str)
        self._hparams = {k: v if type(v) in plain else f"{v}".lower() for k, v in hparams.items()}
        self._session_step = 0 if resume_step is None else resume_step + 1
        try:
            self._writer = EventFileWriter(str(log_dir))
            # A new run marks its start too: TensorBoard takes the first mark of a folder for the start, and only those after it
            # for a resumption that hides what it replaces.
            mark = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=self._session_step, session_log=mark))
            self._writer.flush()
        except OSError as error:
            raise SegFitError(
                f"{log_dir}: cannot write TensorBoard events: {error.strerror}. "
                f"Make the folder writable, or set report.logger=[]."
            ) from error

    def start(self, info: RunInfo) -> None:
        """Write the config, the facts and the row of the HPARAMS tab."""
        config = f"```yaml\n{self._config_text.rstrip()}\n```"
        cells = [(label, one_line(text).replace("|", "\\|")) for label, text in info.facts.items()]
        facts = "| fact | value |\n|---|---|\n" + "\n".join(f"| {a} | {b} |" for a, b in cells)
        _add(self._writer, self._session_step, _text("config", config), _text("facts", facts))
        _add(self._writer, 0, *self._row({})[1].value)
        self._writer.flush()

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Write the numbers."""
        _add(self._writer, update, *_numbers(values))
        self._writer.flush()

    def epoch(self, log: EpochLog) -> None:
        """Draw the pictures of a validation, and note the best scores."""
        super().epoch(log)
        if log.result is not None and log.is_best:
            known = {k: v for k, v in log.result.scores.items() if math.isfinite(v)}
            best = {f"score_best/{name}": value for name, value in known.items()}
            _add(self._writer, 0, *self._row(best)[0].value)
            self.scalars(best, log.update)
        self._writer.flush()

    def end(self, log: EndLog) -> None:
        """Mark the row in the HPARAMS tab as done, unless to be resumed."""
        super().end(log)
        if log.reason in COMPLETE:
            _add(self._writer, 0, *self._row({})[2].value)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        with suppress(OSError):
            self._writer.close()

    def draw(self, log: EpochLog) -> None:
        """Write the panels and figures of a validation."""
        assert log.result is not None
        pictures = {name: png(draw) for name, draw in log.result.figures.items()}
        for name, picture in log.result.panels.items():  # PNG takes a photograph 30 times as long
            pictures[f"panel/{name}"] = encoded(picture(), "jpeg", quality=92, subsampling=0)
        tagged = {f"validation/{name}": content for name, content in pictures.items()}
        _add(self._writer, log.update, *_images(tagged))

    def _row(self, metrics: Mapping[str, float]) -> tuple[Any, ...]:
        """Return what makes the row in the HPARAMS tab: its columns, its start and its end."""
        from torch.utils.tensorboard.summary import hparams

        return tuple(hparams(self._hparams, dict(metrics)))


def write_events(
    folder: Path, text: str, scalars: Mapping[str, float | None], images: Mapping[str, bytes]
) -> None:
    """Write one event file: `text` as code, scalars that are not None, encoded images."""
    indented = "\n".join("    " + line for line in text.splitlines())
    writer = EventFileWriter(str(folder))
    _add(writer, 0, _text("results", indented), *_numbers(scalars), *_images(images))
    writer.close()


def _add(writer: EventFileWriter, step: int, *values: Summary.Value) -> None:
    event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
    writer.add_event(event)


def _numbers(scalars: Mapping[str, float | None]) -> list[Summary.Value]:
    known = {tag: value for tag, value in scalars.items() if value is not None}
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]


def _text(name: str, text: str) -> Summary.Value:
    about = create_summary_metadata(display_name=None, description=None)
    tensor = make_tensor_proto([text])
    return Summary.Value(tag=f"{name}/text_summary", metadata=about, tensor=tensor)


def _images(files: Mapping[str, bytes]) -> list[Summary.Value]:
    values = []
    for tag, content in files.items():
        with Image.open(io.BytesIO(content)) as image:
            width, height, channels = *image.size, len(image.getbands())
        picture = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=content
        )
        values.append(Summary.Value(tag=tag, image=picture))
    return values
