"""What a config takes, from recordings of its own update and validation."""

from __future__ import annotations

import copy
import dataclasses

import torch
from omegaconf import DictConfig

from segfit.engine.precision import Precision
from segfit.tasks.segmentation.assembly import make_gpu_augment
from segfit.tasks.segmentation.schema import size_of
from segfit.tuning.memory.affine import extra, forecast, idle
from segfit.tuning.memory.curve import RECORDED, Curve, Forecast, Moment
from segfit.tuning.memory.recorder import Recorder
from segfit.tuning.memory.recording import Recording, record
from segfit.tuning.memory.scratch import no_scratch

BATCHES = (12, 16)  # large enough that models take the way that they take for many pixels
VAL_BATCHES = (4, 6)  # images are scored one by one: more would only take longer

_PROBE = 128  # pixels a side: augmentation takes the same bytes a pixel of any image
_OPERATIONS = ("hflip", "vflip", "affine", "color_jitter", "blur", "noise")


def predict(
    config: DictConfig, device_type: str, precision: str, original: tuple[int, int]
) -> Forecast:
    """Return the memory of training and validation at any micro-batch; nothing is downloaded, no device is needed.

    Args:
        config: checked; its batch_size does not matter, nor by how much accumulate is above 2: see
            `Forecast.accumulating`.
        device_type: "cuda" or "cpu", by whose rules types and kernels are chosen.
        precision: "fp32", "bf16" or "fp16".
        original: (height, width) of the largest held-out image.

    Raises:
        SegFitError: if the model cannot be made.
    """
    config = copy.deepcopy(config)
    config.accumulate = min(config.accumulate, RECORDED)
    small, large, result = _recordings(config, Precision(precision, device_type), original)
    fixed, each = extra(small, large)
    height, width = size_of(config.image_size)
    moments = list(result.train.moments)
    if config.augmentation.name == "kornia-gpu":
        now = augmentation_bytes(config) * height * width
        moments.append(idle(small).plus(config.accumulate * fixed, config.accumulate * each + now))
    # On a card the next window's images and masks are copied ahead, as uint8.
    ahead = 4 * height * width if device_type == "cuda" else 0
    return dataclasses.replace(
        result,
        train=Curve([moment.plus(each=config.accumulate * ahead) for moment in moments]),
        waiting=Moment({"activations": fixed}, {"activations": each + ahead}),
        recorded=config.accumulate,
    )


def _recordings(
    config: DictConfig, precision: Precision, original: tuple[int, int]
) -> tuple[Recording, Recording, Forecast]:
    def at(batch: int, val_batch: int) -> Recording:
        changed = copy.deepcopy(config)
        changed.batch_size = batch
        return record(changed, precision, original, val_batch)

    small, large = at(BATCHES[0], VAL_BATCHES[0]), at(BATCHES[1], VAL_BATCHES[1])
    return small, large, forecast(small, large)


def augmentation_bytes(config: DictConfig) -> float:
    """Return the bytes a pixel that augmentation on the device takes at its peak, results included.

    Measured where every operation strikes every image, on a few pixels with data: what strikes is drawn on the host.
    """
    dearest = copy.deepcopy(config)
    for name in _OPERATIONS:
        # What is switched off stays off.
        dearest.augmentation[name] = 1.0 if config.augmentation[name] > 0 else 0.0
    augment = make_gpu_augment(dearest)
    assert augment is not None  # asked for with augmentation=kornia-gpu only
    images, masks = torch.rand(2, 3, _PROBE, _PROBE), torch.zeros(2, _PROBE, _PROBE).long()
    with Recorder("cpu", block=1, scratch=no_scratch) as recorder:
        results = augment(images, masks, seed=0)
        del results
    living = peak = 0
    for event in recorder.events:
        living += recorder.sizes[abs(event)] * (1 if event > 0 else -1)
        peak = max(peak, living)
    return peak / masks.numel()
