"""Mean and std of images are those that the model's pretrained weights were made for."""

import json

import pytest

from segfit.models.build import IMAGENET
from segfit.tasks.segmentation.assembly import normalisation_of, settle
from tests.integration.training import compose_run

LITE = "model.encoder=tf_efficientnet_lite0"  # made for a mean and std of 0.5
HALF = [[0.5] * 3, [0.5] * 3]
USUAL = [list(values) for values in IMAGENET]


def settled(*overrides: str) -> tuple[list[list[float]], list[str]]:
    config = compose_run(*overrides, base=("data=shapes", "device=cpu"))
    notices: list[str] = []
    settle(config, {}, notices.append)
    assert [config.data.mean, config.data.std] == normalisation_of(config)
    return normalisation_of(config), notices


@pytest.mark.parametrize(
    "options",
    [
        ["model=cnn"],
        ["model=segformer_b0"],
        ["model=timm_unet", "model.encoder=resnet18"],
        ["model=timm_unet", "model.encoder=efficientnet_b0.ra_in1k", "model.weights=null"],
    ],
)
def test_it_is_imagenets_without_a_word_where_nothing_says_otherwise(options):
    assert settled(*options) == (USUAL, [])


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "mixer_b16_224.goog_in21k_ft_in1k"])
def test_an_encoder_brings_its_own_in_one_line(encoder):
    found, notices = settled("model=timm_unet", f"model.encoder={encoder}")
    assert found == HALF
    (line,) = notices
    assert f"{HALF[0]}" in line
    assert encoder in line


def test_what_was_typed_stays_and_the_difference_is_reported():
    found, (line,) = settled("model=timm_unet", LITE, "data.mean=[0.1,0.2,0.3]")
    assert found == [[0.1, 0.2, 0.3], HALF[1]]
    assert "stay as given" in line
    assert "pretrained with [0.5, 0.5, 0.5]" in line
    same = "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"
    assert settled("model=timm_unet", LITE, *same) == (HALF, [])
    given = "data.mean=[0.1,0.2,0.3]", "data.std=[1,1,1]"
    assert settled("model=cnn", *given) == ([[0.1, 0.2, 0.3], [1.0, 1.0, 1.0]], [])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}),
    ],
)
@pytest.mark.parametrize("model", ["segformer_b0", "timm_unet"])
def test_what_lies_beside_the_weights_counts_most(tmp_path, file, content, model):
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "model.safetensors").touch()
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        found, (line,) = settled(f"model={model}", f"model.weights={weights}")
        assert found == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
        assert str(weights) in line


@pytest.mark.parametrize(
    "text", ["", "[]", '{"image_mean": 3}', '{"image_mean": [1], "image_std": [1]}']
)
def test_files_that_say_nothing_are_left_alone(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    (tmp_path / "model.safetensors").touch()
    assert settled("model=segformer_b0", f"model.weights={tmp_path}") == (USUAL, [])
