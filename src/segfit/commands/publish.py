"""A run's SegFormer as a folder that transformers loads, and on the hub."""

from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from segfit.commands.load_run import TrainedRun
from segfit.config.check import plain
from segfit.errors import SegFitError
from segfit.system.files import reporting

CARD = """---
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
        model.cpu().float().save_pretrained(folder)
        SegformerImageProcessor(
            size={"height": height, "width": width},
            image_mean=plain(config.data.mean),
            image_std=plain(config.data.std),
        ).save_pretrained(folder)
        card = CARD.format(
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
