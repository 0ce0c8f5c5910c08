"""The keys, types and limits of the schema, and the choices of groups that decide which keys there are."""

import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st

from segfit.config import benchmark as config_benchmark
from segfit.tasks.segmentation import schema


@dataclass(frozen=True)
class Key:
    """An option of the schema."""

    path: str
    kind: type
    many: bool
    optional: bool
    limits: dict[str, Any]

    @property
    def lowest(self) -> float | None:
        return self.limits.get("ge", self.limits.get("gt"))

    @property
    def highest(self) -> float | None:
        return self.limits.get("le", self.limits.get("lt"))


@cache
def keys(owner: type, prefix: str = "") -> tuple[Key, ...]:
    """Return the options of a schema class that are plain values or lists of them."""
    found: list[Key] = []
    hints = typing.get_type_hints(owner)
    for item in fields(owner):
        inner, optional = _without_none(hints[item.name])
        if is_dataclass(inner):
            found += keys(inner, f"{prefix}{item.name}.")
            continue
        many = typing.get_origin(inner) is list
        kind = typing.get_args(inner)[0] if many else inner
        if kind in (int, float, bool, str) and item.metadata:
            found.append(Key(f"{prefix}{item.name}", kind, many, optional, dict(item.metadata)))
    return tuple(found)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    (inner,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return inner, True


MODELS = {
    "segformer_b0": schema.SegFormerConfig,
    "cnn": schema.CnnConfig,
    "timm_unet": schema.TimmUnetConfig,
}
DATA = {"shapes": schema.ShapesConfig, "folder": schema.FolderConfig}
LOSSES = ("ce", "dice", "dice_ce", "focal", "tversky", "lovasz", "lovasz_ce")
FOLDER = ("data.root=x", "data.num_classes=4")


@dataclass(frozen=True)
class Composition:
    """Choices of groups, and the keys that there are with them."""

    choices: tuple[str, ...]
    keys: tuple[Key, ...]
    name: str = "train"


@cache
def composition(model: str, data: str, others: tuple[str, ...], mode: str | None) -> Composition:
    choices = ["hardware=cpu", f"model={model}", f"data={data}", *others]
    choices += FOLDER if data == "folder" else ()
    shared = [
        key
        for key in keys(schema.Run)
        if not key.path.startswith(("task.", "model.", "data.", "hardware."))
        and key.path != "loss.name"
    ]
    every = (*shared, *keys(MODELS[model], "model."), *keys(DATA[data], "data."))
    if mode is None:
        return Composition(tuple(choices), every)
    every += keys(config_benchmark.MODES[mode], "benchmark.")
    return Composition((*choices, f"benchmark={mode}"), every, "benchmark")


RUNS = st.builds(
    composition,
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(DATA)),
    st.just(()),
    st.none(),
)
_CHOICES = st.tuples(
    st.sampled_from([f"loss={name}" for name in LOSSES]),
    st.sampled_from(["augmentation=cpu", "augmentation=kornia-gpu", "augmentation=none"]),
)
SHAPES = st.builds(
    composition, st.sampled_from(sorted(MODELS)), st.just("shapes"), _CHOICES, st.none()
)
COMMANDS = st.builds(
    composition,
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(DATA)),
    _CHOICES,
    st.none() | st.none() | st.sampled_from(sorted(config_benchmark.MODES)),
)
