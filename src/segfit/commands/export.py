"""A run's model without SegFit: torch.export's .pt2, ONNX, or a folder that transformers loads, on the hub too."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from segfit.assembly.task import evaluation_of
from segfit.commands.load_run import TrainedRun
from segfit.config.check import plain
from segfit.errors import SegFitError
from segfit.models.build import Exported
from segfit.system.files import reporting

_OPSET = 18  # the first one whose scatter and resize are those of torch; every runtime of 2023 on reads it
_CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [segformer, segfit]
---

# SegFormer {variant}

Trained by SegFit from: {origin}. NVIDIA's SegFormer weights, and what was trained from them, are for research and evaluation
only. Images were fitted to {height} × {width} pixels (height, width) by `{fit}`; the processor here always stretches them.

| score on the validation images | |
|---|---|
{scores}

Classes: {classes}

```python
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForSemanticSegmentation.from_pretrained(folder)
outputs = model(**processor(images=image, return_tensors="pt"))
found = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]
```
"""


def export_run(run: TrainedRun, path: Path) -> None:
    """Write a run's model, for any number of samples, in fp32 on the CPU. docs/evaluate.md says what goes in and comes out.

    `path` ends with .pt2 or .onnx, and is replaced if it exists. Raises a SegFitError if it cannot be written, or what writes
    ONNX is not installed.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise SegFitError(f"export={path}: must end with .pt2 (torch.export) or .onnx.")
    make = evaluation_of(run.config).make_exported
    exported = make(run.config, run.model, run.temperature, run.recorded)
    with reporting(f"export={path}: cannot be written"), warnings.catch_warnings(), torch.no_grad():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".onnx":
            _write_onnx(exported, path)
            return
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


def publish(run: TrainedRun, folder: Path, name: str | None) -> None:
    """Write a run's SegFormer with its processor and a card that has the run's scores; upload it to the hub if `name` is given.

    Raises a SegFitError if the model is another, or it cannot be written or uploaded.
    """
    from transformers import SegformerImageProcessor

    config, size, model = run.config, run.config.get("image_size"), cast(Any, run.model)
    if config.model.name != "segformer":
        raise SegFitError(
            f"export=hf:{folder}: transformers knows SegFormers, not {config.model.name}. Take export=model.pt2 or model.onnx."
        )
    height, width = plain(size) if OmegaConf.is_list(size) else (size, size)
    scores = run.recorded.get("best", {})
    with reporting(f"export=hf:{folder}: cannot be written"):
        for parameter in model.decode_head.classifier.parameters():
            parameter.data /= run.temperature
        model.cpu().float().save_pretrained(folder)
        SegformerImageProcessor(
            size={"height": height, "width": width},
            image_mean=plain(config.data.mean),
            image_std=plain(config.data.std),
        ).save_pretrained(folder)
        card = _CARD.format(
            variant=config.model.variant,
            origin=run.recorded.get("facts", {}).get("weights", "unknown weights"),
            height=height,
            width=width,
            fit=config.data.fit,
            scores="\n".join(f"| {score} | {value} |" for score, value in scores.items()),
            classes=", ".join(model.config.id2label.values()),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    if name is None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the hub's client changes its HTTP library, and its errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SegFitError(
            f"push={name}: not uploaded ({reason}). {folder} is complete: `hf auth login`, then `hf upload {name} {folder}`."
        ) from error
