"""Where the images and masks of a data set are, and which belongs to which."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from segfit.data.formats import real_file, with_slices
from segfit.data.images import only_images
from segfit.data.source import files_by_name, list_files, relative_name, some
from segfit.data.splits import find_splits, listed, split_of
from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.masks import MASK_SUFFIXES, Masks, find_parts, image_key
from segfit.tasks.segmentation.data.painted import OUTLINES, read_coco, read_table, table_id
from segfit.tasks.segmentation.data.schema import FolderConfig

_LOSSY = (".jpg", ".jpeg", ".jfif", ".jpe", ".webp")


@dataclass
class Listing:
    """Pairs of images and masks."""

    images: dict[str, Path]  # by relative name without suffix; only images that are used
    masks: Masks  # by the same names
    problems: list[str] = field(default_factory=list)  # files without a partner, and the like
    notices: list[str] = field(default_factory=list)  # what is odd, but no mistake
    unmasked: frozenset[str] = frozenset()  # images without a mask, all background
    parts: dict[str, list[str]] | None = None  # split → names, where lists say it


def find_layout(
    root: Path, naming: FolderConfig
) -> tuple[dict[str, list[Path]], list[str], list[str]]:
    """Return split → image folder and mask folder or CSV, the problems and the notices; "" where all is in one."""
    if not root.is_dir():
        text = f"data.root={root}: there is no such folder (looked in {Path.cwd()}). Give the folder that holds {naming.images}/."
        return {}, [text], []
    sides = naming.images, naming.masks
    layout, problems, notices = find_splits(root, sides)
    if layout.keys() == {""} and not (root / sides[0]).is_dir():
        below = [one for one in root.iterdir() if one.is_dir() and not split_of(one.name)]
        below = [
            one for one in below if (one / sides[0]).is_dir() or len(find_splits(one, sides)[0]) > 1
        ]
        if len(below) == 1:
            text = f"{root}: no folder '{sides[0]}' in it, but in {below[0].name}. Say data.root={below[0]}."
            return {}, [text], []
    form, held = naming.mask_format, [one.name for one in root.iterdir() if one.name[0] != "."]
    if not held:
        problems.append(f"data.root={root} is empty.")
    table = {"rle": "CSV", "coco": "JSON, or a folder of one for each split"}.get(form)
    there, sound = f"{root} holds {some(sorted(held))}.", not problems
    for part, places in layout.items():
        if form != "png" and not places[1].exists():
            places[1] = root / naming.masks  # one table, or one folder of parts, serves all splits
        if form == "coco" and places[1].is_dir():  # instances_train2017.json
            files = places[1].glob("*.json")
            called = {split_of(file.stem.removeprefix("instances_")): file for file in files}
            places[1] = called.get(part, places[1])
        if part == "test" or not sound:
            continue
        if not places[0].is_dir():
            problems.append(
                f"{places[0]}: no such folder (data.images). {there} There should be images/ and masks/ in it, or in train/, "
                "val/ and test/."
            )
        if not (places[1].is_file() if table else places[1].is_dir()):
            what = f"file (data.masks names the {table})" if table else "folder (data.masks)"
            problems.append(f"{places[1]}: no such {what}. {there}")
    return layout, list(dict.fromkeys(problems)), notices


def list_pairs(
    image_folder: Path,
    mask_path: Path,
    naming: FolderConfig,
    class_names: Sequence[str],
    lists: Path | None = None,
) -> Listing:
    """Return the images that have a mask, and what has no partner; `lists` is a folder of lists that divide the images.

    Raises a SegFitError if there is no image, or none has a mask, or a table or a list cannot be read.
    """
    together = image_folder.resolve() == mask_path.resolve()
    files = list_files(image_folder, (), skip=None if together else mask_path)
    if together:  # what is called as a mask is no image
        files = [file for file in files if not _is_mask(file, naming)]
        if not files:
            raise SegFitError(
                f"{image_folder}: images and masks lie together, and no suffix distinguishes them. Say what masks are called: "
                "'data.mask_name={stem}_mask.png'."
            )
    files, notices = only_images(files, image_folder)
    files = with_slices(files, naming.slice_axis)
    name_of = partial(_name, template=naming.image_name, whole="{name}" in (naming.mask_name or ""))
    images, problems = files_by_name(files, image_folder, name_of)
    if not images:
        raise SegFitError(f"data.image_name={naming.image_name}: {files[0]} is called otherwise.")
    parts = listed(lists, list(images)) if lists is not None else None
    if parts is not None:
        used = {name for names in parts.values() for name in names}
        unused = sorted(images.keys() - used)
        notices += _unused(image_folder, f"of {len(images)} images", unused, "are in no list")
        images = {name: images[name] for name in sorted(used)}
    listing = _pair(images, mask_path, class_names, naming)
    listing.problems[:0], listing.notices[:0], listing.parts = problems, notices, parts
    if parts is not None and not listing.images.keys() & parts.get("test", []):
        for name in parts.pop("test", []):  # competitions keep the masks of their test images
            images.pop(name, None)
    orphans = sorted(images.keys() - listing.images.keys())
    if not listing.images:
        raise SegFitError(
            f"{mask_path}: no image of {image_folder} has a mask here. {_wanted(naming, images[orphans[0]], mask_path)}"
            + "".join(f" {text}" for text in listing.problems + listing.notices)
        )
    if orphans:
        names = [images[name].relative_to(image_folder).as_posix() for name in orphans]
        text = f"{image_folder}: {len(orphans)} of {len(images)} images have no mask in {mask_path}"
        if naming.unmasked == "error":
            listing.problems.append(
                f"{text}: {some(names)}. {_wanted(naming, images[orphans[0]], mask_path)} "
                "Or data.unmasked=skip, or background, for all splits."
            )
        else:
            background = naming.unmasked == "background"
            listing.notices.append(
                f"{text} and {'count as background' if background else 'are left out'} (data.unmasked): {some(names)}."
            )
            if background:
                listing.unmasked = frozenset(orphans)
                listing.images |= {name: images[name] for name in orphans}
    return listing


def _name(file: Path, folder: Path, template: str | None, whole: bool = False) -> str | None:
    """Return what an image and its mask share of their names, after the folders; None for a file of another name.

    That is what stands for {stem} in a template such as "{stem}_mask.png", without one the name without suffix, or `whole`.
    """
    if (volume := real_file(file)) != file:
        name = _name(volume, folder, template, whole)
        return name and f"{name.removesuffix('.nii')}/{file.name}"
    shared = file.name if whole else file.stem
    if template is not None:
        suffix = "" if "." in template else r"\.\w+"
        pattern = re.sub(r"\\{\w+\\}", "(.+)", re.escape(template)) + suffix
        found = re.fullmatch(pattern, file.name, re.IGNORECASE)
        if found is None:
            return None
        shared = found[1]
    return relative_name(file.with_name(f"{shared}.x"), folder)


def _is_mask(file: Path, naming: FolderConfig) -> bool:
    if naming.mask_name is None:
        return file.suffix.lower() in OUTLINES.get(naming.mask_format, MASK_SUFFIXES)
    return _name(file, file.parent, naming.mask_name) is not None


def _wanted(naming: FolderConfig, image: Path, mask_path: Path) -> str:
    name = image.with_suffix("").name
    would = {
        "parts": f"be files named {image_key(name)}_<class name>.png",
        "coco": f"be among its images with the file_name {image.name}",
        "rle": f"have the id {' or '.join(dict.fromkeys(table_id(name)))}",
        "yolo": f"be {name}.txt",
        "labelme": f"be {name}.json",
    }
    if naming.mask_format != "png":
        return f"The mask of {image.name} would {would[naming.mask_format]}."
    # What has the image's name in its own shows what all masks are called.
    alike = [file.name for file in list_files(mask_path, MASK_SUFFIXES) if name in file.name]
    hint = "{stem}_mask.png"
    if alike:
        part, mark = (image.name, "{name}") if image.name in alike[0] else (name, "{stem}")
        hint = alike[0].replace(part, mark, 1)
    return (
        f"The mask of {image.name} would be {(naming.mask_name or '{stem}.png').format(stem=name, name=image.name)}. Masks of "
        f"other names: 'data.mask_name={hint}'; images: data.image_name."
    )


def _unused(place: Path, what: str, unused: Sequence[str], why: str = "have no image") -> list[str]:
    return [f"{place}: {len(unused)} {what} {why} and are not used: {some(unused)}."] * bool(unused)


def _pair(
    images: Mapping[str, Path], place: Path, class_names: Sequence[str], naming: FolderConfig
) -> Listing:
    """Return the images that have a mask of the form that `naming` says, and what reads it."""
    form, problems, notices = naming.mask_format, list[str](), list[str]()
    # image → what its mask is called in `found`, or None
    keys: dict[str, Any] = {name: name for name in images}
    found: Mapping[str, Any]
    shown: dict[str, str] = {}
    if form == "png":
        found, problems = _mask_files(images, place, naming)
        what, shown = "masks", {k: one.relative_to(place).as_posix() for k, one in found.items()}
    elif form == "parts":
        found, notices = find_parts(place, class_names)
        keys = {name: image_key(name.rsplit("/", 1)[-1]) for name in images}
        what = "sets of parts"
    elif form == "rle":
        found, what = read_table(place, class_names), "ids"
        keys = {name: next((i for i in table_id(name) if i in found), None) for name in images}
    elif form == "coco":
        found, what = read_coco(place, class_names), "outlined images"
        # By the whole name, or by that of the file alone where it is one file's.
        alone = {key.rsplit("/", 1)[-1]: key for key in found}
        alone = alone if len(alone) == len(found) else {}
        keys = {n: n if n in found else alone.get(n.rsplit("/", 1)[-1]) for n in images}
    else:
        found, problems = files_by_name(list_files(place, OUTLINES[form]), place)
        what = "outlined images"
    paired = {name: found[key] for name, key in keys.items() if key in found}
    unused = sorted(shown.get(key, key) for key in found.keys() - set(keys.values()))
    notices += _unused(place, f"of {len(found)} {what}", unused)
    if form in OUTLINES:
        notices.append(f"{place}: where outlines overlap, later ones cover earlier ones.")
    masks = Masks("colors" if naming.colors else form, paired, place, class_names)
    return Listing({name: images[name] for name in paired}, masks, problems, notices)


def _mask_files(
    images: Mapping[str, Path], folder: Path, naming: FolderConfig
) -> tuple[dict[str, Path], list[str]]:
    """Return name → mask file, and what is wrong with them."""
    files = list_files(folder, ())
    kinds = {file.suffix for file in files if file.suffix.lower() not in MASK_SUFFIXES}
    files = with_slices([file for file in files if file.suffix not in kinds], naming.slice_axis)
    masks, problems = files_by_name(files, folder, partial(_name, template=naming.mask_name))
    beside = next(iter(images.values())).is_relative_to(folder)
    if kinds and images.keys() - masks.keys() and not beside:
        lossy = ", since JPEG changes indices" * any(kind.lower() in _LOSSY for kind in kinds)
        problems.append(
            f"{folder}: files of type {some(sorted(kinds))} are no masks: masks must be "
            f"{' '.join(s[1:] for s in MASK_SUFFIXES)}{lossy}."
        )
    return masks, problems
