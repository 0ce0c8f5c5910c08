"""Configs of which is known whether they are right, and if not, where they are wrong.

Keys, types and limits come from the schema; what several keys have to agree on is written down here.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from segfit.config.schema import USED
from segfit.tasks.segmentation import schema
from tests.fuzz.keys import COMMANDS, Composition, Key, keys
from tests.fuzz.text import as_override

HUGE = 2**32
BEYOND_FLOATS = 10**400

# Keys that have to agree with others, or name files or things that only the work itself knows.
COUPLED = {
    "augmentation.scale", "augmentation.blur_sigma", "augmentation.mixup", "augmentation.cutmix",
    "data.num_classes", "data.class_names", "data.class_colors", "data.background", "data.mean",
    "data.std", "data.window", "data.image_name", "data.mask_name", "data.image_mode", "data.label_map", "data.ignore_index",
    "data.mask_format", "data.split.fold", "data.split.folds", "data.split.val", "data.split.test", "data.split.group",
    "loss.class_weights", "loss.tversky_alpha", "loss.tversky_beta",
    "optimizer.name", "optimizer.betas", "optimizer.momentum", "optimizer.head_lr_factor", "image_size", "epochs", "patience", "val_every", "device",
    "model.weights", "model.encoder", "init", "freeze", "freeze_epochs", "compile_mode", "resume", "resume_sweep",
}  # fmt: skip


# ------------------------------------------------------------------------------- what is right


def right(key: Key) -> SearchStrategy[Any]:
    """Return values that the schema allows, its limits among them."""
    one = _right_item(key)
    value = st.lists(one, min_size=1, max_size=4) if key.many else one
    return st.none() | value if key.optional else value


def _right_item(key: Key) -> SearchStrategy[Any]:
    if "choices" in key.limits:
        return st.sampled_from(key.limits["choices"])
    if key.kind is bool:
        return st.booleans()
    if key.kind is str:
        return st.text("abcxyzéß 中/._-", min_size=1, max_size=8).filter(lambda text: text.strip())
    low = 0 if key.lowest is None else key.lowest
    high = low + 1000 if key.highest is None else key.highest
    if key.kind is int:
        return st.integers(int(low), int(high))
    above, below = "gt" in key.limits, "lt" in key.limits
    return st.floats(
        low, high, exclude_min=above, exclude_max=below, allow_nan=False, allow_subnormal=False
    )


@st.composite
def agreeing(draw: Any, composition: Composition) -> dict[str, Any]:
    """Return values of the coupled keys that agree."""
    share = st.floats(0, 0.5)
    pair = st.lists(st.floats(0.1, 10), min_size=2, max_size=2).map(sorted)
    side = st.integers(32, 400)
    epochs, every = draw(st.integers(2, 50)), draw(st.integers(1, 9))
    most_patient = (epochs - 1) // every
    values: dict[str, Any] = {
        "image_size": draw(side | st.lists(side, min_size=2, max_size=2)),
        "epochs": epochs,
        "val_every": every,
        "patience": draw(st.none() | st.integers(1, most_patient)) if most_patient else None,
        "augmentation.scale": draw(pair),
        "augmentation.blur_sigma": draw(pair),
        "augmentation.mixup": draw(share),
        "augmentation.cutmix": draw(share),
        "data.mean": draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)),
        "data.std": draw(st.lists(st.floats(0.001, 2), min_size=3, max_size=3)),
        "data.class_names": draw(st.sampled_from([["a", "b", "c", "d"], ["é", "中", "0", "x y"]])),
        "data.background": draw(st.none() | st.integers(0, 3)),
        "loss.class_weights": draw(
            st.sampled_from(["none", "balanced", [1, 2, 3, 4], [0, 0.5, 0, 1]])
        ),
        "loss.tversky_alpha": draw(st.floats(0.1, 10)),
        "device": "cpu",
    }
    if "data=folder" in composition.choices:
        values["data.split.val"] = draw(st.floats(0.1, 0.5))
        values["data.split.test"] = draw(st.floats(0, 0.4))
        values["data.split.group"] = draw(st.sampled_from([None, r"case\d+", "^(a|b)"]))
        values["data.label_map"] = draw(st.sampled_from([None, {0: 0, 255: 1}, {65535: 3, 7: 255}]))
        values["data.image_mode"] = draw(st.sampled_from(["rgb", "gray"]))
        if values["data.image_mode"] == "gray":
            values["data.window"] = draw(pair)
    chosen = draw(st.sets(st.sampled_from(sorted(values)), max_size=4))
    for together in ({"epochs", "val_every", "patience"}, {"data.image_mode", "data.window"}):
        chosen |= together if chosen & together else set()
    return {key: values[key] for key in sorted(chosen & values.keys())}


@dataclass(frozen=True)
class Case:
    """A composition, values for some of its keys, and which of them are wrong."""

    composition: Composition
    values: dict[str, Any]
    wrong: list[str] = field(default_factory=list)  # dotted

    @property
    def arguments(self) -> list[str]:
        return [*self.composition.choices, *map(as_override, self.values.items())]


@st.composite
def right_cases(draw: Any, among: SearchStrategy[Composition] = COMMANDS) -> Case:
    """Return a config in which nothing is wrong."""
    composition = draw(among)
    free = [key for key in composition.keys if key.path not in COUPLED]
    picked = draw(st.lists(st.sampled_from(free), max_size=5, unique_by=lambda key: key.path))
    values = {key.path: draw(right(key)) for key in picked} | draw(agreeing(composition))
    return Case(composition, effective(values, composition.choices))


# What switches options on, where neither a choice nor a value says otherwise.
SWITCHES: dict[str, Any] = {
    "loss.name": "dice_ce", "augmentation.name": "cpu", "precision.name": "auto", "scheduler.name": "none",
    "augmentation.affine": 0.7, "augmentation.color_jitter": 0.5, "augmentation.blur": 0.1,
    "augmentation.noise": 0.1, "data.fit": "stretch", "loss.class_weights": "none",
}  # fmt: skip


def effective(values: dict[str, Any], choices: tuple[str, ...]) -> dict[str, Any]:
    """Return the values but for those of options that have no effect."""
    chosen = {f"{group}.name": name for group, _, name in (text.partition("=") for text in choices)}
    state, idle = {**SWITCHES, **chosen, **values}, set()
    for switch, allowed, names in (*USED, *schema.USED):
        now = state.get(switch)
        if not (str(now) in allowed.split() if allowed else now):
            idle |= {f"{switch.rpartition('.')[0]}.{name}" for name in names.split()}
    return {key: value for key, value in values.items() if key not in idle}


# ------------------------------------------------------------------------------- what is wrong


def out_of_range(key: Key) -> SearchStrategy[Any]:
    """Return values of the right type that the limits refuse."""
    one = _out_of_range_item(key)
    return one.map(lambda value: [value]) if key.many else one


def _out_of_range_item(key: Key) -> SearchStrategy[Any]:
    if "choices" in key.limits:
        return st.text("abcé😀 ", max_size=8).filter(lambda text: text not in key.limits["choices"])
    nowhere: SearchStrategy[Any] = st.just(float("nan")) | st.just(float("inf"))
    whole_ones = st.integers(HUGE, 10**40) | st.just(BEYOND_FLOATS)
    wrong = [whole_ones] if key.kind is int else [nowhere]
    whole = key.kind is int
    if key.lowest is not None:
        wrong.append(
            st.integers(-(10**12), int(key.lowest) - 1)
            if whole
            else st.floats(max_value=key.lowest, exclude_max="ge" in key.limits, allow_nan=False)
        )
    if key.highest is not None:
        wrong.append(
            st.integers(int(key.highest) + 1, 10**12)
            if whole
            else st.floats(min_value=key.highest, exclude_min="le" in key.limits, allow_nan=False)
        )
    return st.one_of(wrong)


def has_a_range(key: Key) -> bool:
    return "choices" in key.limits or key.kind in (int, float)


def of_another_type(key: Key) -> SearchStrategy[Any]:
    """Return values that Hydra refuses, since they are of another type."""
    wrong: list[Any] = [{"a": 1}, {}]
    if not key.optional:
        wrong.append(None)
    if key.many:
        wrong += ["many", 3, [None], [[1], {"a": 1}]]
    else:
        wrong += [[], [1], [[None]]]
    if key.kind in (int, float) and not key.many:
        wrong += ["many", "", "1,5 m", "٣x", "0x1g", "nan?", "--1"]
    if key.kind is int and not key.many:
        wrong += [1.5, True, float("nan"), float("inf"), "1e3"]
    if key.kind is bool:
        wrong += ["maybe", "", 1.5]
    return st.sampled_from(wrong)


EVALUATION = Composition(
    ("run=x",),
    tuple(key for key in keys(schema.Evaluate) if "precision" not in key.path),
    "evaluate",
)


@st.composite
def broken_cases(
    draw: Any, *, by_type: bool, among: SearchStrategy[Composition] = COMMANDS
) -> Case:
    """Return a config with one to three values that are out of range, or of another type."""
    evaluation = among is COMMANDS and draw(st.integers(0, 9)) == 0
    case = Case(EVALUATION, {}) if evaluation else draw(right_cases(among))
    able = [key for key in case.composition.keys if by_type or has_a_range(key)]
    picked = draw(
        st.lists(st.sampled_from(able), min_size=1, max_size=3, unique_by=lambda k: k.path)
    )
    break_it = of_another_type if by_type else out_of_range
    wrong = {key.path: draw(break_it(key)) for key in picked}
    return Case(case.composition, {**case.values, **wrong}, sorted(wrong))
