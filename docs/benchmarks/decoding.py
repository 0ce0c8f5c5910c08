"""How many JPEG files one thread decodes a second, by library: python docs/benchmarks/decoding.py [picture]

The picture (without one, noise with the spectrum of photographs) becomes JPEG files of 360 × 480 and 3000 × 4000 pixels,
4:2:0, quality 90, in memory. All libraries take turns in one process; those that are not installed are left out.
"""

import io
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import repeat
from typing import Any

import numpy as np
import torch
from PIL import Image

from segfit.data.gpu_decoding import JpegDecoder
from segfit.errors import SegFitError

ROUNDS, SECONDS = 15, 1.0  # of a turn
Decode = Callable[[], Any]  # → what NumPy takes for (H, W, 3)


def made_up() -> Image.Image:
    """Return noise whose amplitudes fall as one over their frequencies."""
    rows, columns = np.fft.fftfreq(3000)[:, None, None], np.fft.rfftfreq(4000)[:, None]
    noise = np.random.default_rng(0).standard_normal((3000, 4000, 3), np.float32)
    parts = np.fft.rfft2(noise, axes=(0, 1)) / np.hypot(rows, columns).clip(1 / 4000)
    values = np.fft.irfft2(parts, (3000, 4000), axes=(0, 1))
    return Image.fromarray((128 + 48 * values / values.std()).clip(0, 255).astype(np.uint8))


def _pillow(data: bytes) -> Decode:
    return lambda: Image.open(io.BytesIO(data))


def _of_torch(module: str, data: bytes) -> Decode:
    decode = import_module(module).decode_jpeg
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return lambda: decode(held).permute(1, 2, 0)


def _nvimagecodec(data: bytes) -> Decode:
    decode, held = JpegDecoder(torch.device("cpu")), np.frombuffer(data, np.uint8)
    return lambda: decode([held])[0].permute(1, 2, 0)  # type: ignore[union-attr]


def _dali(data: bytes) -> Decode:
    fn, held = import_module("nvidia.dali.fn"), np.frombuffer(data, np.uint8)
    with import_module("nvidia.dali").Pipeline(1, 1, None, prefetch_queue_depth=1) as pipeline:
        files = fn.external_source(source=repeat(held), batch=False)
        pipeline.set_outputs(fn.decoders.image(files))
    return lambda: pipeline.run()[0].at(0)


def turn(decode: Decode) -> float:
    """Return how many arrays come a second."""
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS:
        np.asarray(decode())
        count += 1
    return count / passed


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds = {"Pillow": _pillow, "torchvision": partial(_of_torch, "torchvision.io")}
    kinds |= {"torchcodec": partial(_of_torch, "torchcodec.decoders")}
    kinds |= {"nvImageCodec, CPU": _nvimagecodec, "DALI, CPU": _dali}
    original = Image.open(sys.argv[1]).convert("RGB") if len(sys.argv) > 1 else made_up()
    for size in ((480, 360), (4000, 3000)):
        original.resize(size).save(file := io.BytesIO(), "JPEG", quality=90, subsampling=2)
        ways: dict[str, Decode] = {}
        for name, kind in kinds.items():
            try:
                ways[name] = kind(file.getvalue())
            except (ImportError, SegFitError) as error:
                print(f"left out: {name}: {error}")
        pixels = {name: np.asarray(way()).astype(int) for name, way in ways.items()}
        rounds = [{name: turn(way) for name, way in ways.items()} for _ in range(ROUNDS)]
        print(f"\n{size}, {len(file.getvalue()) / 1e6:.2f} MB: images/s; times Pillow; differs by")
        for name in ways:
            low, median, high = statistics.quantiles([each[name] for each in rounds], n=4)
            times = statistics.median(each[name] / each["Pillow"] for each in rounds)
            off = np.abs(pixels[name] - pixels["Pillow"]).max()
            print(f"{name:18} {median:7.1f} ({low:.1f}-{high:.1f}) {times:6.2f} {off:3}")
