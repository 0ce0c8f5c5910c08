"""What evaluate.py leaves: masks, overlays, tables and pictures in one folder."""

import io
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from segfit.engine.findings import Findings
from segfit.errors import SegFitError
from segfit.report.files import files_of, write_json
from segfit.system.files import atomic_write
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.pictures import Panel, Picture, overlay, worst_cases_image

KIND = "evaluation"
METRICS, WORST, MASKS, OVERLAYS = "metrics.json", "worst.png", "masks", "overlays"
# What is written, in the order in which it is shown.
OURS = (METRICS, "per_class.csv", "confusion_matrix.png", "worst.csv", WORST, MASKS, OVERLAYS)
_THREADS = 4
_JPEG_QUALITY = 90


class EvaluationFolder:
    """The folder of one evaluation. Files of an earlier one are replaced, never those of somebody else.

    Args:
        path: made if need be.
        classes: names and colours.

    Raises:
        SegFitError: if the folder holds files under our names that evaluate.py did not write, or can't be made.
    """

    def __init__(self, path: Path, classes: Classes) -> None:
        self.path, self.classes = path, classes
        self._palette = np.zeros((256, 3), np.uint8)
        self._palette[: len(classes)] = classes.colors
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        self._refuse_foreign()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SegFitError(f"out={path}: cannot be made ({error.strerror}).") from error

    def _refuse_foreign(self) -> None:
        there = [name for name in OURS if os.path.lexists(self.path / name)]
        if there and not _is_evaluation(self.path / METRICS):
            raise SegFitError(
                f"out={self.path}: {', '.join(there)} in it would be replaced, and evaluate.py did not write "
                f"{'it' if len(there) == 1 else 'them'}. Choose another folder."
            )

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write metrics.json; written first, it marks the folder as an evaluation's.

        Raises:
            SegFitError: if it cannot be written.
        """
        try:
            write_json(self.path / METRICS, {"kind": KIND, **values})
        except OSError as error:
            raise _unwritable(self.path / METRICS, error) from error

    def written(self) -> list[Path]:
        """Return the files and folders that are there."""
        return [self.path / name for name in OURS if (self.path / name).exists()]

    def save_prediction(self, name: str, mask: Picture, image: Callable[[], Picture]) -> None:
        """Write `masks/<name>.png` and `overlays/<name>.jpg`, in threads: encoding lets go of Python's lock.

        Args:
            name: the image's id; folders in it are kept.
            mask: (H, W) uint8 class indices.
            image: gives the image (H, W, 3) uint8 RGB.

        Raises:
            SegFitError: if an earlier one could not be written, or a name leads out of the folder.
        """
        files = self._file(MASKS, f"{name}.png"), self._file(OVERLAYS, f"{name}.jpg")
        self._pending.append(self._pool.submit(self._encode, *files, mask, image))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()

    def finish_predictions(self) -> None:
        """Wait until all is written.

        Raises:
            SegFitError: if something could not be.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Let go of the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def save_findings(self, findings: Findings) -> None:
        """Write a CSV file a table and a PNG file a figure.

        Raises:
            SegFitError: if they cannot be written.
        """
        for name, content in files_of(findings):
            self._write(self.path / name, content)

    def save_worst(self, panels: Sequence[Panel], captions: Sequence[str]) -> None:
        """Write worst.png; without panels, nothing.

        Raises:
            SegFitError: if it cannot be written.
        """
        if panels:
            picture = Image.fromarray(worst_cases_image(panels, self.classes, captions))
            self._write(self.path / WORST, _encoded(picture, "PNG"))

    def _encode(
        self, mask_file: Path, overlay_file: Path, mask: Picture, image: Callable[[], Picture]
    ) -> None:
        indices = Image.fromarray(mask)
        indices.putpalette(self._palette.tobytes())
        self._write(mask_file, _encoded(indices, "PNG"))
        blended = Image.fromarray(overlay(image(), mask, self.classes))
        self._write(overlay_file, _encoded(blended, "JPEG", quality=_JPEG_QUALITY))

    def _file(self, folder: str, name: str) -> Path:
        """Return where a prediction goes."""
        relative = PurePosixPath(name)
        path = self.path / folder / relative
        if relative.is_absolute() or ".." in relative.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path / folder}.")
        return path

    def _write(self, path: Path, content: bytes) -> None:
        try:
            with atomic_write(path, sync=False) as file:
                file.write(content)
        except OSError as error:
            raise _unwritable(path, error) from error


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _is_evaluation(metrics: Path) -> bool:
    try:
        values = json.loads(metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("kind") == KIND


def _unwritable(path: Path, error: OSError) -> SegFitError:
    return SegFitError(f"cannot write {path}: {error.strerror or error}.")
