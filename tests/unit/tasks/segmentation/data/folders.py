"""Data sets in folders and the look at them before a training, as a config with little in it asks for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data import folder, preflight
from segfit.tasks.segmentation.data.schema import FolderConfig


def folder_sources(
    root: Path, *, classes: Classes, **options: Any
) -> dict[str, folder.FolderSource]:
    """Return the splits of a folder; the options are those of `FolderConfig`."""
    given = {"root": str(root), "num_classes": len(classes), **options}
    data = OmegaConf.merge(FolderConfig, given)
    assert isinstance(data, DictConfig)
    return folder.folder_sources(data, classes)


def check_sources(
    sources: Mapping[str, Any],
    *,
    check: str = "full",
    skip: bool = False,
    fit: str = "crop",
    size: tuple[int, int] = (32, 32),
    needs: Mapping[str, int] | None = None,
    progress: Any = None,
) -> preflight.PreflightReport:
    """Look at sources, as a training without augmentation does."""
    data = {"check": check, "on_bad_sample": "skip" if skip else "fail", "fit": fit}
    config = {"data": data, "image_size": list(size), "augmentation": {"name": "none"}}
    return preflight.check_sources(OmegaConf.create(config), sources, needs or {}, progress)
