"""What Hydra could not compose, in plain words."""

import errno
import os

import pytest

from segfit.cli import main as cli
from segfit.cli.explain import _OURS as OURS
from segfit.cli.explain import explain
from segfit.errors import SegFitError
from tests.unit.composing import composed


def explained(*arguments: str) -> list[str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        composed(*arguments)
    return explain(caught.value, cli.CONF, "train", list(arguments))


def test_every_wrong_override_is_listed() -> None:
    # benchmark=optimize may have added local.yaml to this working copy
    recipes = sorted(["auto", *(path.stem for path in (cli.CONF / "hardware").glob("*.yaml"))])
    assert explained(
        "modle=cnn", "optimizer.weight_deacy=0", "hardware=8g", "lr=fast", "epochs=ten"
    ) == [
        f"hardware=8g: no such choice. Did you mean '8gb'? There are: {', '.join(recipes)}.",
        "modle: there is no such key. Did you mean 'model'?",
        "optimizer.weight_deacy: there is no such key. Did you mean 'optimizer.weight_decay'?",
        "lr=fast: must be a number.",
        "epochs=ten: must be a whole number.",
    ]


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("compile=maybe", "compile=maybe: must be true or false."),
        ("epochs=3.0", "epochs=3.0: must be a whole number."),
        ("epochs=true", "epochs=true: must be a whole number."),
        ("lr=null", "lr=null: must not be null."),
        ("monitor=[miou]", "monitor=[miou]: must be text."),
        ("report.logger=csv", "report.logger=csv: must be a list, in brackets: [a,b]."),
        ("precision=3", "precision=3: no such choice. There are: auto, bf16, fp16, fp32."),
        ("=3", "=3: not understood. There is no key before the =."),
        (
            """data.label_map={"1":0,'2': 1}""",
            """data.label_map={"1":0,'2': 1}: not understood. Keys have no quotes: 'data.label_map={1:0,2: 1}'.""",
        ),
        (
            "data.class_names=[a,b",
            "data.class_names=[a,b: not understood. Brackets and quotes come in pairs.",
        ),
        (
            "monitor=a;b",
            """monitor=a;b: not understood. Text with special characters needs quotes, 'monitor="a;b"'.""",
        ),
        ("~wramup", "wramup: there is no such key."),
        (
            "model.encoder=resnet18",
            "model.encoder: there is no such key. Of model, timm_unet has it.",
        ),
    ],
)
def test_in_the_words_of_a_person(argument: str, problem: str) -> None:
    assert explained(argument) == [problem]


def test_what_hydra_itself_stumbles_over_is_explained() -> None:
    (problem,) = explained("epochs=" + "1" * 5000)
    assert "not understood" in problem
    (problem,) = explained("hardware.tuned_for.device=x")
    assert problem.startswith("hardware.tuned_for.device")


def test_a_choice_that_is_missing_is_all_that_is_listed() -> None:
    arguments = ["hardware=cpu", "lr=1", "data.train_size=4"]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        composed(*arguments, name="benchmark")
    (problem,) = explain(caught.value, cli.CONF, "benchmark", arguments)
    assert "You must specify 'benchmark'" in problem
    assert "plan" in problem.split()
    assert "plan_schema" not in problem


def test_a_choice_that_is_none_makes_no_other_wrong() -> None:
    arguments = ["model=cnn", "benchmark=plam", "data=shapes"]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        composed(*arguments, name="benchmark")
    (problem,) = explain(caught.value, cli.CONF, "benchmark", arguments)
    assert problem.startswith("benchmark=plam: no such choice. Did you mean 'plan'?")


def test_the_old_spelling_of_a_choice_is_corrected() -> None:
    (problem,) = explained("augmentation=kornia_gpu")
    assert problem.startswith(
        "augmentation=kornia_gpu: no such choice. Did you mean 'kornia-gpu'? There are: "
    )


def test_words_of_other_libraries_are_answered_with_ours() -> None:
    assert {
        **dict.fromkeys(("imgsz", "img_size"), "image_size"),
        **dict.fromkeys(("lr0", "learning_rate"), "lr"),
        **dict.fromkeys(("max_epochs", "num_epochs"), "epochs"),
        **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), "accumulate"),
        **dict.fromkeys(("workers", "num_workers"), "loader.workers"),
        **dict.fromkeys(("weights", "pretrained"), "model.weights"),
        **dict.fromkeys(("output_dir", "save_dir", "project"), "hydra.run.dir"),
        **{"batch": "batch_size", "amp": "precision", "wd": "optimizer.weight_decay"},
        **{"val_interval": "val_every", "early_stopping_patience": "patience"},
    }.items() <= OURS.items()
    assert explained(*(f"{word}=1" for word in OURS)) == [
        f"{word}: there is no such key. In SegFit it is {ours}." for word, ours in OURS.items()
    ]


def test_a_word_of_another_library_is_answered_only_where_our_key_exists() -> None:
    (problem,) = explained("weights=x.pt", "model=cnn")
    assert problem == "weights: there is no such key."


def test_keys_are_looked_up_in_the_chosen_group() -> None:
    (problem,) = explained("model.base_chanels=8", "model=cnn")
    assert "Did you mean 'model.base_channels'?" in problem


def test_a_message_of_ours_is_kept() -> None:
    error = ValueError("outer")
    error.__cause__ = SegFitError(["one", "two"])
    assert explain(error, cli.CONF, "train", []) == ["one", "two"]


def test_a_bug_is_not_explained_away() -> None:
    assert explain(ValueError("a bug"), cli.CONF, "train", ["lr=fast"]) == []


def test_an_interval_to_search_makes_nothing_else_wrong() -> None:
    (problem,) = explained("modle=cnn", "lr=interval(1e-5,1e-3)", "epochs=choice(2,4)")
    assert problem == "modle: there is no such key. Did you mean 'model'?"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_used_is_named(number: int) -> None:
    error = OSError(number, os.strerror(number), "photos/private")
    (problem,) = explain(error, cli.CONF, "train", [])
    assert problem.startswith(f"photos/private: {os.strerror(number)}.")
    assert explain(OSError(errno.EIO, "broken", "photos"), cli.CONF, "train", []) == []
