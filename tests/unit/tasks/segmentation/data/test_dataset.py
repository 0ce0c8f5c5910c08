from pathlib import Path

import numpy as np
import pytest
import torch

from segfit.data import formats
from segfit.data.images import ImageReader
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.dataset import (
    EvalDataset,
    PredictDataset,
    TrainDataset,
    collate,
    fit_image,
)
from tests.unit.data.files import noise, save


class ArraySource:
    """Pictures whose red channel is 50 × the mask: so that alignment can be seen."""

    classes = Classes(("a", "b", "c"))

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def id(self, index):
        return f"item_{index}"

    def files(self, index):
        return [Path(f"/somewhere/{index}.png")]

    def read(self, index):
        height, width = self.sizes[index]
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2] = 1
        mask[:, width // 2 :] = 2
        return (mask * 50)[..., None].repeat(3, 2), mask


WIDE, TALL, SMALL = (30, 60), (60, 30), (10, 12)


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("size", [WIDE, TALL, SMALL, (20, 24)])
def test_training_samples_have_one_size_and_stay_aligned(fit, size):
    sample = TrainDataset(ArraySource(size), (20, 24), fit)[0, 7]
    image, mask = sample["image"], sample["mask"]
    assert image.shape == (3, 20, 24)
    assert mask.shape == (20, 24)
    assert image.dtype == mask.dtype == torch.uint8
    assert image.is_contiguous()
    assert sample["index"] == 0
    red = (image[0].float() / 50).round()
    valid = mask != IGNORE_INDEX
    assert (red[valid] == mask[valid]).float().mean() > 0.9
    assert (image[:, ~valid] == 0).all()


def test_pad_keeps_the_shape_of_the_picture_and_ignores_the_rest():
    mask = TrainDataset(ArraySource(WIDE), (40, 40), "pad")[0, 0]["mask"]
    rows = (mask != IGNORE_INDEX).all(dim=1)
    assert rows.tolist() == [False] * 10 + [True] * 20 + [False] * 10


def test_crops_differ_by_seed_and_by_nothing_else():
    dataset = TrainDataset(ArraySource((80, 80)), (16, 16), "crop")
    crops = [dataset[0, seed]["image"] for seed in range(20)]
    assert torch.equal(crops[3], dataset[0, 3]["image"])
    assert len({crop.numpy().tobytes() for crop in crops}) > 5


def test_crops_reach_every_pixel():
    class Ramp(ArraySource):
        def read(self, index):
            mask = np.arange(25, dtype=np.uint8).reshape(5, 5)
            return mask[..., None].repeat(3, 2), mask

    dataset = TrainDataset(Ramp((5, 5)), (4, 4), "crop")
    starts = {int(dataset[0, seed]["mask"][0, 0]) for seed in range(64)}
    assert starts == {0, 1, 5, 6}


class Dots(ArraySource):
    """Large pictures of class 0 with a pixel of class 1, and an ignored corner; class 2 is in no other picture."""

    reads = 0

    def read(self, index):
        self.reads += 1
        mask = np.zeros(self.sizes[index], np.uint8)
        mask[3, 150] = 1
        mask[100:, 100:] = IGNORE_INDEX if index else 2
        return mask[..., None].repeat(3, 2), mask


def test_as_many_crops_as_asked_for_show_a_class_that_is_drawn():
    def shares(foreground, background, index=1):
        dataset = TrainDataset(
            Dots((200, 200), (200, 200)), (16, 16), "crop", None, foreground, background
        )
        masks = [dataset[index, seed]["mask"] for seed in range(400)]
        return [sum((mask == label).any().item() for mask in masks) / 400 for label in (1, 2)]

    assert shares(0.0, 0)[0] < 0.05
    assert shares(0.33, 0)[0] == pytest.approx(0.33, abs=0.06)
    assert shares(1.0, 0)[0] == 1.0  # the pixel is at the border, ignored ones are never drawn
    assert shares(1.0, 0, index=0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert shares(1.0, None)[0] == pytest.approx(0.5, abs=0.08)  # class 0 is drawn, too


def test_crops_of_an_image_that_follow_each_other_read_it_once():
    source = Dots((200, 200), (200, 200))
    dataset = TrainDataset(source, (16, 16), "crop", None, 0.5)
    once = [dataset[index, seed] for index in (0, 1) for seed in range(3)]
    assert source.reads == 2
    again = [dataset[index, seed] for seed in range(3) for index in (0, 1)]
    assert source.reads == 8
    for number, sample in enumerate(again):
        assert torch.equal(sample["mask"], once[number % 2 * 3 + number // 2]["mask"])


def test_the_augmentation_gets_the_seed():
    def augment(image, mask, *, seed):
        return image.flip(-1), torch.full_like(mask, seed)

    sample = TrainDataset(ArraySource(WIDE), (8, 8), "stretch", augment)[0, 5]
    assert (sample["mask"] == 5).all()
    assert sample["image"][0, 0, 0] == 100


@pytest.mark.parametrize(
    ("fit", "shape", "content"),
    [
        ("stretch", (20, 24), [0, 0, 20, 24]),
        ("pad", (20, 24), [4, 0, 12, 24]),
        ("crop", WIDE, [0, 0, *WIDE]),
    ],
)
def test_evaluation_keeps_the_whole_mask(fit, shape, content):
    source = ArraySource(WIDE)
    dataset = EvalDataset(source, (20, 24), fit)
    sample = dataset[0]
    assert sample["image"].shape == (3, *shape)
    assert sample["content"].tolist() == content
    np.testing.assert_array_equal(sample["mask"], source.read(0)[1])


def test_content_says_where_the_picture_is():
    image = torch.full((3, 100, 31), 9, dtype=torch.uint8)
    fitted, (top, left, height, width) = fit_image(image, (32, 48), "pad")
    inside = torch.zeros(32, 48, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(fitted[0] == 9, inside)


def test_a_batch_is_padded_to_its_largest():
    dataset = EvalDataset(ArraySource(WIDE, TALL), (20, 24), "crop")
    batch = collate([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 60, 60)
    assert batch["mask"].shape == (2, 60, 60)
    assert batch["shape"].tolist() == [list(WIDE), list(TALL)]
    assert batch["index"].tolist() == [0, 1]
    assert (batch["image"][0, :, 30:] == 0).all()
    assert (batch["mask"][1, :, 30:] == IGNORE_INDEX).all()
    assert torch.equal(batch["mask"][1, :, :30], dataset[1]["mask"])


def test_prediction_reads_images_without_masks(tmp_path):
    save(tmp_path / "in" / "b é.jpg", noise(30, 20, 3))
    save(tmp_path / "in" / "sub" / "a.png", noise(8, 9, high=60000, dtype="uint16"))
    (tmp_path / "in" / "notes.txt").write_text("x")
    dataset = PredictDataset(tmp_path / "in", (16, 16), "pad", ImageReader("gray", (1, 99)))
    assert [dataset.id(i) for i in range(len(dataset))] == ["b é", "sub/a"]
    assert dataset.files(1)[0].name == "a.png"
    assert dataset.notices == [f"{tmp_path / 'in'}: 1 files are no images (.txt) and are not read."]
    batch = collate([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["shape"].tolist() == [[30, 20], [8, 9]]
    assert batch["content"].tolist() == [[0, 2, 16, 11], [1, 0, 14, 16]]
    assert "mask" not in batch


def test_predictions_of_equal_names_do_not_overwrite_each_other(tmp_path):
    for suffix in ("png", "JPG"):
        save(tmp_path / f"a.{suffix}", noise(4, 4, 3))
    dataset = PredictDataset(tmp_path, (8, 8), "stretch")
    assert {dataset.id(0), dataset.id(1)} == {"a_png", "a_JPG"}


@pytest.mark.parametrize("folder", [".", "in", "in/../in"])
def test_names_are_relative_to_any_folder(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in" / "x.y" / "a.b.png", noise(4, 4, 3))
    name = PredictDataset(folder, (8, 8), "stretch").id(0)
    assert name == ("in/x.y/a.b" if folder == "." else "x.y/a.b")


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jp2", "webp", "ppm", "pgm"])
def test_a_file_is_predicted_as_a_folder_is(tmp_path, suffix):
    kind = {"jfif": "JPEG", "JPE": "JPEG"}.get(suffix)
    pixels = noise(8, 8) if suffix == "pgm" else noise(8, 8, 3)
    path = save(tmp_path / f"a.{suffix}", pixels, **({"format": kind} if kind else {}))
    for place in (path, tmp_path):
        dataset = PredictDataset(place, (8, 8), "stretch")
        assert [dataset.id(i) for i in range(len(dataset))] == ["a"]
        assert dataset[0]["image"].shape == (3, 8, 8)


@pytest.mark.skipif("HEIF" in formats._FORMATS, reason="pillow-heif is installed")
def test_heic_says_what_to_install(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"....ftypheic")
    with pytest.raises(SegFitError, match="pip install pillow-heif"):
        PredictDataset(tmp_path, (8, 8), "stretch")[0]


def test_a_folder_without_images_is_reported(tmp_path):
    with pytest.raises(SegFitError, match="no such file or folder"):
        PredictDataset(tmp_path / "nowhere", (8, 8), "pad")
    with pytest.raises(SegFitError, match="no image in it"):
        PredictDataset(tmp_path, (8, 8), "pad")
