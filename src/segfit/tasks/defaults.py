"""What the modules of a task offer where a task has nothing of its own to say; see `segfit.tasks.module_of`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from segfit.config.tasks import Feeding
from segfit.data.source import Source
from segfit.errors import SegFitError

FLOAT64 = False  # whether the task computes in float64, which Apple's GPUs lack
# Option, value or prefix, options that have an effect with it alone.
USED: Sequence[tuple[str, str, str]] = ()


def _nothing(*_: Any) -> None:
    """Do nothing: there is nothing of the kind."""


def _no(*_: Any) -> bool:
    """Say no."""
    return False


def _empty(*_: Any) -> dict[str, Any]:
    """Return an empty mapping."""
    return {}


settle = _nothing  # no option follows from the model
sample_weights = _nothing  # every sample comes once an epoch
apply_options = _nothing  # evaluate.py has no options of the task
device_augmentation = _nothing  # nothing is augmented on the device
draw_batch = _nothing  # there are no pictures of samples
augments_in_workers = _no  # where samples are cached, workers have nothing to do
make_statistics = recorded_statistics = _empty  # the task takes nothing from the training data
facts = hparams = _empty  # the facts that every run has say it all


@dataclass(frozen=True)
class Preflight:
    """What a look at the data found that does not keep a training from starting."""

    notices: list[str] = field(default_factory=list)  # lines for the log


def check_sources(*_: Any) -> Preflight:
    """Look at nothing: the samples are made, not read."""
    return Preflight()


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return samples as one batch, key by key; where only some have 16 bits, those of 8 are scaled to them."""
    import torch

    from segfit.data.batches import stack

    batch = {}
    for key in samples[0]:
        values = [torch.as_tensor(one[key]) for one in samples]
        if {value.dtype for value in values} == {torch.uint8, torch.uint16}:
            deep = [value.int() * (1 if value.dtype == torch.uint16 else 257) for value in values]
            values = [value.to(torch.uint16) for value in deep]
        batch[key] = stack(values)
    return batch


def held_out_batch_size(config: DictConfig) -> int:
    """Return the batch size of training: samples are all of one size."""
    return int(config.batch_size)


def samples_per_read(_: DictConfig) -> int:
    """Return one: every sample is read for itself."""
    return 1


def cached_forms(_: DictConfig, sources: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the samples as they are read."""
    return {split: (source, "original") for split, source in sources.items()}


def make_extra_metrics(_: DictConfig) -> list[Any]:
    """Return no metrics."""
    return []


def remark(_: Mapping[str, float]) -> str:
    """Return nothing: the scores speak for themselves."""
    return ""


def costliest(config: DictConfig) -> DictConfig:
    """Return a copy: every batch costs the same memory."""
    return config.copy()


def largest_first(source: Source) -> list[int]:
    """Return the indices of a source's samples by the pixels of their first files, most first; of others in order."""
    from segfit.data.formats import open_image

    def pixels(index: int) -> int:
        files = source.files(index)
        if not files:
            return 0  # made, not read: all are of one size
        try:
            with open_image(files[0]) as image:
                return image.width * image.height
        except SegFitError:
            return 0  # no picture; or one that cannot be read, with data.check=off: reading it will raise

    return sorted(range(len(source)), key=pixels, reverse=True)


def without_augmentation(task: Any) -> Any:
    """Return the task: it augments nothing on the device."""
    return task


def feeding(_: DictConfig) -> Feeding:
    """Return what holds of samples that data workers read."""
    return Feeding()


def smaller_samples(*_: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield nothing: samples have one size."""
    yield from ()
