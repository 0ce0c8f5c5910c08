"""Images and masks in folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.config.schema import SplitConfig
from segfit.data.formats import Values, real_file
from segfit.data.gpu_decoding import JPEG_SUFFIXES, HeaderReader
from segfit.data.images import PERCENTILES, ImageReader, look, resize_image, scale
from segfit.data.source import Named, some
from segfit.data.splits import split_names
from segfit.errors import SegFitError, raise_all
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.layout import Listing, find_layout, list_pairs
from segfit.tasks.segmentation.data.masks import ValueMap, object_sizes
from segfit.tasks.segmentation.data.schema import FolderConfig, color_table, label_map_of


@dataclass(eq=False)
class FolderSource(Named):
    """A `Source` of image files with their `Masks`."""

    classes: Classes
    names: Sequence[str]  # relative, without suffix, in the order of the indices
    listing: Listing
    values: ValueMap
    image_reader: ImageReader
    options: str  # everything but the files that a report depends on
    contents: dict[str, str] = field(default_factory=dict)  # name → key, by the pre-flight
    group: str | None = None  # as `SplitConfig.group`

    @property
    def pool(self) -> Mapping[str, Path]:
        """Images by name, those of other splits that were drawn from the same ones included."""
        return self.listing.images

    def files(self, index: int) -> list[Path]:
        """Return the image file, then those of the mask."""
        name, listing = self.names[index], self.listing
        masks = [] if name in listing.unmasked else listing.masks.files(name)
        return [real_file(path) for path in (listing.images[name], *masks)]

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return an image and its mask, as `LabelledSource.read`."""
        image, _, values = self._read_files(index)
        if image.shape[:2] != values.shape:
            raise SegFitError(f"{self.files(index)[1]}: {_sizes(image, values)}.")
        mask, unknown = self.values.apply(values)
        if unknown:
            raise SegFitError(
                f"{self.files(index)[1]}: mask values {self.values.shown(unknown[:16])} are no class "
                f"(data.num_classes={len(self.classes)}) and not ignored."
            )
        return image, mask

    def inspect(self, index: int) -> dict[str, Any]:
        """Return what was found about an item; raise a SegFitError if a file is unreadable.

        What is odd, any of `KINDS` of the pre-flight → what is said of it, "" if nothing; "low" and "high": the least and the
        greatest value of the image's file; "percentiles": whether they would keep the shades of one that is "flat";
        "palette": index, R, G and B of the mask's, at most 64. And, unless the sizes differ: "values" that are no class and
        not ignored, at most 16; "only_0_255": the mask holds 255 and, perhaps, 0, and nothing else; "pixels" of each class;
        "shape" of the mask; "objects" of `object_sizes`.
        """
        image, found, values = self._read_files(index)
        name, masks = self.names[index], self.listing.masks
        palette = [] if name in self.listing.unmasked else masks.palette(name, values)
        shades, low, high = look(image, found.values)
        auto = not (self.image_reader.value_range or self.image_reader.percentiles)
        if auto and (found.values.dtype.kind == "f" or low < 0 or high > 65535):
            shades = shades or "own"
        report: dict[str, Any] = {"low": low, "high": high, "palette": palette}
        if shades:
            report[shades] = ""
        if shades == "flat":
            stretched = np.atleast_3d(scale(found.values, PERCENTILES))
            report["percentiles"] = look(stretched, found.values)[0] != "flat"
        if found.orientation != 1:
            report["turned"] = ""
        if found.frames > 1:
            report["frames"] = str(found.frames)
        if found.alpha is not None and found.alpha.min() != found.alpha.max():
            report["transparent"] = ""
        if masks.hides(name, values):
            report["hidden"] = ""
        if image.shape[:2] != values.shape:
            turned = "; the image is turned by its EXIF orientation, its mask is not"
            report["size"] = _sizes(image, values) + turned * (found.orientation >= 5)
            return report
        mask, unknown = self.values.apply(values)
        counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
        pixels, background = counts[: len(self.classes)], self.classes.background
        if counts[IGNORE_INDEX] and not pixels.any():
            report["ignored"] = ""
        white = (values == 255) & (not self.values.colors)
        surroundings = int(pixels.argmax()) if background is None else background
        return report | {
            "values": unknown[:16],
            "pixels": pixels.tolist(),
            "shape": mask.shape,
            "only_0_255": bool(white.any() and (white | (values == 0)).all()),
            "objects": object_sizes(mask, len(self.classes), surroundings),
        }

    def _read_files(self, index: int) -> tuple[NDArray[np.uint8], Values, NDArray[Any]]:
        """Return the image, what it was made of, and the values of its mask."""
        name, masks = self.names[index], self.listing.masks
        pixels, found = self.image_reader.read(self.listing.images[name])
        height, width = pixels.shape[:2]
        if name in self.listing.unmasked:
            background = self.values.targets == (self.classes.background or 0)
            return pixels, found, np.full((height, width), self.values.known[background.argmax()])
        values = masks.read(name, (height, width))
        # CelebAMask-HQ's images are 1024 pixels wide, their masks 512.
        if masks.form == "parts" and values.shape != (height, width):
            writable = np.require(pixels, requirements=["W"])
            tensor = torch.from_numpy(writable).permute(2, 0, 1)
            resized = resize_image(tensor, (values.shape[0], values.shape[1]))
            pixels = np.ascontiguousarray(resized.permute(1, 2, 0).numpy())
        return pixels, found, values


def without_pixels(source: Any) -> Any:
    """Return a `FolderSource` of JPEG files for the device to decode: it reads masks, and of images the size alone.

    Raises a SegFitError if images are other files.
    """
    images = [source.listing.images[name] for name in source.names]
    others = [path for path in images if path.suffix.lower() not in JPEG_SUFFIXES]
    if others:
        raise SegFitError(
            f"data.decode=gpu: {len(others)} of {len(images)} training images are no JPEG files: {some(others)}. Take data.decode=cpu."
        )
    return replace(source, image_reader=HeaderReader())


def _sizes(image: NDArray[Any], mask: NDArray[Any]) -> str:
    return (
        f"image {image.shape[1]}×{image.shape[0]}, mask {mask.shape[1]}×{mask.shape[0]} "
        "(width × height)"
    )


def make_reader(data: DictConfig) -> ImageReader:
    """Return how files become images under a data config."""
    if data.name != "folder":
        return ImageReader()
    wanted, window = data.value_range, data.window and tuple(data.window)
    if wanted == "percentiles":
        window = window or PERCENTILES
    value_range = None if isinstance(wanted, str) else tuple(wanted)
    return ImageReader(data.image_mode, window, value_range, tuple(data.bands or ()) or None)


def folder_sources(data: DictConfig, classes: Classes) -> dict[str, FolderSource]:
    """Return the splits of a data set in folders: "train", "val" and perhaps "test"; `data` is a `FolderConfig`.

    Layouts: `root/<split>/<images>` + `root/<split>/<masks>`; `root/<images>/<split>` + `root/<masks>/<split>`;
    `root/<images>_<split>` + `root/<masks>_<split>`; `root/<images>` + `root/<masks>`, divided by `split`, as is the train
    folder where there is no val folder. Folders of splits may have any name of `split_of`; a test folder without masks is
    none. An image and its mask have one relative name, apart from the suffix, or names by `image_name` and `mask_name`.

    Raises a SegFitError with every problem that keeps the folders from being a data set. The pre-flight finds what is wrong
    with single files.
    """
    options = plain(data)
    naming, split = FolderConfig(**options), SplitConfig(**options["split"])
    place, lists = Path(naming.root).expanduser(), None
    if split.lists is None:
        layout, problems, notices = find_layout(place, naming)
    else:
        lists = place / split.lists
        layout, problems, notices = {"": [place / naming.images, place / naming.masks]}, [], []
    listings: dict[str, Listing] = {}
    for part, (image_folder, mask_path) in layout.items() if not problems else ():
        try:
            listings[part] = list_pairs(image_folder, mask_path, naming, classes.names, lists)
        except SegFitError as error:
            if part == "test":
                notices.append(
                    f"{image_folder}: no test split, for there is no mask. To predict it: evaluate.py images=… ({error})"
                )
            else:
                problems += error.problems
    raise_all(list(dict.fromkeys(problems)))
    values = ValueMap(len(classes), None, None)  # masks hold classes already
    if naming.mask_format == "png":
        maps = label_map_of(data) or None, color_table(data)
        values = ValueMap(len(classes), data.ignore_index, *maps)
    reader, meaning = make_reader(data), (values.known.tolist(), values.targets.tolist())
    about = (classes.names, classes.background, naming.mask_format, bool(values.colors), reader)
    first = [next(iter(listing.images.values())) for listing in listings.values()]
    volumes = any(real_file(path) != path for path in first)
    drawn = {"val", "test" if split.test else "val"} - listings.keys()
    idle = {
        "seed": lists is not None or not drawn,
        **{part: part in listings for part in ("val", "test")},
    }
    notices += [
        f"data.split.{name}={getattr(split, name)}: has no effect, as folders or lists say what is in which split."
        for name, unused in idle.items()
        if unused and getattr(split, name) != getattr(SplitConfig, name)
    ]
    if naming.slice_axis != FolderConfig.slice_axis and not volumes:
        notices.append(f"data.slice_axis={naming.slice_axis}: has no effect, as there is no NIfTI.")
    next(iter(listings.values())).notices[:0] = notices
    if split.group is None and volumes:
        split = replace(split, group=r"^(.*)/[xyz]\d{4}$")  # the slices of a volume stay together
    return {
        part: FolderSource(
            classes, names, listing, values, reader, repr((*about, meaning)), group=split.group
        )
        for part, (names, listing) in _divide(listings, split).items()
    }


def _divide(
    listings: Mapping[str, Listing], rule: SplitConfig
) -> dict[str, tuple[list[str], Listing]]:
    """Return split → names and where they are listed: train gives what has no folder of its own."""
    whole = listings.get("", listings.get("train"))
    assert whole is not None  # as find_layout made sure
    if whole.parts is not None:
        return {
            part: ([name for name in names if name in whole.images], whole)
            for part, names in whole.parts.items()
        }
    own = {part: listings[part] for part in ("val", "test") if part in listings}
    divided = split_names(sorted(whole.images), rule, own)
    members = {part: (names, whole) for part, names in divided.items()}
    return members | {part: (sorted(found.images), found) for part, found in own.items()}
