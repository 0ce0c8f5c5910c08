"""task=restoration through the real commands: it trains, resumes exactly, is scored, writes pictures and refuses bad data."""

import copy
import csv
import io
import itertools
import json
import signal
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

import segfit
from segfit.assembly.training import make_training
from segfit.commands.evaluate import evaluate_run
from segfit.commands.export import export_run
from segfit.engine import precision as engine_precision
from segfit.engine.checkpoint import load_checkpoint
from segfit.runs.folder import load_config
from segfit.tasks.restoration.data.folder import read_picture
from tests.integration.restoring import SMALL, TINY, picture, write
from tests.integration.training import (
    ROOT,
    command,
    compose_run,
    finished,
    resume,
    same,
    start,
    train,
    wait_for,
)

CPU = torch.device("cpu")


def run(folder: Path, *arguments: str, script: str = "train.py", code: int = 0) -> str:
    done = finished(command(*arguments, script=script), folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def values(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Hold pictures of several sizes and depths, in folders."""
    root = tmp_path_factory.mktemp("photos")
    for number, (height, width) in enumerate([(64, 48), (50, 90), (72, 72), (40, 64), (64, 64)]):
        deep = number == 2
        write(
            root / f"roll {number % 2}/{number}.png", picture(height, width, seed=number, deep=deep)
        )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos) -> Path:
    folder = tmp_path_factory.mktemp("restored")
    output = run(
        folder,
        *SMALL,
        "data=folder",
        f"data.root={photos}",
        "hydra.run.dir=run",
        *("epochs=24", "val_every=12", "lr=0.006"),
    )
    assert "patch/s" in output
    return folder


# ----------------------------------------------------------------------------------- training


def choices(group: str) -> list[str]:
    """Return what can be chosen of a group of conf/."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


# What is drawn: a range for each value that may be one; motion, and grey, once.
DRAWN = {
    "noise": ("degrade=noise", "degrade.sigma=[5,50]"),
    "blur": ("degrade=blur",),
    "motion": ("degrade=blur", "degrade.kind=motion", "data.image_mode=gray"),
    "jpeg": ("degrade=jpeg",),
    "mixed": ("degrade=mixed",),
}


# auto is one of the others. A CPU has fp16, too, though train.py takes it for none that trains well there.
@pytest.mark.parametrize("precision", [name for name in choices("precision") if name != "auto"])
@pytest.mark.parametrize("degrade", choices("degrade"))
@pytest.mark.parametrize("model", choices("model/restoration"))
def test_every_model_trains_on_every_degradation(tmp_path, monkeypatch, model, degrade, precision):
    monkeypatch.setattr(engine_precision, "native_precisions", lambda _: ["fp32", "bf16", "fp16"])
    options = (f"model={model}", f"precision={precision}", *DRAWN[degrade])
    done = train(tmp_path / "run", *options, "max_steps=2", base=TINY)
    assert len(done.losses) == 2
    assert all(np.isfinite(done.losses))
    assert all(np.isfinite(log.grad_norm) and log.grad_norm > 0 for log in done.heard.logs)
    state = done.training.fit.state
    assert state.precision.name == precision
    assert state.scaler.get_scale() == (65536 if precision == "fp16" else 1)  # nothing was skipped
    wanted = {"psnr", "ssim", "psnr_gain", "ssim_gain", "loss"}
    assert set(done.training.fit.result.scores) >= wanted


def test_its_first_batch_is_drawn_with_the_noise_in_it(trained):
    drawn = read_picture(trained / "run/first_batch.png", "rgb").astype(
        float
    )  # patches of 32, each pixel 2 × 2
    given, target = (drawn[58:122:2, left : left + 64 : 2] for left in (10, 132))
    assert np.std(given - target) == pytest.approx(25, abs=4)


def test_it_gains_on_its_input(trained):
    scores = values(trained / "run/metrics.json")["best"]
    assert scores["psnr_gain"] > 1
    assert (
        "scores: on RGB, 0 pixels cropped, rounded to 8 bits"
        in (trained / "run/train.log").read_text()
    )


# Each model and whatever is drawn; the mixture of all with both.
@pytest.mark.parametrize(
    ("model", "drawn"),
    [*zip(itertools.cycle(["nafnet", "cnn"]), DRAWN, strict=False), ("cnn", "mixed")],
)
def test_what_is_drawn_depends_on_neither_accumulation_nor_resuming(tmp_path, model, drawn):
    def trained(name, size, count, steps=3):
        batch = (f"batch_size={size}", f"accumulate={count}", f"max_steps={steps}")
        options = (f"model={model}", *DRAWN[drawn], "optimizer=sgd", "lr=0.1", "data.val_size=1")
        return train(tmp_path / name, *options, *batch, base=TINY).model.state_dict()

    whole, parts = trained("whole", 8, 1), trained("parts", 2, 4)
    for name, large in whole.items():
        torch.testing.assert_close(parts[name], large, rtol=1e-4, atol=1e-6)
    cut = trained("cut", 2, 4, steps=2)  # amid an epoch
    assert not same(cut, parts)
    assert same(resume(tmp_path / "cut", "max_steps=3").model.state_dict(), parts)


def test_killed_and_resumed_it_ends_as_if_nothing_had_been(tmp_path):
    options = (
        *TINY,
        "degrade=mixed",
        "epochs=3",
        "checkpoint.every_steps=4",
        "report.logger=[]",
    )
    run(tmp_path, *options, "hydra.run.dir=calm")
    struck = tmp_path / "struck"
    process = start(tmp_path, *options, f"hydra.run.dir={struck}")
    wait_for(process, tmp_path, "update 10/", logs="struck/train.log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path, f"resume={struck}")
    resumed, calm = (
        load_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("struck", "calm")
    )
    assert same(resumed["model"], calm["model"])
    assert resumed["progress"]["best_scores"] == calm["progress"]["best_scores"]


def test_a_cache_changes_nothing(tmp_path, photos):
    losses = [
        train(
            tmp_path / str(number),
            "data=folder",
            f"data.root={photos}",
            f"data.cache={cache}",
            base=SMALL,
        ).losses
        for number, cache in enumerate(("none", "ram", "disk", "disk"))
    ]
    assert losses.count(losses[0]) == 4


@pytest.mark.slow
def test_the_first_command_gains_six_decibels(tmp_path):
    output = run(tmp_path, "task=restoration")
    (metrics,) = tmp_path.glob("outputs/*/*/metrics.json")
    found = values(metrics)
    assert found["status"] == "finished"
    assert found["best"]["psnr_gain"] >= 6
    assert f"PSNR {found['best']['psnr']:.4f}" in output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[str, ...]:
    """Return the options of pairs of 8 and 16 bits."""
    root = tmp_path_factory.mktemp("pairs")
    for number in range(4):
        clean = picture(48, 56, seed=number, deep=number == 3)
        write(root / f"sharp/{number}.png", clean)
        write(root / f"soft/{number}.png", (clean // 2 + 40).astype(clean.dtype))
    return ("data=pairs", f"data.root={root}", "data.input=soft", "data.target=sharp")


def test_cached_pairs_come_in_the_same_batches(tmp_path, pairs):
    seen = []
    for number, cache in enumerate(("none", "ram", "disk", "disk")):
        config = compose_run(*pairs, f"data.cache={cache}", "data.patches=2", base=SMALL)
        fit = make_training(config, tmp_path / str(number), lambda _: None).fit
        batches = [*fit.train.epoch(0, 0), *fit.train.epoch(1, 0), *fit.held_out()]
        assert all({"input", "target"} <= batch.keys() for batch in batches)
        assert not any(torch.equal(batch["input"], batch["target"]) for batch in batches)
        seen.append(batches)
    for batches in seen[1:]:
        for batch, first in zip(batches, seen[0], strict=True):
            assert all(torch.equal(batch[name], first[name]) for name in first)
            assert batch["target"].dtype == first["target"].dtype


def test_pairs_are_not_degraded(tmp_path):
    for number in range(4):
        clean = picture(48, 48, seed=number)
        write(tmp_path / f"data/sharp/{number}.png", clean)
        write(tmp_path / f"data/soft/{number}.png", (clean // 2 + 40).astype(np.uint8))
    pairs = ("data=pairs", f"data.root={tmp_path / 'data'}", "data.input=soft", "data.target=sharp")
    done = train(tmp_path / "run", *pairs, "lr=0.003", "epochs=12", base=SMALL)
    assert done.training.fit.result.scores["psnr_gain"] > 3
    assert done.training.facts["degraded by"] == "given pairs"


def test_hydra_shows_what_the_task_makes_of_a_choice(tmp_path):
    line = ("hardware=8gb", "data=folder", "model=nafnet", "task=restoration", "--cfg", "job")
    config = yaml.safe_load(run(tmp_path, *line))
    sizes = {"base_channels": 64, "num_blocks": 6, "checkpointing": False}
    assert config["model"] == {"name": "nafnet", **sizes}
    assert (config["hardware"]["name"], config["hardware"]["vram_gb"]) == ("8gb", 8)
    assert (config["patch_size"], config["batch_size"], config["lr"]) == (128, 16, 5e-4)
    data = config["data"]
    assert (data["name"], data["root"], data["image_mode"]) == ("folder", "???", "rgb")
    assert config["degrade"] == {"name": "noise", "sigma": 25}
    assert (config["loss"]["name"], config["loss"]["perceptual"]) == ("charbonnier", 0)
    assert not list(tmp_path.iterdir())


def test_recipes_are_swept_the_highest_psnr_first_and_one_of_them_goes_on(tmp_path):
    run(tmp_path, "-m", *TINY, "hardware=8gb,4gb", "hydra.sweep.dir=sweep")
    with (tmp_path / "sweep/leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["1", "0"]  # a higher learning rate learns faster
    assert float(rows[0]["best_psnr"]) > float(rows[1]["best_psnr"])
    assert {row["monitored"] for row in rows} == {"psnr"}
    swept = [load_config(tmp_path / f"sweep/{job}") for job in (0, 1)]
    assert [(one.hardware.name, one.lr) for one in swept] == [("8gb", 5e-4), ("4gb", 1e-3)]

    said = run(tmp_path, "resume=sweep/1", code=2)
    assert "epochs=2 is reached. To continue, raise epochs." in said
    said = run(tmp_path, "resume=sweep/1", "hardware=8gb", "epochs=3", code=2)
    assert "hardware=8gb: cannot change when a run is resumed" in said
    run(tmp_path, "resume=sweep/1", "epochs=3")
    assert "resuming at update 12" in (tmp_path / "sweep/1/train.log").read_text()
    again = load_config(tmp_path / "sweep/1")
    assert (again.hardware.name, again.lr, again.epochs) == ("4gb", 1e-3, 3)


def test_tensorboard_has_the_curve_the_gain_pictures_and_a_row_by_psnr(trained):
    board = EventAccumulator(str(trained / "run/tensorboard"), size_guidance={"images": 0})
    best = values(trained / "run/metrics.json")["best"]
    board.Reload()
    for name in ("psnr", "ssim", "psnr_gain", "ssim_gain"):
        curve = {event.step: event.value for event in board.Scalars(f"score/{name}")}
        assert [*curve] == [48, 96]
        assert board.Scalars(f"score_best/{name}")[-1].value == pytest.approx(best[name], abs=1e-5)
        assert name != "psnr" or max(curve.values()) == pytest.approx(best[name], abs=1e-5)

    (tag,) = board.Tags()["images"]  # of the held-out picture
    assert tag.startswith("validation/panel/roll ")
    first, last = board.Images(tag)
    assert (first.step, last.step) == (48, 96)
    panel = Image.open(io.BytesIO(last.encoded_image_string)).convert("L")
    given, restored, target = (  # of 64 × 48, each pixel 2 × 2
        np.asarray(panel.crop((left, 34, left + 96, 162)), float) for left in (10, 132, 254)
    )
    assert np.abs(restored - target).mean() < np.abs(given - target).mean() < 25

    rows = board.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(rows[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["model.name"].string_value == "cnn"
    assert start.hparams["degrade.name"].string_value == "noise"
    assert start.hparams["patch_size"].number_value == 32
    columns = metadata.parse_experiment_plugin_data(rows[metadata.EXPERIMENT_TAG]).metric_infos
    assert "score_best/psnr" in {column.name.tag for column in columns}


# --------------------------------------------------------------------------------- evaluation


def test_it_is_evaluated_as_training_scored_it(trained):
    output = run(trained, "run=run", "device=cpu", script="evaluate.py")
    found = values(trained / "run/evaluation/val/metrics.json")
    assert found["scores"] == values(trained / "run/metrics.json")["best"]
    assert found["degraded_by"] == "noise sigma=25.0"
    assert f"PSNR {found['scores']['psnr']:.4f}" in output
    assert [entry["psnr"] for entry in found["worst"]] == [pytest.approx(found["scores"]["psnr"])]
    assert (trained / "run/evaluation/val/worst.png").is_file()


def test_a_test_set_of_its_own_is_scored_whole(trained, photos):
    options = ("metrics.channels=y", "metrics.crop_border=4", f"root={photos}", "split=test")
    run(trained, "run=run", "compare=run", "device=cpu", *options, script="evaluate.py")
    found = values(trained / "run/evaluation/test/metrics.json")
    assert found["samples"] == found["units"] == 5
    for name in ("psnr", "ssim", "psnr_gain", "ssim_gain"):
        low, high = found["intervals"][name]
        assert low < found["scores"][name] < high
        itself = {"other": pytest.approx(found["scores"][name]), "from": 0, "to": 0, "p": 1}
        assert found["compared"][name] == {**itself, "difference": 0}
    assert found["metrics"] == {"channels": "y", "crop_border": 4, "rounded": True, "lpips": None}


def test_pictures_are_restored_in_their_own_depth(trained, tmp_path):
    for name, deep in (("a/8", False), ("a/16", True)):
        write(tmp_path / f"noisy/{name}.png", picture(70, 90, seed=7, deep=deep))
    write(tmp_path / "noisy/grey.png", picture(33, 40, 1, seed=8))
    write(tmp_path / "noisy/12.png", picture(33, 40, deep=True) // 16)
    said = run(
        trained, "run=run", f"images={tmp_path / 'noisy'}", f"out={tmp_path / 'clean'}", "device=cpu", "flip=true", script="evaluate.py"
    )  # fmt: skip
    assert "1 images that are predicted are nearly one shade" in said
    assert f"{tmp_path / 'noisy/12.png'} (" in said
    model = segfit.load(trained / "run", device="cpu", flip=True)
    for name, kind, shape in (
        ("a/8", np.uint8, (70, 90, 3)),
        ("a/16", np.uint16, (70, 90, 3)),
        ("grey", np.uint8, (33, 40, 3)),
    ):
        restored = read_picture(tmp_path / f"clean/restored/{name}.png", "rgb")
        assert restored.dtype == kind
        assert restored.shape == shape
        assert np.array_equal(model.predict(tmp_path / f"noisy/{name}.png"), restored)
    both = [read_picture(tmp_path / f"clean/restored/a/{depth}.png", "rgb") for depth in (8, 16)]
    np.testing.assert_allclose(both[0] / 255, both[1] / 65535, atol=0.01)


@pytest.mark.parametrize(
    ("mode", "colour_type"), [("rgb", 2), pytest.param("gray", 0, marks=pytest.mark.slow)]
)
def test_splits_are_written_in_the_depth_of_their_files(tmp_path, mode, colour_type):
    kinds = [(1, False), (3, False), (1, True), (3, True)]
    for number, (channels, deep) in enumerate(kinds):
        for split in ("train", "val", "test"):
            pixels = picture(48, 40, channels, seed=number, deep=deep)
            write(tmp_path / f"data/{split}/{number}.png", pixels)
    options = ("data=folder", f"data.root={tmp_path / 'data'}", f"data.image_mode={mode}")
    train(tmp_path / "run", *options, "max_steps=1", base=SMALL)
    for split in ("val", "test"):
        model = segfit.load(tmp_path / "run", device="cpu", split=split)
        evaluate_run(model.run, model.options, lambda _: None)
        folder = tmp_path / "run/evaluation" / split / "restored"
        for number, (_, deep) in enumerate(kinds):
            header = (folder / f"{number}.png").read_bytes()[24:26]
            assert [*header] == [16 if deep else 8, colour_type]


def test_tiles_give_what_the_whole_gives(trained, photos):
    scores = []
    for tile in ("64", "1024"):
        options = (
            f"tile={tile}",
            "overlap=32",
            "save_images=false",
            f"root={photos}",
            "split=test",
        )
        run(trained, "run=run", "device=cpu", "precision=fp32", *options, script="evaluate.py")
        scores.append(values(trained / "run/evaluation/test/metrics.json")["scores"])
    assert scores[0]["psnr"] == pytest.approx(scores[1]["psnr"], abs=1e-3)
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-4)


def test_what_the_perceptual_loss_needs_is_not_needed_to_restore(tmp_path):
    weights, clean = tmp_path / "encoder.pth", write(tmp_path / "photos/a.png", picture(40, 40))
    encoder = timm.create_model("mobilenetv3_small_050")
    torch.save(encoder.state_dict(), weights)
    loss = (
        "loss.perceptual=0.1",
        f"loss.encoder={encoder.default_cfg['architecture']}",
        f"loss.weights={weights}",
    )
    run(tmp_path, *TINY, *loss, "max_steps=2", "hydra.run.dir=run")
    assert "charbonnier + 0.1 × mobilenetv3_small_050" in (tmp_path / "run/train.log").read_text()
    weights.unlink()
    assert "loss.weights=" in run(tmp_path, "run=run", "device=cpu", script="evaluate.py", code=2)
    options = ("run=run", f"images={clean.parent}", "out=restored", "device=cpu")
    run(tmp_path, *options, script="evaluate.py")
    assert (tmp_path / "restored/restored/a.png").is_file()


def test_exported_programs_restore_what_the_model_does(trained, tmp_path):
    run(trained, "run=run", f"export={tmp_path / 'model.onnx'}", "device=cpu", script="evaluate.py")
    loaded = segfit.load(trained / "run", device="cpu").run
    model = copy.deepcopy(loaded.model)
    export_run(loaded, tmp_path / "model.pt2")
    assert_programs_restore(tmp_path, model)


@pytest.mark.slow
def test_exported_programs_of_nafnet_restore_what_the_model_does(tmp_path):
    train(tmp_path / "run", "model=nafnet", "lr=0.01", "max_steps=8", base=TINY)
    for name in ("model.onnx", "model.pt2"):
        loaded = segfit.load(tmp_path / "run", device="cpu").run
        model = copy.deepcopy(loaded.model)
        export_run(loaded, tmp_path / name)
    assert_programs_restore(tmp_path, model)


def assert_programs_restore(folder: Path, model: torch.nn.Module) -> None:
    """Pictures of other numbers and sizes than the exported example, by both programs and the model."""
    program = torch.export.load(folder / "model.pt2").module()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    facts = json.loads(session.get_modelmeta().custom_metadata_map["model.json"])
    assert facts == {"image_mode": "rgb", "range": [0, 1], "degrade": "noise"}
    for shape in ((3, 3, 75, 131), (1, 3, 40, 37), (5, 3, 64, 96)):
        pictures = torch.rand(shape)
        with torch.inference_mode():
            expected = model(pictures).clamp(0, 1)
            assert not torch.allclose(expected, pictures, atol=1e-2)
            torch.testing.assert_close(program(pictures), expected, rtol=0, atol=1e-4)
        (restored,) = session.run(["restored"], {"images": pictures.numpy()})
        np.testing.assert_allclose(restored, expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------- what is refused


def test_all_that_is_wrong_with_pairs_is_said_at_once(tmp_path):
    for number in range(5):
        clean = picture(96, 96, seed=number)
        write(tmp_path / f"data/target/{number}.png", clean)
        other = {2: clean[:80], 3: np.roll(clean, (0, 5), (0, 1))}.get(number, clean)
        write(tmp_path / f"data/input/{number}.png", other)
    write(tmp_path / "data/input/alone.png", picture(64, 64))
    (tmp_path / "data/target/4.png").write_bytes(b"no picture")
    output = run(
        tmp_path, *SMALL, "data=pairs", f"data.root={tmp_path / 'data'}", "patch_size=128", code=2
    )
    assert "1 of 6 pictures have no partner" in output
    assert "alone.png" in output
    assert "1 pairs of unequal size" in output
    assert "target 96×96, input 96×80" in output
    assert "3.png ([0, 5])" in output
    assert "too small" in output
    assert "4.png: unreadable" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("patch_size=128", "degrade=mixed", "degrade.blur=[5,1]", "degrade.quality=bad"),
            (
                "data.resolution=64: smaller than patch_size=128.",
                "degrade.blur=[5, 1]: must be a number or [low, high].",
                "degrade.quality=bad: must be a number or [low, high].",
            ),
        ),
        (
            ("degrade.sigma=[5,500]", "loss=dice_ce"),
            (
                "degrade.sigma=[5, 500]: must be at most 255.",
                "loss.name=dice_ce: must be one of charbonnier, l1, mse, psnr.",
            ),
        ),
        (("hardware=9gb",), ("There are: 12gb, 24gb, 4gb, 8gb, ",)),
        (("image_size=64",), ("image_size: there is no such key.",)),
        (("loss.perceptual=0.1",), ("HF_HUB_OFFLINE is set",)),
        (
            ("loss.perceptual=0.1", "loss.weights=null"),
            ("loss.weights=null: random features compare nothing",),
        ),
        (("metrics.lpips=alex",), ("metrics.lpips=alex: needs the weights",)),
    ],
)
def test_what_is_wrong_is_said_in_its_own_words(tmp_path, options, said):
    output = run(tmp_path, *TINY, *options, code=2)
    assert all(text in output for text in said), output
    assert "Traceback" not in output


# --------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(
    ("mode", "options", "answer", "found"),
    [
        ("data", ("benchmark.samples=3",), "shows training samples", {"notices": []}),
        ("plan", (), "it fits", {"fits": True}),
        ("throughput", ("benchmark.warmup=1", "loss.perceptual=0.1", "loss.encoder=test_resnet", "loss.weights=null"), "TFLOP", {}),
        ("lr_find", ("benchmark.updates=20",), "lr", {"effective_batch": 4}),
        ("diagnose", ("benchmark.warmup=1",), "Bottleneck", {"applied": None}),
        pytest.param("max_batch", (), "batch_size=", {"accumulate": 1}, marks=pytest.mark.slow),
        pytest.param("ladder", ("benchmark.warmup=1",), "samples/s", {}, marks=pytest.mark.slow),
        pytest.param("optimize", ("benchmark.warmup=1", "benchmark.out=local.yaml"), "Written to local.yaml", {"out": "local.yaml"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_benchmarks_answer(tmp_path, mode, options, answer, found):
    arguments = (*TINY, f"benchmark={mode}", "seconds=0.2", "hydra.run.dir=found", *options)
    output = run(tmp_path, *arguments, script="benchmark.py")
    assert answer in output
    results = values(tmp_path / "found/results.json")
    assert results["benchmark"] == mode
    assert results["values"] == {**results["values"], **found}


@pytest.mark.parametrize("tier", ["24gb", "12gb", "8gb", "4gb", "cpu"])
def test_recipes_are_the_published_ones(tier):
    published = {
        "24gb": (128, 12, 256, 64, True), "12gb": (96, 8, 192, 32, True), "8gb": (64, 6, 128, 16, False),
        "4gb": (32, 4, 128, 16, False), "cpu": (32, 4, 128, 16, False),
    }  # fmt: skip
    config = compose_run(f"hardware={tier}", base=("task=restoration", "device=cpu"))
    assert config.hardware.name == tier
    effective = config.batch_size * config.accumulate
    found = (
        config.model.base_channels,
        config.model.num_blocks,
        config.patch_size,
        effective,
        config.loss.perceptual > 0,
    )
    assert found == published[tier]
