import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.models.restorers import make_restorer
from segfit.tasks.restoration.task import averaged
from segfit.tasks.restoration.tiles import restore

SIZES = [(96, 96), (97, 260), (300, 64), (225, 161), (33, 500), (1, 300)]


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


def made(name: str, blocks: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    model = make_restorer(1, {"name": name, "base_channels": channels, "num_blocks": blocks})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    return model.eval()


def halves(height: int, width: int) -> Tensor:
    """Dark above and bright below, so that no tile is like the picture."""
    return 0.2 * torch.rand(1, height, width) + 0.8 * (torch.arange(height) > height / 2)[:, None]


@pytest.mark.parametrize(
    ("name", "blocks", "channels", "size", "tile", "overlap"),
    [
        ("cnn", 1, 8, (331, 450), 192, 96),
        ("cnn", 4, 4, (331, 450), 256, 64),
        ("cnn", 12, 4, (331, 450), 256, 64),
        ("nafnet", 1, 4, (201, 150), 96, 64),
        ("nafnet", 4, 4, (201, 150), 128, 64),
        ("nafnet", 12, 4, (140, 131), 128, 64),
    ],
)
def test_tiles_equal_the_whole(name, blocks, channels, size, tile, overlap):
    model, picture = made(name, blocks, channels), halves(*size)
    with torch.inference_mode():
        whole = restore(model, picture, tile=1024, overlap=0, batch_size=1)
        tiled = restore(model, picture, tile=tile, overlap=overlap, batch_size=4)
    assert (whole - picture).abs().mean() > 0.01
    assert (tiled - whole).abs().max() < 4e-5


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("overlap", [0, 16, 48])
@pytest.mark.parametrize("halvings", [0, 4])
def test_averages_are_those_of_the_picture(size, overlap, halvings):
    multiple, seen = 2**halvings, list[int]()

    def add_mean(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        rim = (0, -batch.shape[-1] % multiple, 0, -batch.shape[-2] % multiple)
        small = F.avg_pool2d(F.pad(batch, rim, mode="replicate"), multiple)
        return batch + F.adaptive_avg_pool2d(small.square(), 1)

    picture = torch.rand(2, *size) * torch.linspace(0, 1, size[1])
    whole = add_mean(picture[None])[0]
    seen.clear()
    found = restore(add_mean, picture, tile=96, overlap=overlap, batch_size=3)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    tiles = len(seen) // 2
    assert seen[:tiles] == seen[tiles:]  # in the second pass, the mean was known


def test_what_averages_nothing_sees_tiles_once():
    model, seen = made("cnn", 1, 4), list[int]()
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.inference_mode():
        restore(model, halves(100, 150), tile=96, overlap=32, batch_size=1)
    assert len(seen) == 2 * 2


def test_in_low_precision_means_settle_and_tiles_are_as_close_as_the_whole():
    model, picture, seen = made("nafnet", 1, 4), halves(201, 150), list[int]()

    def half(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    with torch.inference_mode():
        exact, whole = model(picture[None])[0], half(picture[None])[0]
        seen.clear()
        tiled = restore(half, picture, tile=128, overlap=64, batch_size=4)
    assert (tiled - exact).abs().max() < 1.5 * (whole - exact).abs().max()
    assert sum(seen) <= 4 * 3 * 2  # tiles in 4 passes


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
    picture = torch.rand(1, 5, 7)

    def forward(given):  # depends on where a pixel is
        height, width = given.shape[-2:]
        return given * torch.arange(height * width).view(1, height, width)

    made = []
    for turns in range(4):
        for flip in (lambda one: one, np.fliplr):
            turned = flip(np.rot90(picture[0].numpy(), turns))
            places = np.arange(turned.size).reshape(turned.shape)
            made.append(np.rot90(flip(turned * places), -turns))
    assert np.allclose(averaged(forward, picture)[0], np.mean(made, 0), atol=1e-5)
