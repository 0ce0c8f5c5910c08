"""Score a trained run on a split of its data, or predict a folder of images."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from segfit.assembly.data import (
    loader_options,
    make_held_out_batches,
    make_skipping,
    workers_of,
)
from segfit.assembly.task import assembly_of
from segfit.commands.load_run import Notice, TrainedRun
from segfit.config.check import plain
from segfit.data.loader import Loader
from segfit.data.prefetch import DevicePrefetcher
from segfit.engine.evaluate import evaluate
from segfit.engine.findings import Column, Findings, Table
from segfit.errors import SegFitError
from segfit.report.text import duration, scores_text, shown_path
from segfit.runs.folder import RunFolder
from segfit.system.hardware import device_name
from segfit.tasks.segmentation.assembly import held_out_batch_size, make_predictor, make_task
from segfit.tasks.segmentation.data.collate import collate
from segfit.tasks.segmentation.data.dataset import LabelledSource
from segfit.tasks.segmentation.files import EvaluationFolder
from segfit.tasks.segmentation.pictures import Picture
from segfit.tasks.segmentation.predictions import Predictions
from segfit.tasks.segmentation.schema import COLUMNS
from segfit.tasks.segmentation.task import SegmentationTask

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Args:
        result: scores, tables and figures; empty for images without masks.
        facts: what was evaluated and how, as in metrics.json.
        written: the files and folders that were written.
    """

    result: Findings
    facts: dict[str, Any]
    written: Sequence[Path]

    def about(self) -> dict[str, str]:
        """Return label → text: what was evaluated and how."""
        facts = self.facts
        epoch = "" if facts["epoch"] is None else f" of epoch {facts['epoch'] + 1}"
        what, took = facts.get("split") or facts["folder"], duration(facts["seconds"])
        run = shown_path(Path(facts["run"]))
        return {
            "run": f"{run}, {facts['checkpoint']} checkpoint{epoch}",
            "images": f"{facts['images']} of {what}, {took}",
            "ran in": f"{facts['precision']} on {facts['device']}",
        }


# ----------------------------------------------------------------------- scores of a split


def evaluate_split(
    run: TrainedRun,
    options: DictConfig,
    notice: Notice,
    checking: Progress | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a run on a split of its data, and write everything down.

    With the run's own options, the scores are those that training logged for the checkpoint: the same batches,
    precision and class weights.

    Args:
        run: of `trained.load_run`.
        options: of evaluate.py, checked.
        notice: told what is odd about the data, and of memory that ran out, a line each.
        checking: called with (done, total) files while the data set is checked.
        progress: called with (done, total) batches.

    Raises:
        SegFitError: if there is no such split, the data set is broken, or results cannot be written.
    """
    extra = assembly_of(run.config).make_extra_metrics(run.config)
    source, statistics = _split(run, options.split, notice, checking)
    out = EvaluationFolder(_out(options, run.folder, options.split), run.classes)
    workers = min(workers_of(run.config, run.device), len(source))
    left_out, without = _noting(notice)
    batches = make_held_out_batches(run.config, source, run.device, workers, None, without)
    task = replace(_task(run, options, statistics), extra=extra)
    taker = _predictions(run, options, out, source.id, lambda index: source.read(index)[0])
    facts = {**_facts(run, options), "split": options.split, "images": len(source)}
    result = _pass(run, task, batches, taker, facts, progress, notice)
    facts |= {"images": len(source) - len(left_out), "left_out": left_out}
    worst = [(source.id(index), score) for index, score, _ in taker.worst()]
    if worst:
        columns = Column("image"), Column("mIoU", ".3f")
        result = replace(
            result, tables=[*result.tables, Table("worst", "Worst images", columns, worst)]
        )
    added = {name: name for one in extra for name in one.names}
    shown = {"loss": "loss", **COLUMNS, **added}
    result = replace(result, headline=scores_text(result.scores, shown))
    out.save_findings(result)
    out.save_worst(*taker.worst_panels(source))
    facts |= {"status": "finished", "seconds": result.seconds}
    out.write_metrics(
        {
            **facts,
            "scores": result.scores,
            **result.values,
            "worst": [{"id": name, "miou": score} for name, score in worst],
        }
    )
    return Evaluation(result, facts, out.written())


def _split(
    run: TrainedRun, split: str, notice: Notice, checking: Progress | None
) -> tuple[LabelledSource, dict[str, Any]]:
    """Return a checked split and the statistics that training had."""
    data = run.config.data
    if data.name == "folder" and not Path(data.root).expanduser().is_dir():
        raise SegFitError(
            f"{data.root}: the run's data set is not there. Say where it lies now: root=…"
        )
    assembly = assembly_of(run.config)
    sources = assembly.make_sources(run.config)
    if split not in sources:
        raise SegFitError(
            f"split={split}: the run's data have no such split. There are: {', '.join(sources)}."
        )
    try:
        statistics = assembly.recorded_statistics(run.config, run.recorded)
    except SegFitError as error:
        raise SegFitError(f"{RunFolder(run.folder).metrics}: {error}") from error
    counted = (
        {"train"} if statistics is None and assembly.statistics_need_train(run.config) else set()
    )
    looked_at = {name: source for name, source in sources.items() if name in {split, *counted}}
    report = assembly.check_sources(run.config, looked_at, {split: 1}, checking)
    for line in report.notices:
        notice(line)
    if statistics is None:
        statistics = assembly.make_statistics(run.config, sources, report)
    return cast(LabelledSource, sources[split]), statistics


# ------------------------------------------------------------------- images without masks


def predict_folder(
    run: TrainedRun,
    options: DictConfig,
    progress: Progress | None = None,
    notice: Notice = lambda _: None,
) -> Evaluation:
    """Predict the masks of a folder of images, at their original sizes (upright, as EXIF says).

    Args:
        run: of `trained.load_run`.
        options: of evaluate.py, checked; `images` is the folder.
        progress: called with (done, total) batches.
        notice: told of images that `data.on_bad_sample=skip` leaves out, and of memory that ran out.

    Raises:
        SegFitError: if there is no image, one is unreadable, or results cannot be written.
    """
    config = run.config
    dataset = assembly_of(config).make_predict_dataset(config, options.images)
    path = _out(options, run.folder, f"images-{dataset.folder.resolve().name}")
    if path.resolve().is_relative_to(dataset.folder.resolve()):
        raise SegFitError(
            f"out={path} lies in images={options.images}: next time its pictures would be predicted too. "
            "Choose a folder outside."
        )
    out = EvaluationFolder(path, run.classes)
    workers = min(workers_of(config, run.device), len(dataset))
    left_out, without = _noting(notice)
    loader = Loader(
        dataset,
        collate,
        run.device,
        loader_options(config, workers),
        make_skipping(config, without),
        batch_size=held_out_batch_size(config),
    )
    batches = DevicePrefetcher(loader, run.device)
    taker = _predictions(
        run, options, out, dataset.id, lambda index: dataset.reader(dataset.file(index))
    )
    facts = {**_facts(run, options), "folder": str(dataset.folder), "images": len(dataset)}
    result = _pass(run, _task(run, options, None), batches, taker, facts, progress, notice)
    facts |= {"images": len(dataset) - len(left_out), "left_out": left_out}
    facts |= {"status": "finished", "seconds": result.seconds}
    out.write_metrics(facts)
    return Evaluation(Findings(), facts, out.written())


# --------------------------------------------------------------------------- both of them


def _predictions(
    run: TrainedRun,
    options: DictConfig,
    out: EvaluationFolder,
    name: Callable[[int], str],
    image: Callable[[int], Picture],
) -> Predictions:
    return Predictions(
        out, name, image, len(run.classes), saves=options.save_masks, kept=options.worst
    )


def _task(
    run: TrainedRun, options: DictConfig, statistics: dict[str, Any] | None
) -> SegmentationTask:
    predictor = make_predictor(run.config, overlap=options.overlap, flip=options.flip)
    return make_task(run.config, run.device, statistics, predictor=predictor)


def _pass(
    run: TrainedRun,
    task: SegmentationTask,
    batches: DevicePrefetcher,
    taker: Predictions,
    facts: dict[str, Any],
    progress: Progress | None,
    notice: Notice,
) -> Findings:
    def between(done: int) -> None:
        if progress is not None:
            progress(done, len(batches))

    def lowered(size: int, told: str) -> None:
        facts["batch_size"] = size
        notice(told)

    taker.out.write_metrics({**facts, "status": "running"})
    try:
        task = replace(task, on_prediction=taker)
        result = evaluate(run.model, task, batches, run.precision, between, lowered=lowered)
        taker.out.finish_predictions()
    finally:
        taker.out.close()
    return result


def _noting(notice: Notice) -> tuple[list[str], Notice]:
    """Return the list of what will be told, and who tells it."""
    told: list[str] = []

    def note(line: str) -> None:
        told.append(line)
        notice(line)

    return told, note


def _out(options: DictConfig, run: Path, name: str) -> Path:
    """Return where results go: as given, or below the run."""
    if options.out is not None:
        return Path(options.out).expanduser()
    return RunFolder(run).evaluation / name


def _facts(run: TrainedRun, options: DictConfig) -> dict[str, Any]:
    classes = run.classes
    return {
        "run": os.fspath(run.folder.absolute()),
        "checkpoint": options.checkpoint,
        "epoch": run.epoch,
        "device": device_name(run.device),
        "precision": run.precision.name,
        "batch_size": held_out_batch_size(run.config),
        "classes": {
            "names": classes.names,
            "colors": classes.colors,
            "background": classes.background,
        },
        "options": plain(options),
    }
