"""What the experiments of restoration train, and that a recipe beside them leaves their network as it is."""

import pytest

from tests.unit.composing import composed


@pytest.mark.parametrize("beside", [[], ["hardware=8gb"]])
@pytest.mark.parametrize(
    ("name", "mode", "cache", "patches", "folders"),
    [
        ("denoise", "gray", "ram", 1, ("train400", "val", "set12")),
        ("denoise_color", "rgb", "none", 4, ("train", "val", "test")),
    ],
)
def test_they_train_one_network_for_noise(name, mode, cache, patches, folders, beside):
    run = composed(f"experiment={name}", "data.root=x", *beside)
    data = run.data
    assert (run.task.name, data.name, data.root) == ("restoration", "folder", "x")
    assert (data.image_mode, data.cache, data.patches) == (mode, cache, patches)
    assert (data.train, data.val, data.test) == folders
    assert (run.model.name, run.model.base_channels, run.model.num_blocks) == ("cnn", 48, 4)
    assert (run.degrade.name, run.degrade.sigma, run.loss.name) == ("noise", 25.0, "psnr")
    assert (run.optimizer.name, run.optimizer.betas) == ("muon", [0.9, 0.99])
    assert (run.patch_size, run.scheduler.name, run.ema_decay) == (64, "cosine", 0.999)
    assert run.epochs % run.val_every == 0  # the last weights are scored
    assert run.hardware.name == ("8gb" if beside else "cpu")


def test_the_colours_take_the_network_of_a_card_by_what_their_comment_says():
    larger = ("model.base_channels=64", "model.num_blocks=6", "patch_size=128")
    run = composed("experiment=denoise_color", "data.root=x", *larger)
    recipe = composed("task=restoration", "hardware=8gb")
    assert (run.model, run.patch_size) == (recipe.model, recipe.patch_size)
