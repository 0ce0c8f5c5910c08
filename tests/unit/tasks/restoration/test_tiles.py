import numpy as np
import pytest
import torch
from torch import Tensor

from segfit.models.restorers import make_restorer
from segfit.tasks.restoration.task import averaged, restore

SIZES = [(96, 96), (97, 260), (300, 64), (225, 161), (33, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 16, 48])
def test_tiles_cover_every_pixel_once(size: tuple[int, int], overlap: int) -> None:
    picture = torch.rand(3, *size)
    shapes: list[tuple[int, ...]] = []

    def double(batch: Tensor) -> Tensor:
        shapes.append(tuple(batch.shape))
        return 2 * batch

    found = restore(double, picture, tile=96, overlap=overlap, batch_size=3)
    torch.testing.assert_close(found, 2 * picture)
    assert all(len(shape) == 4 and shape[0] <= 3 and max(shape) <= 96 for shape in shapes)


def test_a_small_picture_goes_whole() -> None:
    sizes: list[torch.Size] = []

    def keep(batch: Tensor) -> Tensor:
        sizes.append(batch.shape)
        return batch

    picture = torch.rand(1, 90, 96)
    for tile in (96, 1024):
        restore(keep, picture, tile=tile, overlap=32, batch_size=4)
    assert sizes == [(1, 1, 90, 96)] * 2


@pytest.mark.parametrize(
    ("blocks", "channels", "tile", "overlap"), [(1, 8, 192, 96), (4, 4, 256, 64), (12, 4, 256, 64)]
)
def test_tiles_equal_the_whole(blocks: int, channels: int, tile: int, overlap: int) -> None:
    torch.manual_seed(0)
    model = make_restorer(1, {"name": "cnn", "base_channels": channels, "num_blocks": blocks})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    picture = torch.rand(1, 331, 450)
    with torch.inference_mode():
        whole = restore(model, picture, tile=1024, overlap=0, batch_size=1)
        tiled = restore(model, picture, tile=tile, overlap=overlap, batch_size=4)
    assert (whole - picture).abs().mean() > 0.01
    assert (tiled - whole).abs().max() < 1e-4


def test_tiles_fade_into_one_another() -> None:
    def place(batch: Tensor) -> Tensor:  # how far into its tile a pixel is
        return torch.arange(batch.shape[-1]).expand_as(batch).float()

    (row, *others) = restore(place, torch.zeros(1, 64, 160), tile=96, overlap=32, batch_size=1)[0]
    assert all(torch.equal(one, row) for one in others)
    before, after = torch.arange(160.0), torch.arange(160.0) - 64  # what the two tiles say
    share = (row - before) / (after - before)  # of the second tile
    assert share[:64].abs().max() < 1e-5
    assert (share[96:] - 1).abs().max() < 1e-5
    inside = share[64:96]
    assert (inside.diff() > 0).all()
    torch.testing.assert_close(inside, 1 - inside.flip(0), atol=1e-5, rtol=0)
    assert inside[0] < 1e-4  # the edge of a tile knows nothing of what is behind it
    # Gaussians whose σ is a sixth of the overlap.
    distance = (torch.arange(32) + 0.5) / 32
    weights = [torch.exp(-18 * part**2) for part in (1 - distance, distance)]
    torch.testing.assert_close(inside, weights[0] / sum(weights), atol=1e-5, rtol=0)


def test_the_average_of_eight_turns_and_mirror_images_is_numpys():
    pictures = torch.rand(2, 1, 5, 7)

    def forward(given):  # depends on where a pixel is
        height, width = given.shape[-2:]
        return given * torch.arange(height * width).view(1, 1, height, width)

    made = []
    for turns in range(4):
        for flip in (lambda one: one, np.fliplr):
            turned = [flip(np.rot90(one[0], turns)) for one in pictures.numpy()]
            places = np.arange(turned[0].size).reshape(turned[0].shape)
            made.append([np.rot90(flip(one * places), -turns) for one in turned])
    assert np.allclose(averaged(forward, pictures)[:, 0], np.mean(made, 0), atol=1e-5)
