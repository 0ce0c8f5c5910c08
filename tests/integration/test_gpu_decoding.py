"""data.decode=gpu: nvImageCodec gives Pillow's pixels, here by its CPU backend, and a training does not see the difference."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from segfit.data.gpu_decoding import HeaderReader, JpegDecoder
from segfit.data.images import ImageReader
from segfit.errors import SegFitError
from tests.integration.training import TINY, resume, same, train
from tests.unit.data.files import noise, save

pytest.importorskip("nvidia.nvimgcodec")


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def turned(number):
    exif = Image.Exif()
    exif[274] = number
    return {"exif": exif}


PICTURE = Image.fromarray(np.kron(noise(13, 17, 3), np.ones((16, 16, 1), np.uint8))[:201, :263])
FILES = {
    "4:4:4": jpeg(PICTURE, subsampling=0),
    "4:2:2": jpeg(PICTURE, subsampling=1),
    "4:2:0": jpeg(PICTURE, subsampling=2),
    "grey": jpeg(PICTURE.convert("L")),
    "progressive": jpeg(PICTURE, progressive=True),
    "CMYK": jpeg(PICTURE.convert("CMYK")),
    **{f"turned {number}": jpeg(PICTURE, **turned(number)) for number in range(1, 9)},
}


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_pillows(kind, tmp_path):
    data = FILES[kind]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    padded = np.frombuffer(data + bytes(1000), np.uint8)  # as in a batch with a larger file
    (made,) = JpegDecoder(torch.device("cpu"))([padded])
    assert np.array_equal(made.permute(1, 2, 0).numpy(), expected)
    (tmp_path / "a.jpg").write_bytes(data)
    assert HeaderReader()(tmp_path / "a.jpg").shape == ImageReader()(tmp_path / "a.jpg").shape


def test_what_cannot_be_decoded_is_none():
    whole = FILES["4:2:0"]
    files = [whole[: len(whole) // 2], b"\xff\xd8\xff" + bytes(100), bytes(10), whole]
    made = JpegDecoder(torch.device("cpu"))([np.frombuffer(file, np.uint8) for file in files])
    assert [one is None for one in made] == [True, True, True, False]


def folder(root):
    for index in range(8):
        height, width = (60, 70) if index % 2 else (90, 64)
        save(root / f"images/{index}.jpg", noise(height, width, 3, seed=index))
        save(root / f"masks/{index}.png", noise(height, width, seed=index, high=3))
    base = [text for text in TINY if not text.startswith("data")]
    return [
        *base,
        "data=folder",
        f"data.root={root}",
        "data.num_classes=3",
        "hardware=cpu",
        "augmentation=none",
        "max_steps=2",
    ]


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_a_training_is_the_same_bit_for_bit(fit, tmp_path):
    given = [*folder(tmp_path / "data"), f"data.fit={fit}", "image_size=[64,80]"]
    if fit == "crop":
        given += ["data.foreground=0.5", "data.crops_per_image=2"]
    weights = []
    for decode in ("cpu", "gpu"):
        trained = train(tmp_path / decode, *given, f"data.decode={decode}", base=())
        weights.append(trained.model.state_dict())
    assert same(*weights)


def test_a_run_that_was_cut_in_its_epoch_ends_as_if_nothing_had_been(tmp_path):
    """Order, crops, augmentation and MixUp; the rest of it in workers."""
    given = [*folder(tmp_path / "data"), "data.decode=gpu", "data.fit=crop", "max_steps=null"]
    given += ["augmentation=kornia-gpu", "augmentation.mixup=0.5", "model.dropout=0.3"]
    given += ["batch_size=2", "image_size=48", "epochs=2"]
    whole = train(tmp_path / "whole", *given, base=())
    per_epoch = len(whole.losses) // 2
    cut = train(tmp_path / "cut", *given, f"max_steps={per_epoch + 1}", base=())
    assert per_epoch > 1
    again = resume(tmp_path / "cut", "max_steps=null", "loader.workers=2")
    assert cut.losses + again.losses == whole.losses
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_a_truncated_file_gives_the_same_message(tmp_path):
    given = [*folder(tmp_path / "data"), "data.check=off", "max_steps=null"]
    for file in (tmp_path / "data/images").iterdir():
        file.write_bytes(file.read_bytes()[:700])
    said = []
    for decode in ("cpu", "gpu"):
        with pytest.raises(SegFitError, match="unreadable") as caught:
            train(tmp_path / decode, *given, f"data.decode={decode}", "val_every=1", base=())
        said.append({problem.split("images/")[1][1:] for problem in caught.value.problems})
    assert said[0] == said[1]


def test_what_workers_would_need_pixels_for_is_refused_at_once(tmp_path):
    given = folder(tmp_path / "data")
    with pytest.raises(SegFitError, match=r"data.cache=ram and augmentation=cpu needs pixels"):
        train(
            tmp_path / "a", *given, "data.decode=gpu", "data.cache=ram", "augmentation=cpu", base=()
        )
    Image.open(tmp_path / "data/images/0.jpg").save(tmp_path / "data/images/0.png")
    (tmp_path / "data/images/0.jpg").unlink()
    with pytest.raises(SegFitError, match=r"1 of \d training images are no JPEG files: .*0\.png"):
        train(tmp_path / "b", *given, "data.decode=gpu", "data.split.val=0.01", base=())
