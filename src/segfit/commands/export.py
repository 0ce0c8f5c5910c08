"""A run's model as a program that needs torch alone: torch.export's .pt2."""

import warnings
from pathlib import Path

import torch

from segfit.assembly.task import export_of
from segfit.commands.load_run import TrainedRun
from segfit.errors import SegFitError
from segfit.system.files import reporting


def export_run(run: TrainedRun, path: Path) -> None:
    """Write a run's model, for any number of samples of the size that it was trained on, in fp32 on the CPU.

    `torch.export.load(path, extra_files={"classes.json": ""})` gives the program of a segmentation, and the names of the
    classes; segfit and transformers are not needed for it.

    `path` ends with .pt2, and is replaced if it exists. Raises a SegFitError if it cannot be written.
    """
    if path.suffix != ".pt2":
        raise SegFitError(f"export={path}: must end with .pt2, the format of torch.export.")
    exported, inputs, files = export_of(run.config).make_exported(run.config, run.model)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            exported, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
        )
    with reporting(f"export={path}: cannot be written"), warnings.catch_warnings():
        path.parent.mkdir(parents=True, exist_ok=True)
        # of weights that share storage on other devices; these are on the CPU
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files=files)
