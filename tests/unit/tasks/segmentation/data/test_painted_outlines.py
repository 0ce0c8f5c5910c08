"""Masks from outlines, against what pycocotools, Pillow and NumPy make of the same shapes."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from tests.unit.data.files import noise, save
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "cat", "dog"))
SIZE = (60, 80)
SQUARE = [[10.0, 8.0], [30.0, 8.0], [30.0, 28.0], [10.0, 28.0]]


def blobs(count=3, seed=0):
    """Return outlines (N, 2) of x, y: stars of up to nine corners, also beyond the image."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        corners = int(rng.integers(3, 10))
        turn, radius = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(8, 28, corners)
        centre = rng.uniform(0, 1, 2) * SIZE[::-1]
        yield centre + radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)


def images(root, count=3):
    for index in range(count):
        save(root / f"images/{index}.png", noise(*SIZE, 3, seed=index))
    return root


def as_yolo(points, label):
    shares = np.asarray(points) / SIZE[::-1]
    return f"{label - 1} {' '.join(f'{value:.8f}' for value in shares.ravel())}\n"


def write(root, form, shapes):
    """Write one list of (class, outline) an image."""
    images(root, len(shapes))
    made = {
        "images": [
            {"id": 7 + i, "file_name": f"train/{i}.png", "height": SIZE[0], "width": SIZE[1]}
            for i in range(len(shapes))
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [],
    }
    for index, found in enumerate(shapes):
        made["annotations"] += [
            {"image_id": 7 + index, "category_id": 16 + label,
             "segmentation": [np.asarray(points).ravel().tolist()] if isinstance(points, (list, np.ndarray)) else points}
            for label, points in found
        ]  # fmt: skip
        (root / "labels").mkdir(exist_ok=True)
        if form == "yolo":
            text = "".join(as_yolo(points, label) for label, points in found)
            (root / f"labels/{index}.txt").write_text(text)
        elif form == "labelme":
            entries = [
                {"label": CLASSES.names[label], "points": np.asarray(points).tolist(), "shape_type": "polygon"}
                for label, points in found
            ]  # fmt: skip
            content = {"shapes": entries, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
            (root / f"labels/{index}.json").write_text(json.dumps(content))
    (root / "coco.json").write_text(json.dumps(made))
    return root


def sources(root, form, **options):
    masks = "coco.json" if form == "coco" else "labels"
    return folder_sources(root, classes=CLASSES, masks=masks, mask_format=form, **options)


def read(root, form):
    found = sources(root, form)
    return {
        int(s.id(i)): s.read(i)[1] for s in found.values() for i in range(len(s))
    }, check_sources(found)


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_outlines_are_drawn_where_others_draw_them(tmp_path, form):
    shapes = [
        [(1 + n % 2, points) for n, points in enumerate(blobs(seed=seed))] for seed in range(6)
    ]
    masks, report = read(write(tmp_path / "data", form, shapes), form)
    assert "later ones cover earlier ones" in report.notices[0]
    for index, found in enumerate(shapes):
        coco, pillow = np.zeros(SIZE, np.uint8), Image.new("L", SIZE[::-1])
        for label, points in found:
            coco[rle.decode(rle.frPyObjects([points.ravel().tolist()], *SIZE))[..., 0] > 0] = label
            ImageDraw.Draw(pillow).polygon([tuple(point) for point in points], fill=label)
        assert (masks[index] == coco).mean() > 0.985
        assert (masks[index] == np.asarray(pillow)).mean() > 0.95


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_squares_are_exact_and_the_later_one_lies_above(tmp_path, form):
    shifted = (np.array(SQUARE) + 5).tolist()
    masks, _ = read(write(tmp_path / "data", form, [[(1, SQUARE), (2, shifted)], [], []]), form)
    expected = np.zeros(SIZE, np.uint8)
    expected[8:28, 10:30] = 1
    expected[13:33, 15:35] = 2
    np.testing.assert_array_equal(masks[0], expected)
    assert not masks[1].any()


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_of_coco(tmp_path, compressed):
    shape = noise(*SIZE, high=2) * (np.arange(SIZE[1]) // 7 % 2).astype(np.uint8)
    coded = rle.encode(np.asfortranarray(shape))
    if compressed:
        coded = {**coded, "counts": coded["counts"].decode()}
    else:
        flat = np.concatenate([[0], shape.T.ravel(), [2]])
        edges = np.flatnonzero(np.diff(flat.astype(int)))
        edges = np.concatenate([[0] * int(shape[0, 0]), edges[edges < shape.size], [shape.size]])
        coded = {
            "size": list(SIZE),
            "counts": np.diff(np.concatenate([[0], edges])).astype(int).tolist(),
        }
    masks, _ = read(write(tmp_path / "data", "coco", [[(2, coded)], [], []]), "coco")
    np.testing.assert_array_equal(masks[0], 2 * shape)


def test_other_shapes_of_labelme_and_files_beside_the_images(tmp_path):
    root = images(tmp_path / "data")
    shapes = [
        {"label": "cat", "points": [[10, 8], [30, 28]], "shape_type": "rectangle"},
        {"label": "dog", "points": [[60, 30], [70, 30]], "shape_type": "circle"},
        {
            "label": "dog",
            "points": [[50, 50], [60, 50], [60, 55], [50, 55]],
            "shape_type": "rectangle",
        },
    ]
    for index in range(3):
        (root / f"images/{index}.json").write_text(json.dumps({"shapes": shapes}))
    found = folder_sources(root, classes=CLASSES, masks="images", mask_format="labelme")
    _, mask = found["train"].read(0)
    assert (mask == 1).sum() == 400
    assert (mask == 2).sum() == pytest.approx(np.pi * 100 + 50, rel=0.03)


def test_cocos_own_folders_and_annotations_without_outlines(tmp_path):
    root, made = tmp_path / "data", {"categories": [{"id": 1, "name": "cat"}]}
    for part, count in (("train2017", 3), ("val2017", 2), ("test2017", 1)):
        for index in range(count):
            save(root / part / f"{part}{index}.png", noise(*SIZE, 3, seed=index))
    (root / "annotations").mkdir()
    for name in ("instances_train2017", "instances_val2017", "captions_val2017"):
        part = name.partition("_")[2]
        one = {"image_id": 1, "category_id": 1, "segmentation": [np.ravel(SQUARE).tolist()]}
        shown = [
            {"id": i + 1, "file_name": f"{part}{i}.png"} for i in range(3 if "train" in part else 2)
        ]
        content = {**made, "images": shown, "annotations": [one]}
        (root / f"annotations/{name}.json").write_text(json.dumps(content))
    options = {"classes": CLASSES, "images": ".", "mask_format": "coco"}
    found = folder_sources(root, masks="annotations", **options)
    assert {part: len(source) for part, source in found.items()} == {"train": 3, "val": 2}
    assert (found["val"].read(0)[1] == 1).sum() == 400
    del one["segmentation"]
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(SegFitError, match="there is no 'segmentation'"):
        folder_sources(root, masks="annotations", **options)


BROKEN = {
    "box": ("yolo", "0 0.5 0.5 0.2 0.2\n", "is a box or a point, not an outline"),
    "class": ("yolo", "2 0.1 0.1 0.2 0.2 0.3 0.1\n", "class 2 with data.num_classes=3"),
    "text": ("yolo", "cat 0.1 0.1\n", "no file of yolo, or damaged"),
    "no JSON": ("labelme", "{", "no file of labelme, or damaged"),
    "list": ("labelme", "[]", "no file of labelme, or damaged"),
    "no number": ("yolo", "0 nan 0.1 0.2 0.2 0.3 0.1\n", "corners that are not finite"),
    "label": ("labelme", '{"shapes": [{"label": "cow", "points": []}]}', "'cow' is none of data.class_names"),
    "line": (
        "labelme",
        '{"shapes": [{"label": "cat", "points": [[1, 1], [2, 2]], "shape_type": "line"}]}',
        "a line ('cat') has no outline",
    ),
    "size": ("labelme", '{"shapes": [], "imageHeight": 6, "imageWidth": 8}', "was outlined at 8×6"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_outline_is_named(tmp_path, kind):
    form, text, message = BROKEN[kind]
    root = write(tmp_path / "data", form, [[(1, SQUARE)]] * 3)
    suffix = {"yolo": "txt", "labelme": "json"}[form]
    (root / f"labels/1.{suffix}").write_text(text)
    with pytest.raises(SegFitError) as error:
        check_sources(sources(root, form))
    assert f"1.{suffix}" in str(error.value)
    assert message in str(error.value)


def test_categories_that_are_no_classes_come_with_the_classes_to_set(tmp_path):
    root = write(tmp_path / "data", "coco", [[(1, SQUARE)]] * 3)
    text = (root / "coco.json").read_text().replace('"cat"', '"tiger"')
    (root / "coco.json").write_text(text)
    with pytest.raises(SegFitError) as error:
        sources(root, "coco")
    assert "'data.class_names=[background, dog, tiger]' data.num_classes=3" in str(error.value)


def test_an_image_that_has_no_outlines_may_count_as_background(tmp_path):
    root = write(tmp_path / "data", "yolo", [[(1, SQUARE)]] * 3)
    (root / "labels/1.txt").unlink()
    with pytest.raises(SegFitError, match=r"The mask of 1\.png would be 1\.txt"):
        check_sources(sources(root, "yolo"))
    found = sources(root, "yolo", unmasked="background")
    check_sources(found)
    assert sum(map(len, found.values())) == 3
