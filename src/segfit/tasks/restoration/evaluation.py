"""What an evaluation keeps of its pictures: each restored one as a file, and the worst to be seen."""

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

WORST, RESTORED = "worst.png", "restored"
_NAMES = ("scores.csv", "worst.csv", WORST, RESTORED)
_THREADS = 4


class PictureEvaluation(Evaluation):
    """Keeps every restored picture as a PNG of its input's depth, and a part of those with the lowest PSNR.

    Made as `TaskEvaluation.make_evaluation` says: of the run's config and the options of evaluate.py.
    """

    def __init__(
        self,
        config: DictConfig,
        device: torch.device,
        options: DictConfig,
        path: Path,
        data: Any,
        statistics: Mapping[str, Any] | None,  # noqa: ARG002
        extra: Sequence[ExtraMetric] = (),
    ) -> None:
        task = make_task(config, device, extra=extra)
        task = replace(task, overlap=options.overlap, on_picture=self._keep)
        facts = {"degraded_by": degraded_by(config), "metrics": dict(task.scores)}
        super().__init__(path, task, {} if isinstance(data, PredictDataset) else facts, _NAMES)
        self.data, self.saves, self.kept = data, options.save_images, options.worst
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        self._worst: dict[int, tuple[float, Panel]] = {}  # index → PSNR, what is shown

    def finish(self, result: Findings) -> Findings:
        """Wait until all pictures are written; add the worst to the tables."""
        while self._pending:
            self._pending.popleft().result()
        if isinstance(self.data, PredictDataset):
            return Findings(seconds=result.seconds)
        ranked = [self._worst[index] for index in sorted(self._worst, key=self._rank)]
        rows = [(panel.name, score) for score, panel in ranked]
        if rows:
            captions = [f"{name}: {score:.2f} dB" for name, score in rows]
            picture = draw([panel for _, panel in ranked], captions)
            self.write(self.path / WORST, png(picture))
            columns = Column("picture"), Column("PSNR", ".2f")
            tables = [*result.tables, Table("worst", "Worst pictures", columns, rows)]
            result = replace(result, tables=tables)
        worst = [{"id": name, "psnr": score} for name, score in rows]
        return super().finish(replace(result, values={**result.values, "worst": worst}))

    def close(self) -> None:
        """Release the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _keep(
        self, index: int, degraded: Tensor, restored: Tensor, target: Tensor | None,
        psnr: Tensor | None, deep: bool,
    ) -> None:  # fmt: skip
        """Take a restored picture; see `RestorationTask.on_picture`."""
        name = self.data.id(index)
        if self.saves:
            self._save(name, restored, deep)
        if target is None or psnr is None or not self.kept:
            return
        score = float(psnr)  # synchronises: only the worst pictures are kept
        worst = [self._rank(other) for other in self._worst]
        if len(worst) == self.kept and (score, index) > max(worst):
            return
        self._worst[index] = score, panel_of(name, degraded, restored, target)
        if len(self._worst) > self.kept:
            del self._worst[max(self._worst, key=self._rank)]

    def _rank(self, index: int) -> tuple[float, int]:
        return self._worst[index][0], index

    def _save(self, name: str, picture: Tensor, deep: bool) -> None:
        """Write `restored/<name>.png`, in threads: compressing releases Python's lock. Raises what an earlier one raised."""
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path}.")
        file, kind = self.path / RESTORED / f"{relative}.png", np.uint16 if deep else np.uint8
        levels = picture.clamp(0, 1).mul(np.iinfo(kind).max).round()
        pixels = levels.permute(1, 2, 0).cpu().numpy().astype(kind)  # synchronises
        self._pending.append(self._pool.submit(lambda: self.write(file, png(pixels))))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()


make_evaluation = PictureEvaluation
