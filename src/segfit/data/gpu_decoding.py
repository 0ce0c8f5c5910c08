"""JPEG files decoded by the card, with `data.decode=gpu`; docs/data.md says when that pays."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from segfit.data.formats import ORIENTATION, Values, open_image
from segfit.data.images import ImageReader
from segfit.errors import SegFitError

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe")


class HeaderReader(ImageReader):
    """Reads no more of an image than its header: its pixels are zeros that take no memory."""

    def read(self, path: Path) -> tuple[NDArray[np.uint8], Values]:
        """Return an image of the right size; raise a SegFitError if the file is missing or no image."""
        with open_image(path) as image:
            turned = image.getexif().get(ORIENTATION, 1)
            height, width = image.size if turned >= 5 else image.size[::-1]
        zero = np.zeros(1, np.uint8)
        pixels = np.lib.stride_tricks.as_strided(zero, (height, width, 3), (0, 0, 0))
        return pixels, Values(pixels)


class JpegDecoder:
    """Decodes JPEG files by nvImageCodec: on a CUDA device, in torch's current stream; else on the CPU.

    Pixels are those of libjpeg-turbo bit for bit on the CPU, and differ by rounding on a card.

    Raises a SegFitError if nvImageCodec is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # what fails is decoded elsewhere
        try:
            from nvidia import nvimgcodec
        except (ImportError, OSError) as error:
            raise SegFitError(
                f"data.decode=gpu needs nvImageCodec ({error}): pip install 'nvidia-nvimgcodec-cu13[nvjpeg]', or -cu12 where torch "
                "is built for CUDA 12."
            ) from error
        self.cuda = device.type == "cuda"
        number = torch.cuda.current_device() if self.cuda else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        backends = None if self.cuda else [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
        # As libjpeg does; nvJPEG's default repeats the colours of the nearest pixel.
        options = ":fancy_upsampling=1"
        self._decoder = nvimgcodec.Decoder(device_id=number, backends=backends, options=options)

    def __call__(self, files: Sequence[NDArray[np.uint8]]) -> list[Tensor | None]:
        """Return the pixels (3, H, W) uint8 RGB, upright, of each file's bytes (N,); None where they cannot be decoded.

        The host may wait for the card: nvImageCodec decides how much of the work is the host's.
        """
        stream = torch.cuda.current_stream().cuda_stream if self.cuda else 0
        images = self._decoder.decode(list(files), cuda_stream=stream)
        return [None if one is None else self._tensor(one).permute(2, 0, 1) for one in images]

    def _tensor(self, image: Any) -> Tensor:
        made: Tensor = from_dlpack(image) if self.cuda else torch.from_numpy(np.asarray(image))
        return made
