"""Sources → samples of one size → batches."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from segfit.data import loader
from segfit.data.batches import Batch, sample_seed
from segfit.data.formats import real_file, with_slices
from segfit.data.gpu_decoding import JpegDecoder
from segfit.data.images import ImageReader, images_at, look, resize_image
from segfit.data.source import Named, Source, SourceView, relative_name
from segfit.data.tiles import LargeImage, is_large
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.masks import resize_mask

Pixels: TypeAlias = NDArray[np.uint8]
Sample: TypeAlias = dict[str, Any]
# (image (3, h, w) uint8, mask (h, w) uint8, seed=int) → the same
Augment: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class LabelledSource(Source, Protocol):
    """Images with masks, and what the mask values mean."""

    classes: Classes

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Return an image (H, W, 3) uint8 RGB and its mask (H, W) uint8.

        The mask holds class indices 0 … len(classes) - 1 and `IGNORE_INDEX`. Raises a SegFitError if a file is unreadable or
        its values are none of the classes.
        """


@dataclass(eq=False)
class _Fitted(SourceView):
    source: Source
    size: tuple[int, int]  # (h, w) in pixels
    fit: str  # "stretch", "pad" or "crop"


@dataclass(eq=False)
class TrainDataset(_Fitted):
    """Samples of one size for training.

    "stretch" resizes to `size`; "pad" resizes to fit inside, centred, and fills up with black that is ignored; "crop" cuts
    a random window out, and fills up where the image is smaller. The image that was read last is kept: its crops come one
    after the other.
    """

    augment: Augment | None = None  # called with image, mask and `seed=`
    # Share (0-1) of the crops that are centred on a pixel of a class that is drawn of those in the mask, as in nnU-Net
    # (Isensee et al. 2021)
    foreground: float = 0.0
    background: int | None = None  # a class that is not drawn
    # The device decodes the images, of which `source` gives no more than the size; this one reads what it cannot decode
    encoded: Source | None = None
    _last: tuple[int, list[Tensor]] | None = field(default=None, init=False)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample for (index, seed); the seed decides everything that is random.

        That is "image": (3, h, w) uint8 RGB, "mask": (h, w) uint8, "index": int. If it is `encoded`, "image": (1, N) uint8, the
        file, and "content": (4,) int64, where it will lie. Raises what `source.read` does.
        """
        index, seed = key
        if self._last is None or self._last[0] != index:
            self._last = index, as_tensors(self.source.read(index))
        image, mask = self._last[1]
        if self.fit == "crop":
            draw, centre = random.Random(sample_seed(seed, 0, 0)), None
            if draw.random() < self.foreground:
                centre = draw_pixel(mask, self.background, draw)
            content = random_crop(mask.shape, self.size, seed, centre)
        else:
            content = place_image(image.shape[1], image.shape[2], self.size, self.fit)
        mask = _surround(resize_mask(mask, content[2:]), self.size, content, IGNORE_INDEX)
        sample = {"mask": mask.contiguous(), "index": index}
        if self.encoded is not None:
            file = torch.from_numpy(np.fromfile(self.files(index)[0], np.uint8))
            return {"image": file[None], **sample, "content": torch.tensor(content)}
        image = _surround(resize_image(image, content[2:]), self.size, content, 0)
        if self.augment is not None:
            image, mask = self.augment(image, mask, seed=seed)
        return {"image": image.contiguous(), "mask": mask.contiguous(), "index": index}

    def decoder(self, device: torch.device) -> Callable[[Batch], Batch] | None:
        """Return what makes the images of a batch of `encoded` samples, on the device; None: nothing is to be done."""
        if (encoded := self.encoded) is None:
            return None
        decode = JpegDecoder(device)

        def decoded(batch: Batch) -> Batch:
            images, places = [], batch.pop("content").tolist()
            found = decode([*batch["image"].flatten(1).numpy()])
            for image, place, index in zip(found, places, batch["index"].tolist(), strict=True):
                if image is None:  # raises what reading raises, if the file is at fault
                    image = as_tensors(encoded.read(index))[0].to(device)
                image = resize_image(image, tuple(place[2:]))
                images.append(_surround(image, self.size, place, 0))
            return {**batch, "image": torch.stack(images)}

        return decoded


class EvalDataset(_Fitted):
    """Samples for evaluation: images fitted to `size`, masks, if there are any, at their original size.

    "crop" leaves the image untouched, for a sliding window.
    """

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its whole mask.

        That is "image": (3, h', w') uint8 RGB; "mask": (H, W) uint8; "content": (4,) int64, top, left, height and width
        of the picture inside the image; "shape": (2,) int64, H and W; "index": int. Raises what `source.read` does.
        """
        return self._sample(index, *as_tensors(self.source.read(index)))

    def _sample(self, index: int, image: Tensor, *masks: Tensor) -> Sample:
        # The mask has the original size: an image from a cache may be fitted already.
        height, width = (masks[0] if masks else image).shape[-2:]
        sample = {
            "image": fit_image(image, self.size, self.fit)[0].contiguous(),
            "content": torch.tensor(place_image(height, width, self.size, self.fit)),
            "shape": torch.tensor([height, width]),
            "index": index,
        }
        return {**sample, "mask": masks[0]} if masks else sample


class PredictDataset(Named, EvalDataset):
    """Images of a folder (and the folders below it), or one file, without masks; it is its own source.

    `size` and `fit` as `EvalDataset`; `reader` and `slice_axis` say how files become images. `remarks` get the values of
    images that hardly any shades are left of. Raises a SegFitError if there is no such folder or file, or no image in it.
    """

    def __init__(
        self,
        folder: str | Path,
        size: tuple[int, int],
        fit: str,
        reader: ImageReader | None = None,
        slice_axis: int = 2,
    ) -> None:
        super().__init__(self, size, fit)
        self.folder = Path(folder).expanduser()
        paths, base, self.notices = images_at(folder)
        self.paths = with_slices(paths, slice_axis)
        self.reader, self.remarks = reader or ImageReader(), dict[int, str]()
        names = [relative_name(path, base) for path in self.paths]
        # a.jpg and a.png: the suffix goes into the name, so that no prediction overwrites another.
        count = Counter(names)
        self.names = [
            f"{name}_{path.suffix[1:]}" if count[name] > 1 else name
            for name, path in zip(names, self.paths, strict=True)
        ]

    def __getitem__(self, index: int) -> Sample:
        """Return an image as `EvalDataset` does; a `large` one for a sliding window without pixels."""
        image = self.large(index) if self.fit == "crop" else None
        if image is None:
            pixels, found = self.reader.read(self.paths[index])
            reader = self.reader
            # Of 8 bits that are taken as they are, a dark one is just dark.
            if found.values.dtype != np.uint8 or reader.value_range or reader.percentiles:
                kind, low, high = look(pixels, found.values)
                if kind == "flat":
                    self.remarks[index] = f"{low:.6g} to {high:.6g}"
            return self._sample(index, *as_tensors([pixels]))
        if self.reader.percentiles is not None:
            raise SegFitError(
                f"{self.paths[index]}: too large to be read at once, as the percentiles of its values need. Train with two "
                "values, data.value_range=[low, high], or cut it into tiles."
            )
        shape = torch.tensor(image.shape[1:])
        nothing, content = torch.empty(3, 0, 0, dtype=torch.uint8), torch.cat([0 * shape, shape])
        return {"image": nothing, "content": content, "shape": shape, "index": index}

    def large(self, index: int) -> LargeImage | None:
        """Return a TIFF file that is too large to be read at once; None: it is not."""
        path = self.paths[index]
        if path.suffix.lower() in (".tif", ".tiff"):
            with suppress(Exception):  # whoever reads it whole says what is wrong with it
                image = LargeImage(path, self.reader)
                return image if is_large(image.shape[1] * image.shape[2]) else None
        return None

    def files(self, index: int) -> list[Path]:
        """Return the image's file."""
        return [real_file(self.paths[index])]

    def read(self, index: int) -> tuple[Pixels]:
        """Return an image (H, W, 3) uint8 RGB, upright."""
        return (self.reader(self.paths[index]),)


@dataclass(eq=False)
class FittedSource(_Fitted):
    """A `Source` whose images are fitted to one size (h, w) already: fitting them again changes nothing.

    With `whole_masks`, masks keep their original size, as `EvalDataset` needs them; else they are fitted too.
    """

    whole_masks: bool = False

    def read(self, index: int) -> tuple[Pixels, Pixels]:
        """Return the image (h, w, 3) uint8, and its mask, (h, w) or as it was, uint8; raises what `source.read` does."""
        image, mask = as_tensors(self.source.read(index))
        image, content = fit_image(image, self.size, self.fit)
        if not self.whole_masks:
            mask = _surround(resize_mask(mask, content[2:]), self.size, content, IGNORE_INDEX)
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy()), mask.contiguous().numpy()


def place_image(
    height: int, width: int, size: tuple[int, int], fit: str
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a picture of height × width once it is fitted to `size`."""
    if fit == "crop":
        return 0, 0, height, width
    if fit == "stretch":
        return 0, 0, *size
    scale = min(size[0] / height, size[1] / width)
    rows = min(size[0], max(1, round(height * scale)))
    columns = min(size[1], max(1, round(width * scale)))
    return (size[0] - rows) // 2, (size[1] - columns) // 2, rows, columns


def fit_image(
    image: Tensor, size: tuple[int, int], fit: str
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return an image (3, H, W) uint8 fitted to `size`, and (top, left, height, width) of its picture.

    "crop" returns the image as it is, and so does any fit an image that was fitted before.
    """
    content = place_image(image.shape[-2], image.shape[-1], size, fit)
    image = resize_image(image, content[2:])
    return image if fit == "crop" else _surround(image, size, content, 0), content


def draw_pixel(mask: Tensor, background: int | None, draw: random.Random) -> list[int] | None:
    """Return row and column of a pixel of a class that is drawn of those in a mask (H, W); None: there is none."""
    labels = {*mask.flatten().bincount().nonzero()[:, 0].tolist()} - {background, IGNORE_INDEX}
    if not labels:
        return None
    places = (mask == draw.choice(sorted(labels))).nonzero()
    return cast(list[int], places[draw.randrange(len(places))].tolist())


def random_crop(
    shape: Sequence[int], size: tuple[int, int], seed: int, centre: Sequence[int] | None = None
) -> tuple[int, int, int, int]:
    """Return where an image of `shape` (H, W) lies in a window of `size` = (h, w): top, left, H, W.

    The window is drawn by the seed alone, or as near to a `centre` (row, column) as there is room. A smaller image is placed
    at random.
    """
    draw, place = random.Random(seed), list[int]()
    for axis, (length, wanted) in enumerate(zip(shape, size, strict=True)):
        start = draw.randint(0, abs(length - wanted))
        if length > wanted and centre is not None:
            start = min(max(centre[axis] - wanted // 2, 0), length - wanted)
        place.append(-start if length > wanted else start)
    return place[0], place[1], shape[0], shape[1]


def _surround(tensor: Tensor, size: tuple[int, int], content: Sequence[int], fill: int) -> Tensor:
    """Return (…, h, w) of `size`, with `tensor` at the place of `content`, parts of which may lie outside, and `fill` around it."""
    top, left, height, width = content
    if (height, width) == size:
        return tensor
    return pad(tensor, (left, size[1] - width - left, top, size[0] - height - top), value=fill)


def as_tensors(arrays: Sequence[Pixels]) -> list[Tensor]:
    """Return an image as (3, H, W) and, where there is one, its mask (H, W), all uint8.

    Nothing is copied unless it is read-only, and images stay channels-last.
    """
    tensors = [torch.from_numpy(np.require(array, requirements=["W"])) for array in arrays]
    return [tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor for tensor in tensors]


# Samples → one batch, images padded with 0 and masks with `IGNORE_INDEX`, at the bottom and right, to its largest.
collate = partial(loader.collate, mask=IGNORE_INDEX)
