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

    assert CNN(3, base_channels=12).down[0].out_channels == 12
    assert blocks(CNN(3, 8, num_blocks=3)) == 3 * blocks(CNN(3, 8, num_blocks=1))


def test_finds_what_is_one_pixel_wide():
    torch.manual_seed(0)
    model = CNN(2, base_channels=8).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    columns = torch.randint(0, 32, (16,))
    targets = nn.functional.one_hot(columns, 32)[:, None].expand(-1, 32, -1)
    batch = targets[:, None] + 0.1 * torch.randn(16, 3, 32, 32)
    weight = torch.tensor([1.0, 8.0])
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(batch[:8]), targets[:8], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model(batch[8:]).argmax(1)
    hits = (found & targets[8:]).sum()
    assert hits / (found | targets[8:]).sum() > 0.9
