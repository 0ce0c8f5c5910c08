"""Everything that can be chosen trains."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from segfit.system.hardware import cpu_has_bf16
from tests.integration.training import ROOT, TINY, Trained, train

TWO_STEPS = ["max_steps=2", "data.train_size=8", "data.val_size=2", "batch_size=2"]


# The options of cnn are no options of the others.
BASE = tuple(text for text in TINY if not text.startswith("model."))


def options(model: str) -> list[str]:
    small = {
        "cnn": ["model.base_channels=8"],
        "timm_unet": ["model.encoder=resnet18", "model.decoder_channels=32", "model.weights=null"],
        "vit": ["model.encoder=test_vit2", "model.decoder_channels=32", "model.weights=null"],
    }
    return [f"model={model}", *small.get(model, ["model.weights=null"])]


def assert_trained(trained: Trained, updates: int) -> None:
    assert trained.heard.steps == list(range(1, updates + 1))
    assert all(math.isfinite(loss) for loss in trained.losses)
    assert trained.heard.epochs[-1].result is not None
    assert all(log.grad_norm > 0 for log in trained.heard.logs)
    assert (trained.run / "checkpoints" / "last.pt").exists()


# Every model with every augmentation, and both with every precision that CPUs have. On a CPU fp16 falls back to one of the
# others, whatever is trained.
COMBINATIONS = [
    *[
        (model, augmentation, ("fp32", "bf16")[(row + column) % 2])
        for row, model in enumerate(["cnn", "segformer_b0", "timm_unet"])
        for column, augmentation in enumerate(["none", "cpu", "kornia-gpu"])
    ],
    ("cnn", "none", "fp16"),
    ("vit", "kornia-gpu", "bf16"),
]


@pytest.mark.parametrize(("model", "augmentation", "precision"), COMBINATIONS)
def test_models_augmentations_and_precisions_train(tmp_path, model, augmentation, precision):
    trained = train(
        tmp_path,
        *options(model),
        f"augmentation={augmentation}",
        f"precision={precision}",
        *TWO_STEPS,
        base=BASE,
    )
    assert_trained(trained, 2)
    native = ["bf16", "fp32"] if cpu_has_bf16() else ["fp32"]
    runs = trained.training.fit.state.precision.name
    assert runs == (precision if precision in native else native[0])
    notices = [notice for notice in trained.notices if notice.startswith(f"precision={precision}")]
    assert len(notices) == (0 if precision in native else 1)


@pytest.mark.parametrize(
    ("loss", "mix"),
    [
        *[("ce", "mixup"), ("dice", "cutmix"), ("dice_ce", "mixup"), ("focal", "cutmix")],
        *[("lovasz", "mixup"), ("lovasz_ce", "cutmix"), ("tversky", "mixup")],
    ],
)
def test_losses_train_with_hard_and_mixed_targets(tmp_path, loss, mix):
    trained = train(
        tmp_path,
        f"loss={loss}",
        "loss.class_weights=balanced",
        f"augmentation.{mix}=1.0",
        *TWO_STEPS,
    )
    assert_trained(trained, 2)
    assert len(trained.training.statistics["class_weights"]) == 4


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        ("adamw", "none"),
        ("lamb", "cosine"),
        ("nadamw", "poly"),
        ("sgd", "step"),
        ("muon", "cosine"),
    ],
)
def test_optimizers_and_schedulers_train(tmp_path, optimizer, scheduler):
    trained = train(tmp_path, f"optimizer={optimizer}", f"scheduler={scheduler}", *TWO_STEPS)
    assert_trained(trained, 2)


TIERS = {"cpu": "b0", "4gb": "b0", "8gb": "b2", "12gb": "b4", "24gb": "b5"}


@pytest.mark.parametrize(
    "tier", [pytest.param(tier, marks=pytest.mark.slow if tier == "24gb" else ()) for tier in TIERS]
)
def test_every_recipe_trains_its_model(tmp_path, tier):
    recipe = OmegaConf.load(ROOT / "conf" / "hardware" / f"{tier}.yaml")
    heavy = ["batch_size=2"] if recipe.batch_size > 4 else []
    images = min(recipe.batch_size, 4) * recipe.get("accumulate", 1)
    small = [
        *("model.weights=null", "image_size=64", "loader.workers=0", "device=cpu"),
        *("data=shapes", f"data.train_size={images}", "data.val_size=1", "data.test_size=1"),
        *("data.resolution=64", "max_steps=1", "report.log_every=1"),
    ]
    trained = train(tmp_path, f"hardware={tier}", *small, *heavy, base=())
    assert_trained(trained, 1)
    facts = trained.training.facts
    assert facts["recipe"] == tier
    assert facts["model"].startswith(f"segformer {TIERS[tier]}")
    if not heavy:
        assert facts["batch"].split(" ")[0] == str(recipe.batch_size)
    no_card = any("no CUDA card here" in notice for notice in trained.notices)
    assert no_card == (tier != "cpu")


@pytest.mark.parametrize("variant", ["b1", pytest.param("b3", marks=pytest.mark.slow)])
def test_the_models_between_the_recipes_train(tmp_path, variant):
    trained = train(
        tmp_path, *options(f"segformer_{variant}"), *TWO_STEPS, "max_steps=1", base=BASE
    )
    assert_trained(trained, 1)


def test_images_larger_than_the_window_train_by_crops_and_are_scored_whole(tmp_path):
    trained = train(tmp_path, "data.fit=crop", "data.resolution=96", *TWO_STEPS)
    assert_trained(trained, 2)
    draw = next(iter(trained.heard.epochs[-1].result.panels.values()))
    panel = draw.args[0][0]
    assert panel.prediction.shape == panel.mask.shape == (96, 96)


def test_a_data_set_smaller_than_a_batch_trains(tmp_path):
    trained = train(tmp_path, "data.train_size=3", "batch_size=8", "epochs=2")
    assert_trained(trained, 2)


def test_limits_and_accumulation_count_as_set(tmp_path):
    trained = train(tmp_path, "limit_train_batches=5", "limit_val_batches=1", "accumulate=2")
    assert trained.heard.steps == [1, 2, 3, 4, 5, 6]
    assert trained.heard.infos[0].updates_per_epoch == 3
    assert int(trained.heard.epochs[-1].result.values["confusion"].sum()) == 4 * 64 * 64


def test_training_learns(tmp_path):
    trained = train(
        tmp_path, "augmentation=none", "epochs=10", "lr=3e-3", "precision=fp32", "model.dropout=0"
    )
    first, last = trained.heard.epochs[0], trained.heard.epochs[-1]
    assert last.loss < 0.8 * first.loss
    assert last.result.scores["miou"] > 1.2 * first.result.scores["miou"]


def test_a_batch_of_one_equals_accumulated_ones_in_the_whole_stack(tmp_path, monkeypatch):
    """8 × 1 and 2 × 4 make the same weights where no norm ties the images of a batch together."""
    from segfit.models import cnn

    made = cnn.CNN

    def without_norm(*args, **kwargs):
        return made(*args, **{**kwargs, "norm": "none"})

    monkeypatch.setattr(cnn, "CNN", without_norm)
    results = []
    for batch, accumulate in ((8, 1), (2, 4)):
        trained = train(
            tmp_path / str(batch),
            f"batch_size={batch}",
            f"accumulate={accumulate}",
            "augmentation=cpu",
            "model.dropout=0",
            "optimizer=sgd",
            "lr=0.05",
            "precision=fp32",
        )
        results.append((trained.losses, trained.model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], atol=1e-5), name
