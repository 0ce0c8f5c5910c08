"""Images of other than three channels: every model, and what becomes of its pretrained first convolution."""

import pytest
import torch
from timm.models import adapt_input_conv

from segfit.models.build import make_model
from segfit.tasks.segmentation.augmentation import CpuAugment
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu

MODELS = {
    "cnn": {"base_channels": 8},
    "timm_unet": {"encoder": "resnet18", "weights": None},
    "segformer": {"variant": "b0", "weights": None},
}


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_channels(name, channels):
    model, _ = make_model(
        ("a", "b"), {"name": name, **MODELS[name]}, pretrained=True, channels=channels
    )
    assert model.eval()(torch.rand(1, channels, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("name", ["timm_unet", "segformer"])
def test_the_first_convolution_is_spread_as_timm_does_it(tmp_path, name):
    options = {"name": name, **MODELS[name]}
    model, _ = make_model(("a", "b"), options, pretrained=True)
    state = model.state_dict()
    if name == "timm_unet":
        import timm

        state = timm.create_model("resnet18").state_dict()
    (first,) = [v for v in state.values() if v.ndim == 4 and v.shape[1] == 3]
    torch.save(state, tmp_path / "weights.pt")
    options["weights"] = str(tmp_path / "weights.pt")
    wider, _ = make_model(("a", "b"), options, pretrained=True, channels=5)
    (found,) = [v for v in wider.state_dict().values() if v.ndim == 4 and v.shape[1] == 5]
    torch.testing.assert_close(found, adapt_input_conv(5, first))


def test_both_augmentations_do_the_same_to_bands():
    options = {
        "name": "", "hflip": 1.0, "affine": 1.0, "color_jitter": 1.0, "blur": 0.0, "noise": 0.0,
        "fill": [0.4] * 5,
    }  # fmt: skip
    bands = torch.randint(0, 255, (5, 10, 12), dtype=torch.uint8).repeat_interleave(4, 1)
    bands = bands.repeat_interleave(4, 2)
    mask = torch.randint(0, 3, (40, 48), dtype=torch.uint8)
    one, labels = CpuAugment(**options)(bands, mask, seed=3)
    other, more = KorniaGpu(**options)(bands[None].float() / 255, mask[None].long(), seed=3)
    assert (one.float() - 255 * other[0]).abs().mean() < 2
    assert (labels != more[0]).float().mean() < 0.01
