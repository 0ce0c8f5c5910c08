"""Losses by torch's own, by hand and by what they promise."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.losses import balanced_weights
from tests.unit.tasks.segmentation.losses import (
    CLASSES,
    NAMES,
    WEIGHTS,
    batch,
    make,
    one_hot,
    soft,
    value,
)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(weights: tuple[float, ...] | None, smoothing: float) -> None:
    logits, targets = batch()
    torch_weights = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(
        logits, targets, torch_weights, ignore_index=IGNORE_INDEX, label_smoothing=smoothing
    )
    loss = make("ce", class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(value(loss, logits, targets), expected)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_the_images_of_a_batch_are_their_own(name: str, kind: str) -> None:
    logits, hard = batch()
    targets = hard if kind == "hard" else soft(hard)
    loss = make(name, class_weights=WEIGHTS, label_smoothing=0.1, tversky_alpha=0.2)
    totals = loss.totals(targets, each=True)
    torch.testing.assert_close(totals.sum(0), loss.totals(targets))
    alone = [value(loss, logits[one : one + 1], targets[one : one + 1]) for one in range(6)]
    torch.testing.assert_close(loss(logits, targets, totals), torch.stack(alone))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_big_batch(name: str, kind: str) -> None:
    logits, hard = batch()
    targets = hard if kind == "hard" else soft(hard)
    loss = make(name, class_weights=WEIGHTS, label_smoothing=0.1, tversky_alpha=0.2)

    whole = logits.clone().requires_grad_()
    expected = value(loss, whole, targets)
    expected.backward()

    parts = logits.clone().requires_grad_()
    splits = (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 6))  # the third has nothing valid
    totals = torch.stack([loss.totals(targets[split]) for split in splits]).sum(0)
    accumulated = torch.zeros(())
    for split in splits:
        part = loss(parts[split], targets[split], totals)
        part.backward()
        accumulated += part.detach()

    torch.testing.assert_close(accumulated, expected.detach())
    torch.testing.assert_close(parts.grad, whole.grad)
    assert whole.grad is not None
    assert whole.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_targets_equal_hard_ones(name: str) -> None:
    logits, targets = batch()
    loss = make(name, class_weights=WEIGHTS, label_smoothing=0.1)
    gradients = []
    for kind in (targets, one_hot(targets)):
        leaf = logits.clone().requires_grad_()
        result = value(loss, leaf, kind)
        result.backward()
        gradients.append((result.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(loss.totals(targets), loss.totals(one_hot(targets)))


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_get_no_gradient(name: str) -> None:
    logits, targets = batch()
    for kind in (targets, soft(targets)):
        leaf = logits.clone().requires_grad_()
        value(make(name, label_smoothing=0.1), leaf, kind).backward()
        assert leaf.grad is not None
        ignored = (targets == IGNORE_INDEX).unsqueeze(1).expand_as(leaf.grad)
        assert not leaf.grad[ignored].any()


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz"])
def test_perfect_prediction_costs_nothing(name: str) -> None:
    _, targets = batch()
    assert value(make(name), 60 * one_hot(targets), targets) < 1e-6
    worst = one_hot(targets).roll(1, dims=1)
    assert value(make(name), 60 * worst, targets) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_nothing_valid_is_zero_loss_and_zero_gradient(name: str) -> None:
    targets = torch.full((2, 5, 5), IGNORE_INDEX)
    for kind in (targets, one_hot(targets)):
        logits = torch.randn(2, CLASSES, 5, 5).requires_grad_()
        result = value(make(name, label_smoothing=0.1), logits, kind)
        result.backward()
        assert result.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", [*NAMES, "focal_half"])
def test_gradients_are_those_of_the_function(name: str, kind: str) -> None:
    logits, hard = batch(images=3, side=2)
    targets = hard if kind == "hard" else soft(hard).double()
    gamma = 0.5 if name == "focal_half" else 2.0
    loss = make(
        name.split("_half")[0], class_weights=WEIGHTS, label_smoothing=0.1, focal_gamma=gamma
    ).double()
    totals = loss.totals(targets)
    assert torch.autograd.gradcheck(
        lambda leaf: loss(leaf, targets, totals), logits.double().requires_grad_()
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_without_focusing_is_cross_entropy(smoothing: float) -> None:
    logits, targets = batch()
    options = {"class_weights": WEIGHTS, "label_smoothing": smoothing}
    for kind in (targets, soft(targets)):
        focal = value(make("focal", focal_gamma=0.0, **options), logits, kind)
        torch.testing.assert_close(focal, value(make("ce", **options), logits, kind))


def test_focal_of_smoothed_labels_by_hand() -> None:
    logits, targets = batch()
    log_p = logits.double().log_softmax(1).permute(0, 2, 3, 1)[targets != IGNORE_INDEX].numpy()
    truth = np.eye(CLASSES)[targets[targets != IGNORE_INDEX].numpy()] * 0.9 + 0.1 / CLASSES
    expected = -(truth * (1 - np.exp(log_p)) ** 2 * log_p).sum(1).mean()
    found = value(make("focal", label_smoothing=0.1), logits, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz"])
def test_weights_of_regions_make_a_weighted_mean_over_the_classes_of_an_image(name: str) -> None:
    logits, targets = batch()
    weights = (0.0, 1.0, 2.0, 1.5)
    images = []
    for image, mask in zip(logits, targets, strict=True):
        present = [c for c in range(CLASSES) if (mask == c).any() and weights[c]]
        single = {  # the loss of one class alone: all others weigh nothing
            c: value(make(name, class_weights=np.eye(CLASSES)[c].tolist()), image[None], mask[None])
            for c in present
        }
        if present:
            total = sum(weights[c] * single[c] for c in present)
            images.append(total / sum(weights[c] for c in present))
    found = value(make(name, class_weights=weights), logits, targets)
    torch.testing.assert_close(found, torch.stack(images).mean())
    assert len(images) == len(logits) - 1  # one is wholly ignored


def test_focal_discounts_what_is_already_right() -> None:
    _, targets = batch()
    sure = 4 * one_hot(targets)
    ratio = value(make("focal"), sure, targets) / value(make("ce"), sure, targets)
    miss = 1 - sure.softmax(1).max()
    torch.testing.assert_close(ratio, miss**2)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (0.3, 0.7)])
def test_tversky_by_hand(alpha: float, beta: float) -> None:
    logits, targets = batch()
    probabilities = logits.softmax(1).numpy()
    images = []
    for p, t in zip(probabilities, targets.numpy(), strict=True):
        valid = t != IGNORE_INDEX
        classes = []
        for c in np.unique(t[valid]):
            tp = p[c][t == c].sum()
            fp, fn = p[c][valid & (t != c)].sum(), (1 - p[c][t == c]).sum()
            classes.append(1 - tp / (tp + alpha * fp + beta * fn))
        if classes:
            images.append(np.mean(classes))
    result = value(make("tversky", tversky_alpha=alpha, tversky_beta=beta), logits, targets)
    assert result.item() == pytest.approx(np.mean(images), abs=1e-6)
    if alpha == beta:
        torch.testing.assert_close(value(make("dice"), logits, targets), result)


def test_lovasz_by_brute_force() -> None:
    """The Lovász extension by its definition: Jaccard losses of the growing set of worst pixels."""
    logits, targets = batch(images=3, side=4)
    images = []
    for p, t in zip(logits.softmax(1).double().numpy(), targets.numpy(), strict=True):
        valid = t != IGNORE_INDEX
        p, t = p[:, valid], t[valid]
        classes = []
        for c in np.unique(t):
            truth = t == c
            errors = np.where(truth, 1 - p[c], p[c])
            worst_first = np.argsort(-errors)
            extension = previous = 0.0
            for k in range(len(t)):
                wrong = np.isin(np.arange(len(t)), worst_first[: k + 1])
                predicted = truth ^ wrong
                jaccard = 1 - (truth & predicted).sum() / (truth | predicted).sum()
                extension += errors[worst_first[k]] * (jaccard - previous)
                previous = jaccard
            classes.append(extension)
        if classes:
            images.append(np.mean(classes))
    assert value(make("lovasz"), logits, targets).item() == pytest.approx(np.mean(images), abs=1e-6)


def test_lovasz_of_soft_targets_is_zero_only_at_the_target() -> None:
    _, hard = batch()
    targets = soft(hard)
    right = targets.clamp_min(1e-12).log()
    assert value(make("lovasz"), right, targets) < 1e-5
    assert value(make("lovasz"), right + torch.randn_like(right), targets) > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str) -> None:
    """The meta device has no data, so that whatever reads a value or a count from it fails."""
    logits, hard = batch()
    loss = make(name, class_weights=WEIGHTS, label_smoothing=0.1).to("meta")
    for targets in (hard, soft(hard)):
        leaf = logits.to("meta").requires_grad_()
        value(loss, leaf, targets.to("meta")).backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == logits.shape


def test_combined_losses_mix_their_terms() -> None:
    logits, targets = batch()
    mixed = value(make("dice_ce", region_weight=0.2), logits, targets)
    dice, ce = (value(make(name), logits, targets) for name in ("dice", "ce"))
    torch.testing.assert_close(mixed, 0.2 * dice + 0.8 * ce)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_rare_classes_weigh_more_and_the_mean_pixel_weighs_one(power: float) -> None:
    pixels = torch.tensor([900, 0, 90, 10])
    weights = torch.tensor(balanced_weights(pixels, power))
    assert weights[3] > weights[2] > weights[0]
    assert weights[1] == 1
    assert weights[3] / weights[0] == pytest.approx(90**power, rel=1e-6)
    assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1, rel=1e-6)


def test_balanced_weights_without_pixels_or_power_are_one() -> None:
    assert balanced_weights(torch.zeros(3, dtype=torch.int64)) == [1, 1, 1]
    assert balanced_weights(torch.tensor([5, 0, 3]), 0.0) == [1, 1, 1]
