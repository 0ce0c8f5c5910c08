"""A checked config → a training that ran and is written down; by one process, or several of torchrun's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segfit.assembly.task import assembly_of, planning_of
from segfit.assembly.training import Training, make_training, metrics_of
from segfit.engine.distributed import Distributed, joined
from segfit.engine.events import EndLog, Listener, Listeners
from segfit.engine.task import Batch
from segfit.report.console import WorkProgress, console_report, print_summary
from segfit.report.files import write_json
from segfit.report.loggers import run_listener
from segfit.report.page import run_page
from segfit.report.text import monitored_first, stdout_console
from segfit.runs.files import RunFolder
from segfit.runs.folder import save_config
from segfit.system.files import replace_text, reporting
from segfit.system.monitor import Monitor, summed_up

_DRAWN = 12  # samples of first_batch.png, at the most


def train(
    config: DictConfig, overrides: Sequence[str], folder: Path, *, resumed: bool = False
) -> EndLog:
    """Train; the last state is saved, whatever the reason to stop. Of several processes, the main one's folder counts.

    Raises a SegFitError if the training cannot be built, or cannot continue.
    """
    with joined(config.device) as distributed:
        folder = distributed.gather(folder)[0]
        if distributed.is_main:
            return _train_and_report(config, overrides, folder, distributed, resumed)
        training = make_training(config, folder, distributed.post, None, distributed, resumed)
        end = _unwritten_end(training, folder, distributed)
        return end or training.fit.run(Listeners(), training.facts)


def _train_and_report(
    config: DictConfig,
    overrides: Sequence[str],
    folder: Path,
    distributed: Distributed,
    resumed: bool,
) -> EndLog:
    terminal, notices = stdout_console(), list[str]()
    console, checking = console_report(terminal), WorkProgress(terminal)
    listeners: list[Listener] = [console]

    def notice(message: str) -> None:
        notices.append(message)
        for listener in listeners:
            listener.notice(message)

    try:
        training = make_training(config, folder, notice, checking, distributed, resumed)
    finally:
        checking.close()
    files, monitor = RunFolder(folder), Monitor()
    end = _unwritten_end(training, folder, distributed)
    if end is not None or training.fit.ended() is None:  # else it is refused, and stays as it is
        save_config(config, overrides, folder, resumed=resumed)
        if training.samples:
            with reporting(f"cannot write {files.samples}"):
                write_json(files.samples, training.samples)

    def drawn(batch: Batch, seed: int) -> Any:
        names = [Path(name).name for name in training.fit.train.names(batch)[:_DRAWN]]
        return planning_of(config).draw_batch(training.fit.task, batch, seed, names)

    listener = run_listener(
        files,
        console,
        config,
        training.hparams,
        monitor=monitor,
        first_batch=drawn if config.report.page else None,
        resume_step=training.fit.state.progress.update if resumed else None,
        notices=notices,
        posted=distributed.posted,
    )
    listeners[:] = [listener]
    try:
        if end is not None:
            listener.notice("this run is over; what was not written yet is written now.")
            listener.end(end)
        else:
            shown = {"unit": training.unit, "columns": training.columns}
            end = training.fit.run(listener, training.facts, **shown)
    finally:
        listener.close()  # an exception must leave no hidden cursor and no unwritten line
    with reporting(f"cannot write {files.metrics}"):
        device = summed_up(monitor.samples).mean
        write_json(files.metrics, {**metrics_of(training, end, config), "device": device})
    if config.report.page:
        with reporting(f"cannot write {files.page}"):
            replace_text(files.page, run_page(files, end.reason))
    print_summary(
        end,
        columns=monitored_first(config.monitor, training.columns),
        remark=assembly_of(config).remark(end.best_scores),
        files=files,
        console=terminal,
    )
    return end


def _unwritten_end(training: Training, folder: Path, distributed: Distributed) -> EndLog | None:
    """Return how a run ended that was killed between its last save and its metrics.json, None for others."""
    written = RunFolder(folder).metrics.exists()
    unwritten = distributed.gather(not written)[0]  # as the main process sees it
    return training.fit.ended() if unwritten else None
