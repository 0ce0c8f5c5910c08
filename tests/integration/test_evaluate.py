"""evaluate.py by its real command line, on a run that train.py made."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.optimize
import tifffile
import torch
from omegaconf import OmegaConf
from PIL import Image

import segfit
from segfit.commands.load_run import load_run, load_runs
from segfit.data.images import ImageReader, folder_of
from segfit.errors import SegFitError
from segfit.runs.folder import load_config
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import PredictDataset
from segfit.tasks.segmentation.data.masks import read_index_mask
from segfit.tasks.segmentation.schema import Evaluate
from segfit.tasks.segmentation.scores import boundary_counts, boundary_scores
from tests.integration.evaluating import COLORS, evaluate, write_data
from tests.integration.restoring import TINY
from tests.integration.training import command, finished, train
from tests.unit.data.files import save
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources


def run_cli(script: str, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    # One thread: the same sums in the same order in both programs, and other tests run beside.
    return finished(command(*arguments, script=script), cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Train a run at place/"run 1" on place/data."""
    place = tmp_path_factory.mktemp("evaluate")
    write_data(place / "data")
    done = run_cli(
        "train.py",
        *["hardware=cpu", "model=cnn", "model.base_channels=8", "model.num_blocks=1"],
        *["data=folder", "data.root=data", "data.num_classes=3", "data.background=0"],
        f"data.class_colors={COLORS}",
        *["data.fit=pad", "image_size=[64,72]", "batch_size=2", "epochs=3", "lr=0.01"],
        *["loss.class_weights=balanced", "ema_decay=0.5", "report.logger=[]"],
        *["loader.workers=0", "hydra.run.dir='run 1'"],
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def evaluated(place) -> tuple[Path, str]:
    """Evaluate it; return the folder of the results and what was printed."""
    done = run_cli("evaluate.py", "run='run 1'", "worst=2", cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "run 1/evaluation/val", done.stdout


def read_json(path: Path):
    return json.loads(path.read_text())


def ground_truth(place: Path) -> dict[str, np.ndarray]:
    folder = place / "data/val/masks"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): np.array(Image.open(path))
        for path in sorted(folder.rglob("*.png"))
    }


def test_scores_equal_those_that_training_logged(place, evaluated):
    trained, metrics = (
        read_json(place / "run 1/metrics.json"),
        read_json(evaluated[0] / "metrics.json"),
    )
    assert trained["class_weights"] is not None
    assert trained["best"]["miou"] > 0.2
    own = {key: metrics["scores"][key] for key in trained["best"]}
    assert own == pytest.approx(trained["best"], abs=1e-6)
    assert metrics["scores"].keys() - own.keys() == {"calibration_error"}
    assert metrics["epoch"] == trained["best_epoch"]
    assert metrics["precision"] == trained["precision"]
    assert metrics["samples"] == 5
    assert metrics["status"] == "finished"


def test_scores_equal_numpy_on_the_saved_masks(place, evaluated):
    metrics, confusion = read_json(evaluated[0] / "metrics.json"), np.zeros((3, 3), np.int64)
    truths = ground_truth(place)
    for name, truth in truths.items():
        with Image.open(evaluated[0] / f"masks/{name}.png") as file:
            assert file.mode == "P"
            assert file.getpalette()[:9] == np.ravel(COLORS).tolist()
            prediction = np.array(file)
        assert prediction.shape == truth.shape
        assert np.array_equal(read_index_mask(evaluated[0] / f"masks/{name}.png"), prediction)
        with Image.open(evaluated[0] / f"overlays/{name}.jpg") as overlay:
            assert overlay.size == truth.shape[::-1]
        for t, p in zip(truth[truth != 255], prediction[truth != 255], strict=True):
            confusion[t, p] += 1
    assert len(list((evaluated[0] / "masks").rglob("*.*"))) == len(truths)
    assert metrics["confusion"] == confusion.tolist()

    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    iou, f1 = hits / union, 2 * hits / (confusion.sum(0) + confusion.sum(1))
    expected = {
        "miou": iou.mean(),
        "macro_f1": f1.mean(),
        "foreground_iou": iou[1:].mean(),
        "foreground_f1": f1[1:].mean(),
        "pixel_accuracy": hits.sum() / confusion.sum(),
        "mean_accuracy": (hits / confusion.sum(1)).mean(),
    }
    assert {key: metrics["scores"][key] for key in expected} == pytest.approx(expected, abs=1e-6)
    with (evaluated[0] / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["IoU"]) for row in rows] == pytest.approx(iou)
    assert [int(row["pixels"]) for row in rows] == confusion.sum(1).tolist()


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(0))
    return shares / shares.sum(0)


def test_probabilities_are_calibrated_by_a_temperature(place, evaluated, tmp_path):
    run = shutil.copytree(place / "run 1", tmp_path / "run")
    paths, truths = sorted((place / "data/val/images").rglob("*.png")), ground_truth(place)
    counted = [truth != 255 for truth in truths.values()]
    labels = np.concatenate([t[v] for t, v in zip(truths.values(), counted, strict=True)])

    def predicted() -> np.ndarray:
        found = segfit.load(run, device="cpu").predict(list(map(str, paths)))
        parts = zip(found, counted, strict=True)
        return np.concatenate([one.probabilities[:, v] for one, v in parts], 1).astype(float)

    def error(shares: np.ndarray) -> float:
        sure, right = shares.max(0), shares.argmax(0) == labels
        bins = np.digitize(sure, np.linspace(0, 1, 16)[1:-1])
        gaps = (right[bins == b].sum() - sure[bins == b].sum() for b in range(15))
        return sum(map(abs, gaps)) / len(labels)

    raw, before = predicted(), read_json(evaluated[0] / "metrics.json")
    assert before["scores"]["calibration_error"] == pytest.approx(error(raw), abs=1e-6)
    assert len(before["intervals"]["calibration_error"]) == 2

    done = run_cli("evaluate.py", f"run={run}", "temperature=fit", "bootstrap=0", cwd=place)
    assert done.returncode == 0, done.stderr
    assert f"Temperature fitted on {len(labels):,} pixels" in done.stdout
    kept = read_json(run / "temperature.json")["temperature"]

    def entropy(powers: np.ndarray) -> float:
        shares = softmax(np.log(raw) * np.exp(powers[0]))
        return -np.log(shares[labels, np.arange(len(labels))]).mean()

    found = scipy.optimize.minimize(entropy, [0.0], method="Nelder-Mead", tol=1e-8)
    assert kept == pytest.approx(np.exp(-found.x[0]), rel=1e-3)

    with pytest.warns(UserWarning, match=f"calibrated by temperature {kept:.4g}"):
        after = predicted()
    np.testing.assert_allclose(after, softmax(np.log(raw) / kept), atol=1e-5)
    again = evaluate(place, run=str(run), probabilities="True")
    assert again.result.scores["calibration_error"] == pytest.approx(error(after), abs=1e-6)
    assert again.facts["temperature"] == kept
    for name, counts in zip(truths, counted, strict=True):
        assert (run / f"evaluation/val/masks/{name}.png").read_bytes() == (
            evaluated[0] / f"masks/{name}.png"
        ).read_bytes()
        written = np.load(run / f"evaluation/val/probabilities/{name}.npy")[:, counts]
        assert np.abs(written - after[:, : written.shape[1]]).max() < 1e-3
        after = after[:, written.shape[1] :]
    reported: list[str] = []
    options = OmegaConf.structured(Evaluate(run=str(run), checkpoint="last"))
    assert load_run(options, load_config(run), reported.append).temperature == 1
    assert "another checkpoint" in reported[0]


def test_saved_masks_are_read_back_as_ground_truth(place, evaluated, tmp_path):
    shutil.copytree(place / "data/val/images", tmp_path / "images")
    shutil.copytree(evaluated[0] / "masks", tmp_path / "masks")
    classes = Classes(("class_0", "class_1", "class_2"))
    sources = folder_sources(tmp_path, classes=classes, ignore_index=None)
    check_sources(sources)
    for source in sources.values():
        for index in range(len(source)):
            saved = read_index_mask(evaluated[0] / f"masks/{source.id(index)}.png")
            assert np.array_equal(source.read(index)[1], saved)


def test_the_worst_images_are_named_and_shown(place, evaluated):
    folder, printed = evaluated
    worst = read_json(folder / "metrics.json")["worst"]
    scores = {}
    for name, truth in ground_truth(place).items():
        prediction = np.array(Image.open(folder / f"masks/{name}.png"))[truth != 255]
        truth = truth[truth != 255]
        ious = [
            ((truth == c) & (prediction == c)).sum() / ((truth == c) | (prediction == c)).sum()
            for c in np.unique(truth)
        ]
        scores[name] = np.mean(ious)
    ranked = sorted(scores, key=lambda name: scores[name])
    assert [case["id"] for case in worst] == ranked[:2]
    assert [case["miou"] for case in worst] == pytest.approx([scores[name] for name in ranked[:2]])
    for picture in ("worst.png", "best.png", "confusion_matrix.png"):
        assert min(Image.open(folder / picture).size) > 100
        assert str(Path("run 1/evaluation/val") / picture) in printed
    assert ranked[0] in printed
    assert "class_2" in printed


def test_images_without_masks_at_their_own_size(place, evaluated):
    photos = place / "photos"
    upright = np.array(Image.open(place / "data/val/images/patient_0/slice.0.png"))
    save(photos / "a/plain.png", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn to the right
    save(photos / "turned.png", np.rot90(upright).copy(), exif=exif)
    done = run_cli("evaluate.py", "run='run 1'", "images=photos", "out=results", cwd=place)
    assert done.returncode == 0, done.stderr
    masks = [np.array(Image.open(place / f"results/masks/{n}.png")) for n in ("a/plain", "turned")]
    assert masks[0].shape == upright.shape[:2]
    assert np.array_equal(masks[0], masks[1])
    expected = Image.open(evaluated[0] / "masks/patient_0/slice.0.png")
    assert np.array_equal(masks[0], np.array(expected))
    assert Image.open(place / "results/overlays/a/plain.jpg").size == upright.shape[1::-1]
    assert "scores" not in read_json(place / "results/metrics.json")
    assert "Warning" not in done.stderr


def test_the_last_checkpoint_gives_the_last_scores(place, tmp_path):
    out = tmp_path / "last"
    (out / "masks").mkdir(parents=True)  # of an earlier evaluation
    (out / "metrics.json").write_text('{"kind": "evaluation"}')
    done = evaluate(place, checkpoint="last", save_masks=False, worst=0, out=str(out))
    recorded = read_json(place / "run 1/metrics.json")
    own = {key: done.result.scores[key] for key in recorded["last"]}
    assert own == pytest.approx(recorded["last"], abs=1e-6)
    assert done.facts["epoch"] == 2
    written = {"confusion_matrix.png", "intervals.csv", "metrics.json", "per_class.csv"}
    assert {path.name for path in done.written} == written
    assert {path.name for path in out.iterdir()} == {*written, "masks"}


def test_python_predicts_the_same_pixels(place, evaluated, tmp_path):
    model = segfit.load(place / "run 1", device="cpu")
    folder = place / "data/val/images"
    paths = sorted(folder.rglob("*.png"))
    names = [path.relative_to(folder).with_suffix("") for path in paths]
    written = [np.array(Image.open(evaluated[0] / f"masks/{name}.png")) for name in names]
    forms = (
        paths,
        [Image.open(path) for path in paths],
        [np.array(Image.open(path)) for path in paths],
    )
    for images in forms:
        for found, mask in zip(model.predict(images), written, strict=True):
            assert np.array_equal(found.mask, mask)
            assert np.array_equal(found.probabilities.argmax(0), mask)
            assert found.probabilities.sum(0) == pytest.approx(1, abs=1e-5)
    one = model.predict(str(paths[1]))
    assert np.array_equal(one.mask, written[1])
    assert one.class_names == ("class_0", "class_1", "class_2")
    assert model.predict([]) == []
    both = segfit.load([place / "run 1", place / "run 1/checkpoints/best.pt"], device="cpu")
    assert both.predict(paths[1]).probabilities == pytest.approx(one.probabilities, abs=1e-5)
    with pytest.raises(SegFitError, match=r"nothing\.png: no such file"):
        model.predict(place / "nothing.png")
    with pytest.raises(SegFitError, match=r"image 0: dict is no picture"):
        model.predict({})
    with pytest.raises(SegFitError, match=r"image 1: .* \(.*train\.log: its name does not end as"):
        model.predict([paths[0], place / "run 1/train.log"])
    volume = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 3), np.uint8), np.eye(4)), volume)
    with pytest.raises(SegFitError, match=r"a volume is many images"):
        model.predict([volume, paths[0]])
    with pytest.raises(SegFitError, match=r"threshold=0\.3: is for two classes, and the run has 3"):
        segfit.load(place / "run 1", threshold=0.3)
    with pytest.raises(SegFitError, match=r"segfit\.load: export=x\.pt2 is for evaluate\.py"):
        segfit.load(place / "run 1", export="x.pt2")
    for given, options in (([], {}), (place / "run 1", {"temperature": "fit"})):
        with pytest.raises(SegFitError, match=r"needs a run; temperature=fit is for evaluate\.py"):
            segfit.load(given, **options)
    with pytest.raises(SegFitError, match=r"segfit\.load: Key 'fold' not in"):
        segfit.load(place / "run 1", fold=1)


@pytest.mark.parametrize("kind", ["12 bits", "8 in 16", "8 in 32", "dark 8", "deep"])
def test_python_warns_of_a_picture_that_would_be_black(place, kind, recwarn):
    model = segfit.load(place / "run 1", device="cpu")
    pixels = np.arange(64 * 64).reshape(64, 64) // 16
    given = {
        "12 bits": (pixels * 16).astype(np.uint16),
        "8 in 16": Image.fromarray(pixels.astype(np.int32)).convert("I;16"),
        "8 in 32": Image.fromarray(pixels.astype(np.int32)),
        "dark 8": (pixels // 64).astype(np.uint8),
        "deep": (pixels * 257).astype(np.uint16),
    }[kind]
    model.predict([np.zeros((64, 64), np.uint16), given])
    reported = [str(one.message) for one in recwarn if "nearly one shade" in str(one.message)]
    assert len(reported) == (kind not in ("dark 8", "deep"))
    assert all("1 images" in text and "image 1 (0 to " in text for text in reported)


def test_python_takes_pictures_of_any_mode_and_names_them(place):
    model = segfit.load(place / "run 1", device="cpu")
    image = Image.open(next((place / "data/val/images").rglob("*.png"))).convert("RGB")
    expected = model.predict(image).mask
    assert np.array_equal(model.predict(np.asarray(image).astype(np.uint16) * 257).mask, expected)
    for mode in ("YCbCr", "HSV"):
        other = image.convert(mode)
        assert np.array_equal(model.predict(other).mask, model.predict(other.convert("RGB")).mask)
    assert np.array_equal(model.predict(image.convert("RGBX")).mask, expected)
    with pytest.raises(SegFitError, match=r"^image 0: holds 5 bands, .* save those\.$"):
        model.predict(np.zeros((8, 8, 5), np.uint16))
    with pytest.raises(SegFitError, match=r"of uint8 or uint16"):
        model.predict(np.zeros((8, 8, 3), np.float32))


def test_arrays_have_the_bands_of_the_run(tmp_path):
    values = np.arange(6 * 5 * 7, dtype=np.int16).reshape(6, 5, 7)
    with folder_of([values, tmp_path / "b.tif"], bands=True) as folder:
        first, _ = sorted(Path(folder).iterdir())
        assert np.array_equal(np.load(first), values)


def test_runs_of_two_tasks_are_not_compared(place, tmp_path):
    train(tmp_path / "restored", *TINY, "max_steps=1", base=())
    done = run_cli("evaluate.py", "run='run 1'", f"compare={tmp_path}/restored", cwd=place)
    assert done.returncode == 2
    assert "its task is restoration, and that of this run is segmentation" in done.stderr


def test_runs_of_two_tasks_are_not_averaged():
    configs = [OmegaConf.create({"task": {"name": name}}) for name in ("segmentation", "x")]
    with pytest.raises(SegFitError, match="their tasks are segmentation, x"):
        load_runs(OmegaConf.create({"run": ["a", "b"]}), configs, print)


@pytest.mark.parametrize(("asked", "kind"), [(True, np.float16), ("uint8", np.uint8)])
def test_probabilities_are_written_on_demand(place, evaluated, tmp_path, asked, kind):
    images = str(place / "data/val/images/patient_0")
    options = {"images": images, "probabilities": asked, "sliding_window": asked == "uint8"}
    done = evaluate(place, out=str(tmp_path / "out"), worst=0, **options)
    assert tmp_path / "out/probabilities" in done.written
    for path in (tmp_path / "out/probabilities").iterdir():
        shares, mask = np.load(path), np.array(Image.open(tmp_path / f"out/masks/{path.stem}.png"))
        assert (shares.dtype, shares.shape) == (kind, (3, *mask.shape))
        assert shares.astype(float).sum(0) == pytest.approx(
            255 if kind == np.uint8 else 1, rel=0.01
        )
        likely = np.take_along_axis(shares, mask[None].astype(int), 0)[0]
        assert (likely == shares.max(0)).all()


def test_images_too_large_for_memory_are_read_strip_by_strip(place, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (300, 170, 3)).astype(np.uint8)
    deep = rng.integers(0, 65536, (300, 170)).astype(np.uint16)
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(
        folder / "tiles.tif", pixels, tile=(64, 48), compression="zlib", photometric="rgb"
    )
    tifffile.imwrite(folder / "strips.tif", pixels, rowsperstrip=37, photometric="rgb")
    planes = np.moveaxis(pixels, 2, 0)
    tifffile.imwrite(
        folder / "planes.tif", planes, tile=(64, 64), planarconfig="separate", photometric="rgb"
    )
    tifffile.imwrite(folder / "deep.tif", deep, rowsperstrip=50)
    options = {
        "images": str(folder),
        "sliding_window": True,
        "batch_size": 5,
        "probabilities": True,
    }
    evaluate(place, out=str(tmp_path / "whole"), **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25000)
    evaluate(place, out=str(tmp_path / "parts"), **options)
    for path in folder.iterdir():
        mask = tifffile.imread(tmp_path / f"parts/masks/{path.name}")
        monkeypatch.undo()
        assert np.array_equal(mask, Image.open(tmp_path / f"whole/masks/{path.stem}.png"))
        both = [
            np.load(tmp_path / f"{out}/probabilities/{path.stem}.npy") for out in ("whole", "parts")
        ]
        assert np.array_equal(*both)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25000)
    dataset = PredictDataset(folder, (64, 72), "crop", ImageReader(percentiles=(1, 99)))
    with pytest.raises(SegFitError, match="too large to be read at once, as the percentiles"):
        dataset[0]
    with pytest.raises(
        SegFitError, match=r"larger than .* Save it as TIFF, .* sliding_window=true"
    ):
        evaluate(place, **{**options, "sliding_window": False}, out=str(tmp_path / "no"))


PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_twenty_thousand_pixels_a_side_take_less_than_four_gib(tmp_path):
    side, rng = 20000, np.random.default_rng(0)
    tiles = (np.full((512, 512, 3), rng.integers(256), np.uint8) for _ in range(40 * 40))
    (tmp_path / "images").mkdir()
    tifffile.imwrite(
        tmp_path / "images/large.tif", tiles, shape=(side, side, 3), dtype=np.uint8,
        tile=(512, 512), compression="zlib", photometric="rgb",
    )  # fmt: skip
    small = ("model.base_channels=4", "image_size=512", "data.resolution=512", "max_steps=1")
    train(tmp_path / "run", *small, "batch_size=2", "data.train_size=2", "data.val_size=1")
    options = ("sliding_window=true", "overlap=0.1", "workers=0", "device=cpu", "precision=fp32")
    line = command(
        f"run={tmp_path}/run", f"images={tmp_path}/images", *options, script="evaluate.py"
    )
    done = finished([line[0], "-c", PEAK, *line[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rsplit("KiB ")[-1]) < 4 * 2**20
    with tifffile.TiffFile(tmp_path / "run/evaluation/images-images/masks/large.tif") as file:
        assert file.pages[0].shape == (side, side)


def test_windows_and_mirror_images_at_full_resolution(place, tmp_path):
    done = evaluate(
        place, sliding_window=True, overlap=0.25, flip=True, batch_size=4, out=str(tmp_path / "out")
    )
    assert done.facts["batch_size"] == 1
    truths = ground_truth(place).values()
    assert done.result.values["confusion"].sum() == sum((truth != 255).sum() for truth in truths)
    assert done.result.scores["miou"] > 0.2


def test_a_batch_of_another_size_gives_the_same_scores(place, evaluated, tmp_path):
    done = evaluate(place, batch_size=5, precision={"name": "fp32"}, out=str(tmp_path / "5"))
    other = evaluate(place, batch_size=1, precision={"name": "fp32"}, out=str(tmp_path / "1"))
    assert done.result.scores == pytest.approx(other.result.scores, abs=1e-4)


def test_a_run_that_was_killed_counts_its_class_weights_again(place, evaluated, tmp_path):
    killed = shutil.copytree(place / "run 1", tmp_path / "run")
    (killed / "metrics.json").unlink()
    done = evaluate(place, run=str(killed), out=str(tmp_path / "out"))
    expected = read_json(evaluated[0] / "metrics.json")["scores"]
    assert done.result.scores == pytest.approx(expected, abs=1e-6)


def test_where_memory_runs_out_smaller_batches_give_the_same(place, tmp_path, monkeypatch, capsys):
    expected = evaluate(place, batch_size=5, out=str(tmp_path / "whole"))
    call = torch.nn.Module.__call__

    def at_most_two(module, *inputs):
        if type(module).__name__ == "CNN" and len(inputs[0]) > 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return call(module, *inputs)

    monkeypatch.setattr(torch.nn.Module, "__call__", at_most_two)
    found = evaluate(place, batch_size=5, out=str(tmp_path / "pieces"))
    assert "out of memory in validation with 5 samples at once" in capsys.readouterr().out
    assert found.result.scores == pytest.approx(expected.result.scores, abs=1e-6)
    assert found.facts["batch_size"] == 2
    assert expected.facts["batch_size"] == 5
    for name in ("masks", "overlays"):
        files = sorted(path.name for path in (tmp_path / "pieces" / name).iterdir())
        assert files == sorted(path.name for path in (tmp_path / "whole" / name).iterdir())


def test_results_are_replaced_where_they_are_ones_own(place, tmp_path):
    out = tmp_path / "out"
    first = evaluate(place, out=str(out), worst=1)
    (out / "masks/patient_0/slice.0.png").write_bytes(b"")
    again = evaluate(place, out=str(out), worst=1)
    assert again.result.scores == first.result.scores
    assert Image.open(out / "masks/patient_0/slice.0.png").size == (90, 70)
    assert not list(out.rglob("*.partial"))


def test_intervals_are_those_of_the_images(place, evaluated):
    metrics = read_json(evaluated[0] / "metrics.json")
    assert metrics["units"] == 5
    assert "95 % intervals by 1000 resamples of 5 samples" in evaluated[1]
    pairs = [
        (
            truth[truth != 255],
            np.array(Image.open(evaluated[0] / f"masks/{name}.png"))[truth != 255],
        )
        for name, truth in ground_truth(place).items()
    ]
    draws, random = [], np.random.default_rng(1)
    for _ in range(1000):
        truth, prediction = (
            np.concatenate(parts)
            for parts in zip(*(pairs[index] for index in random.integers(5, size=5)), strict=True)
        )
        draws.append((truth == prediction).mean())
    expected = np.quantile(draws, (0.025, 0.975))
    assert metrics["intervals"]["pixel_accuracy"] == pytest.approx(expected, abs=0.01)
    with (evaluated[0] / "intervals.csv").open() as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    assert [float(rows["miou"][key]) for key in ("low", "high")] == metrics["intervals"]["miou"]


def test_two_runs_are_compared_on_the_same_images(place, evaluated, tmp_path):
    shutil.copytree(place / "run 1/checkpoints", tmp_path / "other/checkpoints")
    config = (place / "run 1/config.yaml").read_text()
    group = config.replace("group: null", "group: patient_(\\d)")
    (tmp_path / "other/config.yaml").write_text(group)
    best = torch.load(tmp_path / "other/checkpoints/best.pt", weights_only=True)
    weights = best.get("ema") or best["model"]
    *_, last = weights
    weights[last] = weights[last] + torch.tensor([0.5, 0.0, 0.0])  # the classifier's bias
    torch.save(best, tmp_path / "other/checkpoints/best.pt")
    options = [
        f"run={tmp_path}/other",
        "compare='run 1'",
        "metrics.boundary=2",
        f"root={place}/data",
        f"out={tmp_path}/out",
    ]
    done = run_cli("evaluate.py", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "2 groups; the difference from the other run" in done.stdout
    found = read_json(tmp_path / "out/metrics.json")
    other = read_json(tmp_path / "out/compared/metrics.json")
    assert found["units"] == 2  # patients
    before = read_json(evaluated[0] / "metrics.json")["scores"]
    assert {key: other["scores"][key] for key in before} == before
    classes, counts = Classes(("a", "b", "c"), background=0), np.zeros((6, 3))
    for name, truth in ground_truth(place).items():
        saved = np.array(Image.open(tmp_path / f"out/masks/{name}.png"))
        counts += boundary_counts(saved, truth, classes, 2)
    for key, value in boundary_scores(counts, np.ones(3, bool)).items():
        assert found["scores"][key] == pytest.approx(value)
        assert key in found["compared"]
    for key, one in found["compared"].items():
        assert one["other"] == pytest.approx(other["scores"][key], abs=1e-12)
        assert one["difference"] == pytest.approx(found["scores"][key] - one["other"], abs=1e-12)
        assert 0 < one["p"] <= 1
    assert found["compared"]["miou"]["difference"] != 0

    named = config.replace("class_names: null", "class_names: [sky, liver, kidney]")
    (tmp_path / "other/config.yaml").write_text(named)
    with pytest.raises(SegFitError, match=r"classes: .*liver"):
        evaluate(place, compare=f"{tmp_path}/other", out=f"{tmp_path}/out")
