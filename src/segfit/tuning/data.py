"""benchmark=data: training samples as the network will see them, with what the check of the data set found."""

from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.task import TRAINED, assembly_of, planning_of
from segfit.data.batches import sample_seed
from segfit.data.preflight import spread
from segfit.data.source import Source
from segfit.engine.findings import Findings
from segfit.errors import SegFitError
from segfit.report.page import html_image, html_page
from segfit.report.panels import encoded
from segfit.tuning import Bench
from segfit.tuning.change import changed


def run(config: DictConfig, bench: Bench) -> Findings:
    """Write a page with samples and findings; then raise a SegFitError with every problem of the data set, if any."""
    sources = assembly_of(config).make_sources(config)
    problems: list[str] = []
    notices: list[str] = []
    try:
        report = assembly_of(config).check_sources(
            config, sources, TRAINED, lambda n, of: bench.progress("checking", n - 1, of)
        )
        notices = report.notices
    except SegFitError as error:
        problems = error.problems
    chosen = spread(len(sources["train"]), config.benchmark.samples)
    try:
        picture = _picture(config, sources["train"], chosen)
    except SegFitError as error:
        raise SegFitError(problems or error.problems) from error
    found = [f"<p><b>{escape(text)}</b></p>" for text in problems]
    found += [f"<p>{escape(text)}</p>" for text in notices]
    page, shown = bench.folder / "data.html", html_image("samples", encoded(picture))
    page.write_text(html_page("data", [*found, shown]), "utf-8")
    for notice in notices:
        bench.notice(notice)
    if problems:
        raise SegFitError([*problems, f"{page} shows what can be read of it."])
    return Findings(
        headline=f"{page} shows training samples as the network will see them. Check of the data: {len(notices)} notices.",
        values={"notices": notices},
    )


def _picture(config: DictConfig, source: Source, indices: Sequence[int]) -> Any:
    """Return a picture (H, W, 3) uint8 of training samples, but those that cannot be read; raise a SegFitError for none."""
    assembly, samples = assembly_of(config), []
    # The device gives the same pixels, but not one by one.
    dataset = assembly.make_train_dataset(
        changed(config, {"data.decode": "cpu"} if "decode" in config.data else {}), source
    )
    for index in indices:
        with suppress(SegFitError):
            samples.append(dataset[index, sample_seed(config.seed, 0, index)])
    if not samples:
        raise SegFitError("None of the samples can be read.")
    task = assembly.make_task(config, torch.device("cpu"))
    names = [source.id(int(sample["index"])) for sample in samples]
    batch = assembly.collate(samples)
    picture = planning_of(config).draw_batch(task, batch, config.seed, names)
    if picture is None:
        raise SegFitError(f"benchmark=data draws pictures; task={config.task.name} has none.")
    return picture
