"""A run's model as a program without SegFit: torch.export's .pt2, or ONNX."""

import warnings
from pathlib import Path
from typing import Any

import torch

from segfit.assembly.task import evaluation_of
from segfit.commands.load_run import TrainedRun
from segfit.errors import SegFitError
from segfit.models.build import Exported
from segfit.system.files import reporting

_OPSET = 18  # the first one whose scatter and resize are those of torch; every runtime of 2023 on reads it


def export_run(run: TrainedRun, path: Path) -> None:
    """Write a run's model, for any number of samples, in fp32 on the CPU. docs/evaluate.md says what goes in and comes out.

    `path` ends with .pt2 or .onnx, and is replaced if it exists. Raises a SegFitError if it cannot be written, or what writes
    ONNX is not installed.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise SegFitError(
            f"export={path}: must end with .pt2, the format of torch.export, or .onnx."
        )
    exported = evaluation_of(run.config).make_exported(run.config, run.model)
    with reporting(f"export={path}: cannot be written"), warnings.catch_warnings(), torch.no_grad():
        path.parent.mkdir(parents=True, exist_ok=True)
        (_write_pt2 if path.suffix == ".pt2" else _write_onnx)(exported, path)


def _write_pt2(exported: Exported, path: Path) -> None:
    program = torch.export.export(
        exported.module, tuple(exported.inputs.values()), dynamic_shapes=_shapes(exported)
    )
    # of weights that share storage on other devices; these are on the CPU
    warnings.filterwarnings("ignore", "No complete tensor found")
    torch.export.save(program, path, extra_files=dict(exported.files))


def _write_onnx(exported: Exported, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SegFitError(f"export={path}: pip install onnx onnxscript, which write it.") from error
    warnings.simplefilter("ignore")  # of the exporter's own parts
    program = torch.onnx.export(
        exported.onnx or exported.module,
        tuple(exported.inputs.values()),
        dynamo=True,
        verbose=False,
        opset_version=_OPSET,
        input_names=list(exported.inputs),
        output_names=list(exported.outputs),
        dynamic_shapes=_shapes(exported),
    )
    assert program is not None
    program.model.metadata_props.update(exported.files)
    program.save(path)


def _shapes(exported: Exported) -> dict[str, dict[int, Any]]:
    """Return the dimensions of each input that may have any size."""
    free = [0, *range(-exported.sizes, 0)]
    return {
        name: {place % tensor.ndim: torch.export.Dim.DYNAMIC for place in free}
        for name, tensor in exported.inputs.items()
    }
