"""Images of Python as files, so that they are read as those of a folder are."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from segfit.data.formats import IMAGE_SUFFIXES
from segfit.errors import SegFitError


@contextmanager
def folder_of(images: Sequence[Any]) -> Iterator[str]:
    """Yield a folder of images in their order: paths (as links), PIL images, or arrays `(H, W, 3)` or `(H, W)`.

    Raises a SegFitError if one is none of these; what is raised meanwhile names the files that were given.
    """
    with TemporaryDirectory(prefix="segfit-") as folder:
        given: dict[str, str] = {}
        for number, image in enumerate(images):
            place = Path(folder, f"{number:08}.tif")
            try:
                if isinstance(image, (str, os.PathLike)):
                    path = Path(image).expanduser().absolute()
                    if path.suffix.lower() not in IMAGE_SUFFIXES:
                        raise ValueError(f"{path}: its name does not end as an image's")
                    place = Path(folder, f"{number:08}-{path.name}")
                    place.symlink_to(path)
                    given[str(place)] = str(path)
                elif isinstance(image, Image.Image):
                    image.save(place, exif=image.getexif())
                else:
                    Image.fromarray(np.asarray(image)).save(place)
            except (TypeError, ValueError, KeyError, OSError) as error:
                raise SegFitError(
                    f"image {number}: {type(image).__name__} is no picture ({error}). Give a path, a PIL image, or an array "
                    "(H, W, 3) or (H, W) of uint8."
                ) from error
        try:
            yield folder
        except SegFitError as error:
            texts = error.problems
            for copied, named in given.items():
                texts = [text.replace(copied, named) for text in texts]
            raise SegFitError(texts) from error
