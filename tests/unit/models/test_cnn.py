import pytest
import torch
from torch import nn

from segfit.models.cnn import CNN
from tests.contracts.model_contract import ModelContract, images


class TestCnn(ModelContract):
    def make(self, num_classes):
        return CNN(num_classes, base_channels=8, num_blocks=1, dropout=0.2)


class TestCnnWithoutNorm(ModelContract):
    def make(self, num_classes):
        return CNN(num_classes, base_channels=8, num_blocks=2, dropout=0.2, norm="none")

    def test_images_do_not_influence_each_other_in_training(self):
        model = CNN(3, base_channels=8, num_blocks=1, dropout=0.0, norm="none").train()
        batch = images()
        torch.testing.assert_close(model(batch)[:1], model(batch[:1]))


def test_base_channels_and_num_blocks_set_width_and_depth():
    def blocks(model: nn.Module) -> int:
        return sum(type(m).__name__ == "ResidualBlock" for m in model.levels.modules())

    assert CNN(3, base_channels=12).stem[0].out_channels == 12
    assert blocks(CNN(3, 8, num_blocks=3)) == 3 * blocks(CNN(3, 8, num_blocks=1))


@pytest.mark.parametrize("size", [(32, 32), (32, 45)])
def test_trains_on_one_small_image(size):
    CNN(3, base_channels=8).train()(images(*size, batch=1)).sum().backward()
