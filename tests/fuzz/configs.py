"""Command lines of which is known whether they are right, and if not, where they are wrong.

Keys, types and limits come from the schema; what several keys have to agree on is written down here.
"""

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from segfit import config as schema
from segfit import config_benchmark

HUGE = 2**32

# Keys that have to agree with others, or name files or things that only the work itself knows.
COUPLED = {
    "augmentation.scale", "augmentation.blur_sigma", "augmentation.mixup", "augmentation.cutmix",
    "data.num_classes", "data.class_names", "data.class_colors", "data.background", "data.mean",
    "data.std", "data.window", "data.image_mode", "data.label_map", "data.ignore_index",
    "data.mask_format", "data.split.val", "data.split.test", "data.split.group",
    "loss.class_weights", "loss.tversky_alpha", "loss.tversky_beta",
    "optimizer.name", "optimizer.betas", "image_size", "epochs", "patience", "val_every", "device",
    "model.weights", "model.encoder", "resume", "resume_sweep",
}  # fmt: skip


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
        for key in keys(schema.RunConfig)
        if not key.path.startswith(("model.", "data.", "hardware.")) and key.path != "loss.name"
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
    st.sampled_from(["augmentation=cpu", "augmentation=kornia_gpu", "augmentation=none"]),
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
    return Case(
        composition, {key.path: draw(right(key)) for key in picked} | draw(agreeing(composition))
    )


# ------------------------------------------------------------------------------- what is wrong


def out_of_range(key: Key) -> SearchStrategy[Any]:
    """Return values of the right type that the limits refuse."""
    one = _out_of_range_item(key)
    return one.map(lambda value: [value]) if key.many else one


def _out_of_range_item(key: Key) -> SearchStrategy[Any]:
    if "choices" in key.limits:
        return st.text("abcé😀 ", max_size=8).filter(lambda text: text not in key.limits["choices"])
    nowhere: SearchStrategy[Any] = st.just(float("nan")) | st.just(float("inf"))
    wrong = [st.integers(HUGE, 10**40)] if key.kind is int else [nowhere]
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
    tuple(key for key in keys(schema.EvaluateConfig) if "precision" not in key.path),
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


@dataclass(frozen=True)
class Broken:
    """A command line of train.py, and the keys that are wrong in it."""

    arguments: list[str]
    wrong: list[str]


def _n(low: int, high: int) -> SearchStrategy[int]:
    return st.integers(low, high)


_LISTS = st.lists(_n(0, 9), max_size=8)
# Right one by one, wrong together; or wrong in a way that no limit tells. The key that has to be named → overrides.
CONTRADICTIONS: dict[str, SearchStrategy[list[str]]] = {
    "image_size": (_n(-100, 31) | _n(16385, 10**15) | st.just(True) | st.floats() | st.text("ab6 ", min_size=1)
        | _LISTS | st.just({64: 64, 65: 65}) | st.just([64, 16]) | st.just(None)).map(lambda v: [f"image_size={as_text(v)}"]),
    "augmentation.scale": st.tuples(st.floats(1, 10), st.floats(0.1, 0.9)).map(lambda v: [f"augmentation.scale={as_text(list(v))}"]),
    "augmentation.blur_sigma": st.lists(st.floats(1, 2), max_size=5).filter(lambda v: len(v) != 2).map(lambda v: [f"augmentation.blur_sigma={as_text(v)}"]),
    "augmentation.mixup": st.tuples(st.floats(0.51, 1), st.floats(0.5, 1)).map(lambda v: [f"augmentation.mixup={v[0]}", f"augmentation.cutmix={v[1]}"]),
    "data.mean": st.lists(st.floats(0, 1), max_size=5).filter(lambda v: len(v) != 3).map(lambda v: [f"data.mean={as_text(v)}"]),
    "data.std": st.lists(st.floats(0.1, 1), max_size=5).filter(lambda v: len(v) != 3).map(lambda v: [f"data.std={as_text(v)}"]),
    "optimizer.betas": st.lists(st.floats(0, 0.9), max_size=5).filter(lambda v: len(v) not in (2, 3)).map(lambda v: [f"optimizer.betas={as_text(v)}"]),
    "data.num_classes": _n(5, 255).map(lambda v: [f"data.num_classes={v}", "data.class_names=null", "data.class_colors=null"]),
    "data.class_names": st.lists(st.sampled_from("abc"), max_size=6).map(lambda v: [f"data.class_names={as_text(v)}"]),
    "data.class_colors": st.lists(st.lists(_n(-5, 300), min_size=3, max_size=3), min_size=4, max_size=4)
        .filter(lambda v: not all(0 <= x <= 255 for one in v for x in one)).map(lambda v: [f"data.class_colors={as_text(v)}"]),
    "data.background": _n(4, 300).map(lambda v: [f"data.background={v}"]),
    "loss.class_weights": (st.sampled_from(["balancd", "", None, 3, {"a": 1}, [0, 0, 0, 0], [True, 1, 1, 1], [1, 1, 1, None],
        [1, 1, 1, float("inf")], [1, float("nan"), 1, 1], ["a", 1, 1, 1], [[1], 1, 1, 1], [-1, 1, 1, 1]]) | _LISTS.filter(lambda v: len(v) != 4))
        .map(lambda v: [f"loss.class_weights={as_text(v)}"]),
    "loss.tversky_alpha": st.just(["loss=tversky", "loss.tversky_alpha=0", "loss.tversky_beta=0"]),
    "patience": st.tuples(_n(2, 50), _n(1, 9)).flatmap(lambda v: _n(-(-v[0] // v[1]), 10**6)
        .map(lambda p: [f"epochs={v[0]}", f"val_every={v[1]}", f"patience={p}"])),
    "model.name": st.sampled_from(["cnn", "timm_unet", "unet", ""]).map(lambda v: [f"model.name={v}"]),
    "data.name": st.sampled_from(["folder", "cityscapes", ""]).map(lambda v: [f"data.name={v}"]),
    "data.label_map": (st.sampled_from([3, "a", [1, 2], {0: "liver"}, {"a": 0}, {0: None}, {0: 4}, {0: True}, {-1: 0}, {65536: 0}, {0: [1]}])
        | st.dictionaries(_n(0, 300), _n(4, 254), min_size=1, max_size=5)).map(lambda v: ["data=folder", *FOLDER, f"data.label_map={as_text(v)}"]),
    "data.split.group": st.sampled_from(["(", "[a", "*x", "(?P<a>b)(?P<a>c)", "a{2,1}"]).map(lambda v: ["data=folder", *FOLDER, f"data.split.group={as_text(v)}"]),
    "data.split.val": st.tuples(st.floats(0.5, 0.9), st.floats(0.5, 0.9)).map(lambda v: ["data=folder", *FOLDER, f"data.split.val={v[0]}", f"data.split.test={v[1]}"]),
    "data.window": st.just(["data=folder", *FOLDER, "data.window=[1,99]"]),
    "data.root": st.sampled_from([["data=folder", "data.num_classes=4"], ["data=folder", "data.num_classes=4", "data.root="]]),
}  # fmt: skip


def contradictions() -> SearchStrategy[Broken]:
    def of(key: str) -> SearchStrategy[Broken]:
        base = ["hardware=cpu", "model=segformer_b0"]
        return CONTRADICTIONS[key].map(lambda line: Broken([*base, *line], [key]))

    return st.sampled_from(sorted(CONTRADICTIONS)).flatmap(of)


MISSPELT = {
    "modle": "cnn", "batchsize": 4, "optimizer.weight_deacy": 0, "loader.wokers": 1, "data.fitt": "pad",
    "+new": 1, "+loss.gamma": 2, "a.b.c": 3, "lr.x": 1, "trainer": "gpu", "~wramup": "", "model@data": "cnn",
    "hardware": "8g", "model": "cmn", "data": "../model/cnn", "loss": 3, "experiment": "nope", "precision": None,
}  # fmt: skip


def misspelt() -> SearchStrategy[Broken]:
    return st.lists(
        st.sampled_from(sorted(MISSPELT)), min_size=1, max_size=2, unique=True
    ).map(
        lambda wrong: Broken(
            [f"{key}={as_text(MISSPELT[key])}" for key in wrong], [key.lstrip("+~") for key in wrong]
        )
    )  # fmt: skip


# Pieces that Hydra's grammar has a meaning for, and some that it has none for.
_PIECES = st.sampled_from([
    "lr", "epochs", "model", "data", "=", "==", "=", "=", "+", "++", "~", "@", ":", ",", ".", "..", "[", "]", "{", "}",
    "(", ")", "${lr}", "${", "}", "'", '"', "\\", " ", "\t", "null", "true", "1", "-1", "1e400", "nan", "é", "😀", "\u202e",
    "choice(1,2)", "range(1)", "glob(*)", "sort(1)", "int(", "tag(t, 1)", "hydra.verbose", "/", "../", "*", "%", "#", "!",
    "9" * 5000, "0" * 50, "\x7f", "${oc.env:HOME}", "${oc.env:NOPE}", "${epochs}", "${nothere.x}", "\udcff",
])  # fmt: skip


def noise() -> SearchStrategy[list[str]]:
    """Return command lines that may mean anything."""
    after = st.lists(_PIECES, max_size=5).map("".join)
    argument = st.tuples(
        st.sampled_from(
            ["lr=", "image_size=", "model=", "data.class_names=", "loader=", "+x=", ""]
        ),
        after | st.text(max_size=6),
    ).map("".join)
    return st.lists(argument, min_size=1, max_size=2)


# ----------------------------------------------------------------------------------------- text


def as_override(item: tuple[str, Any]) -> str:
    return f"{item[0]}={as_text(item[1])}"


def as_text(value: Any) -> str:
    """Return a value as one types it on Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{as_text(k)}: {as_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(as_text, value)) + "]"
    if value.isascii() and value.isalnum() and value not in ("null", "true", "false"):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" if value else ""


# ------------------------------------------------------------------------------------ run folders

# What may stand in a config.yaml that nobody of ours wrote.
_NODES = st.sampled_from([
    "", "null", "~", "[]", "{}", "3", "-1", "1e999", ".nan", "yes", "2024-13-45", "2024-01-01", "0x1F", "1:30", "'${lr}'",
    "${oc.env:HOME}", "*x", "&x [*x]", "&x 3", "!!int abc", "!!float abc", "!!bool abc", "!!timestamp abc", "!!binary abc",
    "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [{a: 1}]", '!!omap [{a: "${oc.env:HOME}"}]', "!!pairs [{a: 1}]",
    "!!python/object/apply:os.system [true]", "!!python/name:os.system", "{_target_: os.system}", "{name: cnn}", "{name: [cnn]}",
    "{name: {a: 1}}", "???", "'???'", "[[[[[[]]]]]]", "{? [a, b] : c}", "{null: 1}", "{1: 2}", "{true: 1}", "{1.5: 1}", "|\n  text",
    "[1, 2", "{a: 1", "'", '"\\x00"', '"\\ud800"', "%TAG", "@", "`", "\t", "{_node_: 1}", "{content: 1, flags: {}}", "[" * 300,
    "{a: " * 300, "9" * 5000, "9" * 400, "é中😀",
])  # fmt: skip


def meddled(text: str) -> SearchStrategy[bytes]:
    """Return a config.yaml after somebody changed a line, cut it, or wrote over it."""
    lines = text.splitlines()

    def line(number: int, node: str) -> bytes:
        key = lines[number].partition(":")[0]
        return "\n".join([*lines[:number], f"{key}: {node}", *lines[number + 1 :]]).encode(
            errors="surrogatepass"
        )

    whole = text.encode()
    changed = st.builds(line, st.integers(0, len(lines) - 1), _NODES)
    cut = st.integers(0, len(whole)).map(lambda end: whole[:end])
    overwritten = st.tuples(st.integers(0, len(whole)), st.binary(max_size=4)).map(
        lambda patch: whole[: patch[0]] + patch[1] + whole[patch[0] + len(patch[1]) :]
    )
    gone = st.tuples(st.integers(0, len(lines) - 1), st.integers(1, 30)).map(
        lambda part: "\n".join(lines[: part[0]] + lines[part[0] + part[1] :]).encode()
    )
    other = _NODES.map(lambda node: node.encode(errors="surrogatepass")) | st.binary(max_size=30)
    return changed | changed | changed | cut | overwritten | gone | other
