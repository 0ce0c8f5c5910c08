"""Command lines that are wrong in ways that no limit of a key covers: keys that contradict each other, misspelt ones, noise."""

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz.keys import FOLDER
from tests.fuzz.text import as_text


@dataclass(frozen=True)
class Broken:
    """A command line of train.py, and the keys that are wrong in it."""

    arguments: list[str]
    wrong: list[str]


def _n(low: int, high: int) -> SearchStrategy[int]:
    return st.integers(low, high)


_LISTS = st.lists(_n(0, 9), max_size=8)
# Right one by one, wrong together; or wrong in a way that no limit covers. The key that has to be named → overrides.
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
    "data.window": st.just(["data=folder", *FOLDER, "data.window=[1,99]", "data.value_range=[0,1]"]),
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
