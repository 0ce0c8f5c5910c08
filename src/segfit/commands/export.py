"""A run's model as a program that needs torch alone: torch.export's .pt2, with normalisation inside."""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from segfit.commands.load_run import TrainedRun
from segfit.errors import SegFitError
from segfit.models.build import for_inference
from segfit.tasks.segmentation.schema import size_of


class Deployed(nn.Module):
    """A model from uint8 images to logits.

    Args:
        model: takes normalised images.
        mean: of RGB in 0-1, three numbers.
        std: of RGB in 0-1, three numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, num_classes, H, W)` float32 of images `(B, 3, H, W)` uint8."""
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return logits


def export_run(run: TrainedRun, path: Path) -> None:
    """Write a run's model, for any batch of images at the run's `image_size`, in fp32 on the CPU.

    `torch.export.load(path, extra_files={"classes.json": ""})` gives the program, and the names of the classes; neither
    segfit nor transformers has to be there.

    Args:
        run: of `trained.load_run`.
        path: ends with .pt2; replaced if it exists.

    Raises:
        SegFitError: if the file cannot be written.
    """
    if path.suffix != ".pt2":
        raise SegFitError(f"export={path}: must end with .pt2, the format of torch.export.")
    config = run.config
    model = for_inference(run.model).cpu().float()
    deployed = Deployed(model, list(config.data.mean), list(config.data.std)).eval()
    height, width = size_of(config.image_size)
    example = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            deployed, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
        )
    classes = json.dumps(list(run.classes.names))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # of weights that share storage on other devices; these are on the CPU
            warnings.filterwarnings("ignore", "No complete tensor found")
            torch.export.save(program, path, extra_files={"classes.json": classes})
    except OSError as error:
        raise SegFitError(f"export={path}: cannot be written ({error.strerror}).") from error
