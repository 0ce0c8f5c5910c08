import pytest
import timm
import torch
from safetensors.torch import save_file

from segfit.errors import SegFitError
from segfit.models.timm_unet import TimmUnet
from tests.contracts.model_contract import ModelContract, images


def unet(encoder: str, num_classes: int = 3, **kwargs) -> TimmUnet:
    return TimmUnet(encoder, num_classes, weights=None, decoder_channels=32, **kwargs)


class TestResNetUnet(ModelContract):
    def make(self, num_classes):
        return unet("resnet10t", num_classes, dropout=0.2)


class TestViT(ModelContract):
    """A transformer, whose features all have the stride of its patches."""

    def make(self, num_classes):
        return unet("test_vit2", num_classes, dropout=0.2)


def test_checkpointing_changes_nothing_but_memory():
    for encoder in ("test_vit2", "resnet10t"):
        models = [unet(encoder, checkpointing=choice).train() for choice in (False, True)]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            model.dropout.p = 0.0
            model(images()).square().mean().backward()
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_position_embeddings_of_another_grid_are_resized(tmp_path):
    small = timm.create_model("vit_tiny_patch16_224", img_size=96)
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    model = TimmUnet("vit_tiny_patch16_224", 3, weights=str(tmp_path / "w.safetensors"))
    encoder = model.encoder.model
    assert encoder.pos_embed.shape == (1, 197, 192)
    torch.testing.assert_close(encoder.pos_embed[:, 0], small.pos_embed[:, 0])
    torch.testing.assert_close(encoder.blocks[11].attn.qkv.weight, small.blocks[11].attn.qkv.weight)


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        ("convnext_atto", (64, 64)),  # first features at stride 4
        ("convnext_atto", (65, 97)),
        ("mobilenetv3_small_050", (65, 97)),  # another family of feature extractors in timm
        ("mambaout_femto", (64, 64)),  # features with the channels last
        ("swin_tiny_patch4_window7_224", (65, 97)),  # channels last, and only at multiples of 32
    ],
)
def test_any_pyramid_at_any_size(encoder, size):
    model = unet(encoder).eval()
    with torch.no_grad():
        assert model(images(*size, batch=1)).shape == (1, 3, *size)


@pytest.mark.parametrize("encoder", ["densenet121", "mobilenetv3_small_050"])
@pytest.mark.parametrize(
    "size", [(32, 32), (33, 63)]
)  # at 33, densenet's deepest features have one pixel
def test_other_encoders_train_on_one_small_image(encoder, size):
    model = unet(encoder).train()
    model(images(*size, batch=1)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_decoder_channels_are_halved_a_level():
    widths = [block.convs[0].out_channels for block in unet("resnet10t").decoder]
    assert widths == [32, 16, 16, 16]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("resnet43", "resnet34"),
        ("resnet34.nonsense", "nonsense"),
        ("xcit_nano_12_p16_224", "pyramid"),
        ("pit_ti_224", "one image size"),
    ],
)
def test_unfit_encoders_are_refused_with_an_alternative(encoder, message):
    with pytest.raises(SegFitError, match=message) as error:
        unet(encoder)
    assert "model.encoder" in str(error.value)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(5)
    return timm.create_model("resnet10t", pretrained=False).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_gives_the_encoder_its_weights(backbone, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(backbone.state_dict(), file)
    model = TimmUnet("resnet10t", 3, weights=str(file))
    assert model.weights.source == str(file)
    with torch.no_grad():
        deepest = model.eval().encoder(images())[-1]
        torch.testing.assert_close(deepest, backbone.forward_features(images()))


def test_a_file_of_another_model_is_refused_with_its_keys(backbone, tmp_path):
    state = backbone.state_dict()
    del state["layer1.0.conv1.weight"]
    state["layer4.0.conv1.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SegFitError, match=r"missing: layer1\.0\.conv1\.weight") as error:
        TimmUnet("resnet10t", 3, weights=str(tmp_path / "w.safetensors"))
    assert "another shape: layer4.0.conv1.weight" in str(error.value)
