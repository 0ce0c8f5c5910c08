"""DALI as a contestant of benchmark=loader: it reads, decodes and resizes the training's files, and does no more."""

import random
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from segfit.data.source import Source
from segfit.errors import SegFitError

IS_INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def dali_batches(
    source: Source, size: tuple[int, ...], batch_size: int, threads: int, device: torch.device
) -> Iterator[Any]:
    """Yield batches of a source's files in random order, without end, resized to `size` = (h, w).

    The first file of a sample is decoded as RGB, by the device if it is a CUDA one; others as grey images. Raises a SegFitError
    if a sample has no file, or DALI cannot read one.
    """
    from nvidia.dali import Pipeline, fn, types

    samples = [[str(path) for path in source.files(index)] for index in range(len(source))]
    if not all(samples):
        raise SegFitError("DALI: the samples are no image files.")
    random.Random(0).shuffle(samples)
    on_card, outputs = device.type == "cuda", []
    try:
        with Pipeline(batch_size, threads, device.index or 0 if on_card else None) as pipeline:
            for place, paths in enumerate(zip(*samples, strict=True)):
                image = fn.decoders.image(
                    fn.readers.file(files=[*paths])[0],
                    device="mixed" if on_card else "cpu",
                    output_type=types.GRAY if place else types.RGB,
                )
                kind = types.INTERP_NN if place else types.INTERP_LINEAR
                outputs.append(fn.resize(image, size=size, interp_type=kind, antialias=not place))
            pipeline.set_outputs(*outputs)
        while True:
            yield pipeline.run()
    except (RuntimeError, ValueError) as error:  # ValueError: samples of different numbers of files
        raise SegFitError(f"DALI: {str(error).strip().splitlines()[0]}") from error
