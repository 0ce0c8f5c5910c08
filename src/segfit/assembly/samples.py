"""The list of a run's samples by split: what was trained on is not taken for held out once files come or go."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from omegaconf import DictConfig

from segfit.data.files import some
from segfit.data.source import Source
from segfit.data.splits import groups_of
from segfit.errors import SegFitError
from segfit.runs.files import read_json

Samples: TypeAlias = Mapping[str, Mapping[str, str]]  # split → name → content key, "" if unknown


def samples_of(sources: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return what is known of the samples that are files; contents once the pre-flight has looked at them."""
    return {
        split: {name: source.contents.get(name, "") for name in source.names}
        for split, source in sources.items()
        if hasattr(source, "contents")
    }


def read_samples(path: Path) -> dict[str, dict[str, str]]:
    """Return a run's list, empty where it has none; raise a SegFitError if the file holds anything else."""
    found = read_json(path)
    plain = all(isinstance(names, dict) for names in found.values())
    if not plain or not all(isinstance(k, str) for one in found.values() for k in one.values()):
        raise SegFitError(f"{path}: no list of samples. Delete it, and splits are drawn anew.")
    return found


def kept_splits(
    config: DictConfig, sources: Mapping[str, Source], before: Samples
) -> dict[str, Source]:
    """Return sources in which samples of a run are in the split that they had, where splits are drawn; so is all of a group."""
    found: dict[str, Any] = dict(sources)
    pool = getattr(found.get("train"), "pool", None)
    drawn = [split for split, source in found.items() if getattr(source, "pool", ()) is pool]
    if len(drawn) < 2 or not before:
        return found
    group, kept = config.data.split.group, dict[str, str]()
    for split in drawn:
        kept |= dict.fromkeys(groups_of(list(before.get(split, ())), group), split)
    placed: dict[str, list[str]] = {split: [] for split in drawn}
    for split in drawn:
        names = found[split].names
        for name, key in zip(names, groups_of(names, group), strict=True):
            placed[kept.get(key, split)].append(name)
    return found | {split: replace(found[split], names=sorted(placed[split])) for split in drawn}


def differences(before: Samples, now: Samples) -> list[str]:
    """Return what was added, removed or changed since a run, and what was trained on and is held out, a line a split."""
    lines = []
    train = {**before.get("train", {}), **now.get("train", {})}
    trained = {key.partition(" ")[0]: name for name, key in train.items() if key}
    for split, names in now.items():
        old = before.get(split, {})
        changes = {
            "added": names.keys() - old.keys(),
            "removed": old.keys() - names.keys(),
            "changed": {
                name for name, key in names.items() if key and old.get(name, key) not in ("", key)
            },
        }
        said = [
            f"{len(them)} {what} ({some(sorted(them))})" for what, them in changes.items() if them
        ]
        if old and said:
            lines.append(f"{split} is not what the run had: {', '.join(said)}.")
        if split == "train":
            continue
        seen = []
        for name, key in names.items():
            there = trained.get(key.partition(" ")[0])
            if there is not None:
                seen.append(name if there == name else f"{name} (there {there})")
            elif not key and old and name in train and name not in old:
                seen.append(name)
        if seen:
            lines.append(
                f"{split}: {len(seen)} of {len(names)} are among what was trained on, so its scores are too good: "
                f"{some(seen)}. Take them out of train or {split}."
            )
    return lines
