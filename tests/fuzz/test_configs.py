"""Nothing that is typed, or found in a run folder, ends in a traceback, and nothing wrong passes."""

import copy
from functools import cache
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from segfit.assembly.training import make_training
from segfit.cli import main as cli
from segfit.cli.explain import explain
from segfit.config.check import check
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.runs.files import RunFolder
from tests.fuzz import configs, keys, lines, run_folders
from tests.fuzz.profiles import examples
from tests.integration.training import one_thread
from tests.unit.composing import composed_of, set_up
from tests.unit.engine.fakes import Recorder


@pytest.fixture(scope="module", autouse=True)
def _set_up():
    set_up()


def problems(arguments: list[str], name: str = "train") -> list[str]:
    """Return the messages about a command line; [] if it is accepted."""
    try:
        check(composed_of(arguments, name))
    except Exception as error:
        messages = explain(error, cli.CONF, name, arguments)
        if not messages:
            raise AssertionError(f"no explanation: {arguments}") from error
        assert all(problem.strip() for problem in messages)
        assert not any(
            word in problem for problem in messages for word in ("$VALUE", "object at 0x")
        )
        return messages
    return []


def refused(arguments: list[str], wrong: list[str], name: str = "train") -> None:
    messages = problems(arguments, name)
    assert messages, f"accepted: {arguments}"
    for key in wrong:
        assert any(key in problem for problem in messages), f"{key} is not named: {messages}"


@examples(15)
@given(configs.right_cases())
def test_what_is_right_is_accepted(case):
    assert problems(case.arguments, case.composition.name) == []


@examples(15)
@given(configs.broken_cases(by_type=False))
def test_what_is_out_of_range_is_refused_by_name(case):
    refused(case.arguments, case.wrong, case.composition.name)


@examples(4)
@given(configs.broken_cases(by_type=True))
def test_what_is_of_another_type_is_refused_by_name(case):
    refused(case.arguments, case.wrong, case.composition.name)


@examples(15)
@given(lines.contradictions())
def test_what_contradicts_itself_is_refused_by_name(broken):
    refused(broken.arguments, broken.wrong)


@examples(4)
@given(lines.misspelt())
def test_what_is_misspelt_is_refused_by_name(broken):
    refused(broken.arguments, broken.wrong)


@examples(8)
@given(lines.noise())
def test_noise_is_accepted_or_explained(arguments):
    problems(["hardware=cpu", *arguments])


# What makes any training a small one.
SMALL = {
    "image_size": [48, 32],
    "batch_size": 2,
    "accumulate": 2,
    "max_steps": 1,
    "limit_val_batches": 1,
    "loader.workers": 0,
    "data.train_size": 5,
    "data.val_size": 2,
    "data.test_size": 1,
    "data.resolution": 32,
    "data.cache": "none",
    "report.panels": 0,
    "precision.name": "fp32",
    "compile": False,
    "device": "cpu",
}
SMALL_MODELS = {
    "cnn": {"model.base_channels": 4, "model.num_blocks": 1},
    "segformer_b0": {"model.weights": None, "model.variant": "b0"},
    "timm_unet": {"model.weights": None, "model.encoder": "resnet10t", "model.decoder_channels": 8},
}


@examples(5)
@given(case=configs.right_cases(keys.SHAPES))
def test_what_is_accepted_trains(tmp_path_factory, case):
    model = case.composition.choices[1].removeprefix("model=")
    values = {**case.values, **SMALL, **SMALL_MODELS[model]}
    config = composed_of(configs.Case(case.composition, values).arguments)
    check(config)
    heard = Recorder()
    with one_thread():
        training = make_training(config, tmp_path_factory.mktemp("run"), heard.notice)
        try:
            end = training.fit.run(heard, training.facts)
        except SegFitError as error:
            messages = str(error)
            assert (
                "finite" in messages
            )  # a learning rate of a million is allowed, and leads nowhere
        else:
            assert end.updates == 1


# ------------------------------------------------------------------------------------ run folders


@cache
def values_of(choices: tuple[str, ...]) -> dict[str, Any]:
    values = OmegaConf.to_container(composed_of(list(choices)), resolve=True)
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def write(run, case: configs.Case) -> None:
    values = copy.deepcopy(values_of(case.composition.choices))
    for path, value in case.values.items():
        *sections, last = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    text = yaml.dump(values, Dumper=yaml.CSafeDumper, allow_unicode=True)
    RunFolder(run).config.write_text(text, encoding="utf-8")


@examples(60)
@given(case=configs.right_cases(keys.RUNS))
def test_a_run_in_which_nothing_is_wrong_is_read(run, case):
    write(run, case)
    config = runs.load_config(run)
    for key, value in case.values.items():
        read = OmegaConf.select(config, key)
        assert (OmegaConf.to_container(read) if OmegaConf.is_config(read) else read) == value


@examples(60)
@given(case=configs.broken_cases(by_type=False, among=keys.RUNS))
def test_a_run_with_values_out_of_range_is_refused_by_name(run, case):
    write(run, case)
    with pytest.raises(SegFitError) as caught:
        runs.load_config(run)
    assert [key for key in case.wrong if key in str(caught.value)] == case.wrong


@examples(60)
@given(case=configs.broken_cases(by_type=True, among=keys.RUNS))
def test_a_run_with_values_of_another_type_is_refused(run, case):
    write(run, case)
    with pytest.raises(SegFitError, match=str(run)):
        runs.load_config(run)


@examples(150)
@given(data=st.data())
def test_a_run_that_somebody_meddled_with_is_read_or_refused(run, data):
    text = yaml.safe_dump(values_of(keys.composition("cnn", "folder", (), None).choices))
    RunFolder(run).config.write_bytes(data.draw(run_folders.meddled(text)))
    try:
        config = runs.load_config(run)
    except SegFitError as error:
        messages = str(error)
    else:
        messages = str(run)
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert str(run) in messages
