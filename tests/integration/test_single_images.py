"""Batch norm hates single images: none comes up by chance, and where there is but one, it works."""

import pytest

from segfit.models.cnn import CNN
from tests.integration.training import train


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that the model was trained with."""
    sizes = []
    forward = CNN.forward

    def spy(self, images):
        if self.training:
            sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(CNN, "forward", spy)
    return sizes


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("images", "expected"), [(1, {1}), (2, {2}), (3, {3}), (4, {3}), (5, {3}), (7, {3})]
)
def test_a_batch_of_one_comes_of_one_image_alone(tmp_path, batches, images, expected, accumulate):
    overrides = ("batch_size=3", f"accumulate={accumulate}", f"data.train_size={images}")
    done = train(tmp_path / "run", *overrides, "image_size=32", "data.resolution=32", "epochs=1")
    assert set(batches) == expected
    assert done.end.reason == "finished"


@pytest.mark.parametrize(
    "model",
    [
        ("model=cnn", "model.base_channels=4"),
        ("model=segformer_b0", "model.weights=null"),
        ("model=timm_unet", "model.encoder=resnet10t", "model.weights=null"),
    ],
    ids=lambda model: model[0],
)
def test_every_model_trains_on_one_image_of_the_smallest_size(tmp_path, model):
    small = ("batch_size=1", "image_size=32", "data.resolution=32", "data.train_size=2")
    base = ("epochs=1", "loader.workers=0", "data=shapes", "data.val_size=1", "device=cpu")
    done = train(tmp_path / "run", *model, *small, "data.test_size=1", base=base)
    assert done.end.updates == 2
