"""Score a trained run on a split of its data, or predict a folder without targets."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from segfit.assembly.data import batches_in_order, workers_of
from segfit.assembly.earlier import Notice, differences, kept_splits, read_samples, samples_of
from segfit.assembly.task import assembly_of, evaluation_of
from segfit.commands.load_run import TrainedRun, load_runs
from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.data.images import FAINT
from segfit.data.source import some
from segfit.data.splits import groups_of
from segfit.engine.evaluate import evaluate
from segfit.engine.findings import Findings
from segfit.errors import SegFitError, raise_all
from segfit.report.evaluation import Evaluation, summed, with_intervals
from segfit.report.files import write_json
from segfit.report.page import run_page
from segfit.report.text import duration, scores_text, shown_path
from segfit.runs.files import RunFolder
from segfit.runs.folder import load_named
from segfit.system.files import replace_text, reporting
from segfit.system.hardware import device_name

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found and wrote."""

    result: Findings  # empty for samples without targets
    facts: dict[str, Any]  # what was evaluated and how, as in metrics.json
    written: list[Path]  # files and folders

    def about(self) -> dict[str, str]:
        """Return label → text: what was evaluated and how."""
        facts = self.facts
        epoch = "" if facts["epoch"] is None else f" of epoch {facts['epoch'] + 1}"
        what, took = facts.get("split") or facts["folder"], duration(facts["seconds"])
        run = shown_path(Path(facts["run"]))
        run += f" and {len(facts['others'])} more, averaged" if facts["others"] else ""
        return {
            "run": f"{run}, {facts['checkpoint']} checkpoint{epoch}",
            "samples": f"{facts['samples']} of {what}, {took}",
            "ran in": f"{facts['precision']} on {facts['device']}",
        }


@dataclass(frozen=True)
class _Pass:
    """A run's pass over samples, before it begins."""

    run: TrainedRun
    options: DictConfig
    evaluation: Evaluation
    dataset: Any
    about: dict[str, Any]  # what the samples are, for metrics.json
    names: Sequence[str] = ()  # of samples with targets
    group: str | None = None  # as `SplitConfig.group`
    extra: Mapping[str, str] = field(default_factory=dict)  # scores besides the task's → labels


def evaluate_run(
    run: TrainedRun,
    options: DictConfig,
    notice: Notice,
    checking: Progress | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluated:
    """Score a run on a split of its data, or predict `options.images`, a folder or a file, at their original sizes.

    With the run's own options, the scores of a split are those that training logged for the checkpoint: the same batches and
    precision, and the same statistics of the training data.

    `notice` is called with what is odd about the data, and with memory that ran out, a line each; `checking` with
    (done, total) files while the data set is checked; `progress` with (done, total) batches. Raises a SegFitError if there
    is no such split or image, the data are broken, or results cannot be written.
    """
    if options.get("images") is not None:
        return _evaluated([_folder_pass(run, options, notice)], progress, notice)
    path = _out(options, run, options.split)
    passes = [_split_pass(run, options, path, notice, checking)]
    if options.compare is not None:
        theirs = options.copy()
        theirs.run, theirs.compare = options.compare, None
        configs, task = load_named(theirs), run.config.task.name
        if other_task := [one.task.name for one in configs if one.task.name != task]:
            raise SegFitError(
                f"compare={options.compare}: its task is {other_task[0]}, and that of this run is {task}. "
                "Runs of one task are compared."
            )
        beside = load_runs(theirs, configs, notice)
        other = _split_pass(beside, theirs, path / "compared", notice, None)
        _refuse_unlike(options.compare, passes[0], other)
        passes.append(replace(other, group=passes[0].group))
        _evaluated(passes[1:], progress, notice)
    done = _evaluated(passes, progress, notice)
    if options.get("temperature") == "fit":
        kept = {"temperature": done.result.values["temperature"], "checkpoint": options.checkpoint}
        with reporting(f"cannot write {RunFolder(run.folder).temperature}"):
            write_json(RunFolder(run.folder).temperature, {**kept, "epoch": run.epoch})
    shown = {**schema_of(run.config.task.name).COLUMNS, **passes[0].extra}
    headline = scores_text(done.result.scores, {"loss": "loss", **shown})
    return replace(done, result=replace(done.result, headline=headline))


def _split_pass(
    run: TrainedRun, options: DictConfig, path: Path, notice: Notice, checking: Progress | None
) -> _Pass:
    """Return a pass over a split that is checked, with the statistics that training had."""
    config, split, assembly = run.config, options.split, assembly_of(run.config)
    if config.data.get("root") and not Path(config.data.root).expanduser().exists():
        raise SegFitError(
            f"{config.data.root}: the run's data set is not there. Say where it is now: root=…"
        )
    extra = assembly.make_extra_metrics(config)
    before = read_samples(RunFolder(run.folder).samples)
    sources = kept_splits(config, assembly.make_sources(config), before)
    for folder in run.others:  # what any of them was trained on is no held-out sample
        seen = read_samples(RunFolder(folder).samples).get("train", {})
        before = {**before, "train": {**before.get("train", {}), **seen}}
    if split not in sources:
        raise SegFitError(
            f"split={split}: the run's data have no such split. There are: {', '.join(sources)}."
        )
    source = sources[split]
    try:
        statistics = assembly.recorded_statistics(config, run.recorded)
    except SegFitError as error:
        raise SegFitError(f"{RunFolder(run.folder).metrics}: {error}") from error
    wanted = {split} if statistics is not None else {split, "train"}
    looked_at = {name: source for name, source in sources.items() if name in wanted}
    report = assembly.check_sources(config, looked_at, {split: 1}, checking)
    for line in (*report.notices, *differences(before, samples_of({split: source}))):
        notice(line)
    if statistics is None:
        statistics = assembly.make_statistics(config, sources, report)
    task = run.task(statistics, extra=extra)
    evaluation = evaluation_of(config).make_evaluation(config, task, options, path, source)
    dataset = assembly.make_held_out_dataset(config, source)
    names = [source.id(index) for index in range(len(source))]
    group = getattr(source, "group", (config.data.get("split") or {}).get("group"))
    scores = {name: name for one in extra for name in one.names}
    return _Pass(run, options, evaluation, dataset, {"split": split}, names, group, scores)


def _refuse_unlike(compared: str, own: _Pass, other: _Pass) -> None:
    problems, facts, theirs = [], own.evaluation.facts, other.evaluation.facts
    if type(own.evaluation).scores_of is Evaluation.scores_of:
        problems.append("scores of this task are no sums over samples that could be resampled.")
    if own.names != other.names:
        odd = sorted({*own.names} ^ {*other.names})
        problems.append(f"runs are compared on the same samples; {some(odd)} are of one alone.")
    for key in sorted({*facts, *theirs}):
        if facts.get(key) != theirs.get(key):
            problems.append(f"its {key}: {theirs.get(key)}. Of this run: {facts.get(key)}.")
    raise_all([f"compare={compared}: {text}" for text in problems])


def _folder_pass(run: TrainedRun, options: DictConfig, notice: Notice) -> _Pass:
    """Return a pass over images without targets."""
    config = run.config
    dataset = assembly_of(config).make_predict_dataset(config, options.images)
    for line in dataset.notices:
        notice(line)
    path = _out(options, run, f"images-{dataset.folder.resolve().name}")
    if path.resolve().is_relative_to(dataset.folder.resolve()):
        raise SegFitError(
            f"out={path} is inside images={options.images}: next time its pictures would be predicted too. "
            "Choose a folder outside."
        )
    evaluation = evaluation_of(config).make_evaluation(config, run.task(), options, path, dataset)
    return _Pass(run, options, evaluation, dataset, {"folder": str(dataset.folder)})


def _evaluated(passes: Sequence[_Pass], progress: Progress, notice: Notice) -> Evaluated:
    """Predict the first one's samples, score them where they have targets, beside the others, and write everything down."""
    run, options, evaluation = passes[0].run, passes[0].options, passes[0].evaluation

    def lowered(size: int, line: str) -> None:
        facts["batch_size"] = size
        notice(line)

    config, samples = run.config, len(passes[0].dataset)
    workers = min(workers_of(config, run.device), samples)
    dataset = passes[0].dataset
    batches = batches_in_order(config, dataset, run.device, workers, notice, range(samples))
    facts = {
        "run": os.fspath(run.folder.absolute()),
        "others": [os.fspath(folder.absolute()) for folder in run.others],
        "checkpoint": options.checkpoint,
        "epoch": run.epoch,
        "device": device_name(run.device),
        "precision": run.precision.name,
        **({"temperature": run.temperature} if "temperature" in options else {}),
        "batch_size": assembly_of(config).held_out_batch_size(config),
        "options": plain(options),
        **evaluation.facts,
        **passes[0].about,
        "samples": samples,
    }
    evaluation.write_metrics({**facts, "status": "running"})
    try:
        result = evaluate(
            run.model, evaluation.task, batches, run.precision,
            lambda done: progress(done, len(batches)), lowered=lowered,
        )  # fmt: skip
        result = evaluation.finish(_with_intervals(result, passes))
    finally:
        evaluation.close()
    loader = batches.loader
    if odd := [f"{dataset.where(index)} ({text})" for index, text in loader.remarks.items()]:
        notice(f"{len(odd)} {FAINT.format(some(odd))}")
    left_out = list(loader.left_out)
    facts |= {"samples": samples - len(left_out), "left_out": left_out}
    facts |= {"status": "finished", "seconds": result.seconds}
    scores = {"scores": result.scores, **result.values} if passes[0].names else {}
    evaluation.write_metrics({**facts, **scores})
    files = RunFolder(run.folder)
    if files.page.exists() and files.metrics.exists():
        try:
            replace_text(files.page, run_page(files, "finished"))
        except OSError as error:
            notice(f"{files.page} stays as it was ({error.strerror}).")
    return Evaluated(result, facts, evaluation.written())


def _with_intervals(result: Findings, passes: Sequence[_Pass]) -> Findings:
    """Return findings with how sure their scores are, and how they differ from those of a second pass."""
    own, resamples = passes[0], passes[0].options.bootstrap
    if not own.names or not own.evaluation.counts:
        return result
    first, last = (summed(one.evaluation.truths, own.names) for one in (own, passes[-1]))
    if first.shape != last.shape or not np.allclose(first, last):
        raise SegFitError(f"compare={own.options.compare}: its targets are not those of this run.")
    what, groups = own.evaluation.units or (
        "samples" if own.group is None else "groups",
        groups_of(list(own.names), own.group if resamples else None),
    )
    counts = [summed(one.evaluation.counts, groups) for one in passes]
    return with_intervals(result, counts, own.evaluation.scores_of, resamples, what)


def _out(options: DictConfig, run: TrainedRun, name: str) -> Path:
    """Return where results go: as given, or below the run."""
    if options.out is not None:
        return Path(options.out).expanduser()
    name += f"-of-{len(run.others) + 1}-runs" if run.others else ""
    return RunFolder(run.folder).evaluation / name
