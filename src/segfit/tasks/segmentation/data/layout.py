"""Where the images and masks of a data set are, and which belongs to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segfit.data.files import files_by_name, list_files, some
from segfit.data.images import IMAGE_SUFFIXES
from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.masks import (
    MASK_SUFFIXES,
    FolderMasks,
    MaskReader,
    PartMasks,
    find_parts,
    image_key,
)
from segfit.tasks.segmentation.data.rle import RleMasks, read_table, table_id

SPLITS = ("train", "val", "test")


@dataclass
class Listing:
    """Pairs of images and masks."""

    images: dict[str, Path]  # by relative name without suffix; only images that have a mask
    masks: MaskReader  # by the same names
    problems: list[str] = field(default_factory=list)  # files without a partner, and the like
    notices: list[str] = field(default_factory=list)  # what is odd, but no mistake


def find_layout(
    root: Path, images: str, masks: str, mask_format: str
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Return split → (image folder, mask folder or CSV), and the problems; "" where all is in one."""
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        hint = "" if root.is_absolute() else f" (looked in {Path.cwd()})"
        return {}, [f"data.root={root} {what}{hint}. Give the folder that holds {images}/."]
    layout: dict[str, tuple[Path, Path]] = {}
    for part in SPLITS:
        if (root / part / images).is_dir():
            layout[part] = (root / part / images, root / part / masks)
        elif (root / images / part).is_dir():
            layout[part] = (root / images / part, root / masks / part)
    problems = [
        f"{root / part}: no folder '{images}' in it. A split holds {images}/ and {masks}, or set "
        "data.images to what its image folder is called."
        for part in SPLITS
        if part not in layout and (root / part).is_dir() and Path(images).parts[:1] != (part,)
    ]
    if not layout:
        layout = {"": (root / images, root / masks)}
    elif "train" not in layout:
        problems.append(f"{root}: there is {' and '.join(layout)}, but no train folder.")
    for part, (image_folder, mask_path) in layout.items():
        if mask_format != "png" and not mask_path.exists():
            # One table, or one folder of parts, serves all splits.
            layout[part] = (image_folder, root / masks)
    if not problems:
        for image_folder, mask_path in layout.values():
            problems += _missing(root, image_folder, mask_path, mask_format)
    return layout, list(dict.fromkeys(problems))


def _missing(root: Path, image_folder: Path, mask_path: Path, mask_format: str) -> list[str]:
    entries = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    if not entries:
        return [f"data.root={root} is empty."]
    there = f"{root} holds {some(entries)}"
    problems = []
    if not image_folder.is_dir():
        problems.append(
            f"{image_folder}: no such folder (data.images). {there}. There should be images/ and masks/ "
            "in it, or in train/, val/ and test/."
        )
    if mask_format == "rle" and not mask_path.is_file():
        problems.append(f"{mask_path}: no such file (data.masks names the CSV). {there}.")
    elif mask_format != "rle" and not mask_path.is_dir():
        problems.append(f"{mask_path}: no such folder (data.masks). {there}.")
    return problems


def list_pairs(
    image_folder: Path, mask_path: Path, mask_format: str, class_names: Sequence[str]
) -> Listing:
    """Return the images that have a mask, and what has no partner.

    Raises:
        SegFitError: if there is no image, or none has a mask, or the table cannot be read.
    """
    files = list_files(image_folder, IMAGE_SUFFIXES, skip=mask_path)
    if not files:
        other = sorted({p.suffix for p in list_files(image_folder, ())})
        found = f"; it holds files of type {some(other)}" if other else ""
        raise SegFitError(
            f"{image_folder}: no image in it ({' '.join(s[1:] for s in IMAGE_SUFFIXES)}){found}."
        )
    images, problems = files_by_name(files, image_folder)
    pair = {"png": _pair_files, "parts": _pair_parts, "rle": _pair_rows}[mask_format]
    listing = pair(images, mask_path, class_names)
    listing.problems[:0] = problems
    orphans = sorted(images.keys() - listing.images.keys())
    if not listing.images:
        example = images[orphans[0]].relative_to(image_folder).as_posix()
        raise SegFitError(
            f"{mask_path}: no image of {image_folder} has a mask here. {_wanted(mask_format, example)}"
            + "".join(f" {text}" for text in listing.problems + listing.notices)
        )
    if orphans:
        names = [images[name].relative_to(image_folder).as_posix() for name in orphans]
        listing.problems.append(
            f"{image_folder}: {len(orphans)} of {len(images)} images have no mask in {mask_path}: "
            f"{some(names)}. {_wanted(mask_format, names[0])}"
        )
    return listing


def _wanted(mask_format: str, example: str) -> str:
    name = Path(example).with_suffix("").as_posix()
    if mask_format == "parts":
        return f"The mask of {example} would be files named {image_key(Path(name).name)}_<class name>.png."
    if mask_format == "rle":
        return (
            f"The rows of {example} would have the id {' or '.join(dict.fromkeys(table_id(name)))}."
        )
    return f"The mask of {example} would be {name}.png: the same name with another suffix."


def _unused(place: Path, what: str, unused: Sequence[str]) -> list[str]:
    """Return a notice about masks without an image, if there are any."""
    text = f"{place}: {len(unused)} {what} have no image and are not used: {some(unused)}."
    return [text] if unused else []


def _pair_files(images: Mapping[str, Path], folder: Path, _: Sequence[str]) -> Listing:
    masks, problems = files_by_name(list_files(folder, MASK_SUFFIXES), folder)
    paired = {name: path for name, path in images.items() if name in masks}
    unused = [masks[n].relative_to(folder).as_posix() for n in sorted(masks.keys() - images.keys())]
    files = list_files(folder, ()) if len(paired) < len(images) else []
    others = [p for p in files if p.suffix.lower() not in MASK_SUFFIXES]
    if others:
        problems.append(
            f"{folder}: {len(others)} files are no masks ({some(sorted({p.suffix for p in others}))}): "
            f"masks must be {' '.join(s[1:] for s in MASK_SUFFIXES)}, since JPEG changes indices."
        )
    notices = _unused(folder, f"of {len(masks)} masks", unused)
    return Listing(paired, FolderMasks({n: masks[n] for n in paired}), problems, notices)


def _pair_parts(images: Mapping[str, Path], folder: Path, class_names: Sequence[str]) -> Listing:
    found, others = find_parts(list_files(folder, MASK_SUFFIXES), class_names)
    keys = {name: image_key(name.rsplit("/", 1)[-1]) for name in images}
    paired = {name: path for name, path in images.items() if keys[name] in found}
    notices = []
    if others:
        names = [f"{part} ({count} files)" for part, count in sorted(others.items())]
        notices.append(
            f"{folder}: parts that are none of data.class_names count as "
            f"{class_names[0]}: {some(names, 20)}."
        )
    unused = sorted(found.keys() - set(keys.values()))
    notices += _unused(folder, f"of {len(found)} sets of parts", unused)
    return Listing(paired, PartMasks({n: found[keys[n]] for n in paired}), [], notices)


def _pair_rows(images: Mapping[str, Path], path: Path, class_names: Sequence[str]) -> Listing:
    table = read_table(path, class_names)
    ids = {name: next((i for i in table_id(name) if i in table), "") for name in images}
    rows = {name: (key, table[key]) for name, key in ids.items() if key}
    unused = sorted(table.keys() - set(ids.values()))
    notices = _unused(path, f"of {len(table)} ids", unused)
    return Listing({name: images[name] for name in rows}, RleMasks(path, rows), [], notices)
