"""What an evaluation keeps of its pictures: each restored one as a file, and the worst to be seen."""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from segfit.engine.extra_metrics import ExtraMetric
from segfit.engine.findings import Column, Findings, Table
from segfit.errors import SegFitError
from segfit.report.evaluation import Evaluation
from segfit.tasks.restoration.assembly import degraded_by, make_task
from segfit.tasks.restoration.data.dataset import PredictDataset
from segfit.tasks.restoration.data.reading import png
from segfit.tasks.restoration.pictures import Panel, draw, panel_of
from segfit.tasks.restoration.task import RestorationTask, Restored

WORST, RESTORED = "worst.png", "restored"
_NAMES = ("scores.csv", "worst.csv", WORST, RESTORED)
_THREADS = 4


def make_evaluation(
    config: DictConfig,
    device: torch.device,
    options: DictConfig,
    path: Path,
    data: Any,
    statistics: Mapping[str, Any] | None,  # noqa: ARG001
    extra: Sequence[ExtraMetric] = (),
) -> "PictureEvaluation":
    """Return what scores a run's restored pictures and writes them down.

    Args:
        config: the run's.
        device: where batches lie.
        options: of evaluate.py.
        path: the folder of the evaluation.
        data: a source, or a `PredictDataset`.
        statistics: nothing.
        extra: of `make_extra_metrics`.
    """
    task = replace(make_task(config, device, extra=extra), overlap=options.overlap)
    facts = {"degraded_by": degraded_by(config), "metrics": dict(task.scores)}
    facts = {} if isinstance(data, PredictDataset) else facts
    return PictureEvaluation(path, task, facts, data, saves=options.save_images, kept=options.worst)


class PictureEvaluation(Evaluation):
    """Keeps every restored picture as a PNG of its input's depth, and a part of those with the lowest PSNR.

    Args:
        path: the folder.
        task: scores the pictures.
        facts: for metrics.json.
        data: their names by index.
        saves: whether restored pictures are written.
        kept: how many of the worst are kept.
    """

    def __init__(
        self,
        path: Path,
        task: RestorationTask,
        facts: Mapping[str, Any],
        data: Any,
        *,
        saves: bool,
        kept: int,
    ) -> None:
        super().__init__(path, replace(task, on_picture=self._keep), facts, _NAMES)
        self.data, self.saves, self.kept = data, saves, kept
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        # (-PSNR, -index, its panel): the heap's first is the best of the worst, which is dropped first.
        self._heap: list[tuple[float, int, Panel]] = []

    def finish(self, result: Findings) -> Findings:
        """Wait until all pictures are written; add the worst to the tables."""
        while self._pending:
            self._pending.popleft().result()
        if isinstance(self.data, PredictDataset):
            return Findings(seconds=result.seconds)
        ranked = sorted(self._heap, key=lambda item: item[:2], reverse=True)
        rows = [(panel.name, -score) for score, _, panel in ranked]
        if rows:
            captions = [f"{name}: {score:.2f} dB" for name, score in rows]
            picture = draw([panel for *_, panel in ranked], captions)
            self.write(self.path / WORST, png(picture))
            columns = Column("picture"), Column("PSNR", ".2f")
            tables = [*result.tables, Table("worst", "Worst pictures", columns, rows)]
            result = replace(result, tables=tables)
        worst = [{"id": name, "psnr": score} for name, score in rows]
        return super().finish(replace(result, values={**result.values, "worst": worst}))

    def close(self) -> None:
        """Release the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _keep(self, found: Restored) -> None:
        """Take a restored picture; see `RestorationTask.on_picture`."""
        index, name = found.number, self.data.id(found.number)
        if self.saves:
            self._save(name, found.restored, deep=found.deep)
        if found.target is None or found.psnr is None or not self.kept:
            return
        psnr = float(found.psnr)  # synchronises: only the worst pictures are kept
        known = any(-index == other for _, other, _ in self._heap)  # repeated after out-of-memory
        if known or (len(self._heap) == self.kept and (-psnr, -index) < self._heap[0][:2]):
            return
        panel = panel_of(name, found.degraded, found.restored, found.target)
        item = (-psnr, -index, panel)
        if len(self._heap) < self.kept:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def _save(self, name: str, picture: Tensor, *, deep: bool) -> None:
        """Write `restored/<name>.png`, in threads: compressing releases Python's lock.

        Raises:
            SegFitError: if an earlier one could not be written, or a name leads out of the folder.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path}.")
        file, kind = self.path / RESTORED / f"{relative}.png", np.uint16 if deep else np.uint8
        levels = picture.clamp(0, 1).mul(np.iinfo(kind).max).round()
        pixels = levels.permute(1, 2, 0).cpu().numpy().astype(kind)  # synchronises
        self._pending.append(self._pool.submit(lambda: self.write(file, png(pixels))))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()
