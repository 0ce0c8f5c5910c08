"""Segmentation losses that add up: accumulated micro-batches have the loss of one big batch.

A loss is a weighted sum of terms, each a sum over the batch, divided by a total of the whole update:

    totals = sum(loss.totals(targets) for targets in micro_batches)
    for logits, targets in micro_batches:
        loss(logits, targets, totals).backward()

Targets are hard, `(B, H, W)` int64 with `IGNORE_INDEX`, or soft, `(B, C, H, W)` float that sums to 1 over classes and is
0 where ignored. Hard targets and their one-hot form give the same loss. Nothing here waits for the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segfit.tasks.segmentation.classes import IGNORE_INDEX

EPSILON = 1e-7  # keeps divisors and bases of powers above 0; too small to smooth anything


def is_soft(targets: Tensor) -> bool:
    """Return whether targets are soft."""
    return targets.ndim == 4


def valid_pixels(targets: Tensor) -> Tensor:
    """Return `(B, H, W)` bool: the pixels that count."""
    return targets.sum(1) > 0 if is_soft(targets) else targets != IGNORE_INDEX


def per_class(targets: Tensor, num_classes: int) -> Tensor:
    """Return `(B, C, H, W)`: soft targets as they are, hard ones as a one-hot of bool, a quarter of float's memory."""
    if is_soft(targets):
        return targets
    classes = torch.arange(num_classes, device=targets.device)
    return targets.unsqueeze(1) == classes.view(1, -1, 1, 1)


def smooth(targets: Tensor, share: float) -> Tensor:
    """Return `(B, C, H, W)` with this share of each pixel's target spread over all classes; ignored pixels stay 0."""
    return targets * (1 - share) + targets.sum(1, keepdim=True) * (share / targets.shape[1])


class Term(nn.Module, ABC):
    """One summand of a loss: a numerator and its divisor."""

    def __init__(self, class_weights: Sequence[float]) -> None:
        super().__init__()
        self.alike = all(weight == 1 for weight in class_weights)
        self.class_weights = nn.Buffer(torch.tensor(class_weights), persistent=False)

    def pixel_weights(self, targets: Tensor) -> Tensor:
        """Return `(B, H, W)` float32; 0 where ignored."""
        if is_soft(targets):
            return (targets.float() * self.class_weights.view(1, -1, 1, 1)).sum(1)
        ignored = targets == IGNORE_INDEX
        return self.class_weights[targets.masked_fill(ignored, 0)].masked_fill(ignored, 0)

    @abstractmethod
    def total(self, targets: Tensor) -> Tensor:
        """Return the divisor of these targets, `()` float32, ≥ 0; totals of micro-batches add up."""

    @abstractmethod
    def numerator(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over this batch, `()`, from logits `(B, C, H, W)` float32 or float64."""


class PixelTerm(Term):
    """A mean over valid pixels; each weighs Σ_c class_weight_c · target_c, as in torch's losses."""

    def total(self, targets: Tensor) -> Tensor:
        """Return the sum of the pixels' weights, `()`."""
        if self.alike and not is_soft(targets):
            return valid_pixels(targets).sum().float()  # several times faster on a CPU
        return self.pixel_weights(targets).sum()


class CrossEntropy(PixelTerm):
    """Cross-entropy with class weights and label smoothing, as torch's."""

    def __init__(self, class_weights: Sequence[float], label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights)
        self.label_smoothing = label_smoothing

    def numerator(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum over valid pixels."""
        weights = self.class_weights.to(logits.dtype)
        if not is_soft(targets):
            # Not reduction="sum", which is not deterministic on CUDA.
            return F.cross_entropy(
                logits,
                targets,
                weights,
                ignore_index=IGNORE_INDEX,
                label_smoothing=self.label_smoothing,
                reduction="none",
            ).sum()
        # torch's own smoothing would let ignored pixels (all 0) count.
        smoothed = smooth(targets, self.label_smoothing)
        return -(smoothed * logits.log_softmax(1) * weights.view(1, -1, 1, 1)).sum()


class Focal(PixelTerm):
    """Focal loss, -w (1 - p)^gamma log p (Lin et al., arXiv 1708.02002); gamma = 0: cross-entropy.

    A soft target takes the mean of its classes' losses, weighted by the target; smoothed labels are soft ones, as in
    Keras's `CategoricalFocalCrossentropy`.
    """

    def __init__(self, weights: Sequence[float], gamma: float, smoothing: float = 0.0) -> None:
        super().__init__(weights)
        self.gamma, self.label_smoothing = gamma, smoothing

    def numerator(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum over valid pixels."""
        if self.label_smoothing or is_soft(targets):
            targets = smooth(per_class(targets, logits.shape[1]), self.label_smoothing)
            entropy = -logits.log_softmax(1)
            weights = targets * self.class_weights.view(1, -1, 1, 1)
        else:
            entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
            weights = self.pixel_weights(targets)
        # Clamped, because the slope of x^gamma at 0 is infinite for gamma < 1.
        misses = (-torch.expm1(-entropy)).clamp_min(EPSILON)
        return (weights * misses**self.gamma * entropy).sum()


class RegionTerm(Term):
    """A mean over images of the weighted mean over the classes in an image's ground truth, as MONAI's `DiceLoss(weight=)`.

    An image without a valid pixel of a class that weighs something does not count.
    """

    def total(self, targets: Tensor) -> Tensor:
        """Return the number of images that count."""
        # The first is several times faster.
        counted = valid_pixels(targets) if self.alike else self.pixel_weights(targets) > 0
        return counted.flatten(1).any(1).sum().float()

    def numerator(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over images."""
        truth = per_class(targets, logits.shape[1]).flatten(2)
        valid = valid_pixels(targets).flatten(1).unsqueeze(1)
        present = truth.any(2) if truth.dtype == torch.bool else truth.amax(2) > 0
        weights = present * self.class_weights.to(logits.dtype)
        losses = self.region_losses(logits.softmax(1).flatten(2), truth, valid)
        whole = weights.sum(1)
        return ((losses * weights).sum(1) / whole.masked_fill(whole == 0, 1)).sum()

    @abstractmethod
    def region_losses(self, probabilities: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each class of an image, `(B, C)`, finite for absent classes too.

        `probabilities` are `(B, C, N)` float over the N pixels of an image, `truth` `(B, C, N)` bool or float in [0, 1],
        0 at ignored pixels, `valid` `(B, 1, N)` bool.
        """


class Tversky(RegionTerm):
    """1 - TP / (TP + alpha·FP + beta·FN) with soft counts (Salehi et al., arXiv 1706.05721).

    alpha = beta = 0.5 is the Dice loss, 1 - 2·Σpt / (Σp + Σt). Not smoothed: a class that counts has a pixel, and a
    perfect prediction costs exactly 0.
    """

    def __init__(self, weights: Sequence[float], alpha: float = 0.5, beta: float = 0.5) -> None:
        super().__init__(weights)
        self.alpha, self.beta = alpha, beta

    def region_losses(self, probabilities: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Return `(B, C)` in [0, 1]."""
        hits = (probabilities * truth).sum(2)
        false_positives = (probabilities * valid).sum(2) - hits
        misses = truth.sum(2) - hits
        divisor = hits + self.alpha * false_positives + self.beta * misses
        return 1 - hits / divisor.clamp_min(EPSILON)


class Lovasz(RegionTerm):
    """Lovász-Softmax, the convex extension of the Jaccard loss (Berman et al., arXiv 1705.08790).

    Weighted, it is that of the weighted mean of the classes' Jaccard losses: the extension is linear in the set function.

    For soft targets, the counts along the sorted errors are sums of shares; these are not deterministic on CUDA.
    """

    def region_losses(self, probabilities: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
        """Return `(B, C)` in [0, 1]."""
        # An ignored pixel has error 0: it comes last and adds nothing.
        errors = (truth.to(probabilities.dtype) - probabilities).abs() * valid
        errors, order = errors.sort(dim=2, descending=True)
        return (errors * jaccard_slopes(truth.gather(2, order))).sum(2)


def jaccard_slopes(truth: Tensor) -> Tensor:
    """Return by how much each pixel raises the Jaccard loss when it joins the errors before it.

    `truth` is `(B, C, N)` bool or float in [0, 1], sorted by descending error. The result, `(B, C, N)` float ≥ 0, sums to
    1 over N where the class is present.
    """
    hits = truth.cumsum(2)  # int64 for bool: exact, and deterministic on CUDA
    pixels = torch.arange(1, truth.shape[2] + 1, device=truth.device)
    intersection = hits[..., -1:] - hits
    union = intersection + pixels
    share = truth.to(torch.get_default_dtype() if truth.dtype == torch.bool else truth.dtype)
    # The difference of 1 - intersection / union from one pixel to the next in closed form: a numerical one would leave
    # two digits of fp32 in a large image.
    numerator = share * union + intersection * (1 - share)
    return numerator / (union * (union - 1 + share).clamp_min(EPSILON))


class SegmentationLoss(nn.Module):
    """Σ_k weight_k · numerator_k / total_k over K terms, given by name."""

    def __init__(self, terms: Mapping[str, Term], weights: Sequence[float]) -> None:
        super().__init__()
        self._terms = tuple(terms.values())
        self.terms = nn.ModuleDict(terms)  # so that .to(device) reaches them
        self.weights = nn.Buffer(torch.tensor(weights), persistent=False)

    @torch.no_grad()
    def totals(self, targets: Tensor) -> Tensor:
        """Return the divisor of each term, `(K,)` float32, to be summed over the micro-batches of an update."""
        return torch.stack([term.total(targets) for term in self._terms])

    def forward(self, logits: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss, `()` float32 (float64 for float64 logits).

        Computed in fp32 also under autocast: sums over pixels overflow fp16. A term whose total is 0 adds 0 and has no
        gradient. Logits are `(B, C, H, W)` of any float type, `totals` `(K,)` float32 those of the whole update.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        numerators = torch.stack([term.numerator(logits, targets) for term in self._terms])
        # Divided by 1 where the total is 0: where() alone would let NaN through in backward.
        means = numerators / torch.where(totals > 0, totals, torch.ones_like(totals))
        return (self.weights * torch.where(totals > 0, means, torch.zeros_like(means))).sum()


def segmentation_loss(
    name: str,
    *,
    num_classes: int,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    region_weight: float = 0.5,
    focal_gamma: float = 2.0,
    tversky_alpha: float = 0.3,
    tversky_beta: float = 0.7,
) -> SegmentationLoss:
    """Return a loss by name, with the options of `LossConfig`.

    `class_weights` are one a class, for all terms; None: all 1. `label_smoothing` is for cross-entropy and focal: regions of
    smoothed labels overlap perfectly with no prediction.
    """
    weights = class_weights or [1.0] * num_classes
    terms: dict[str, Term] = {
        "ce": CrossEntropy(weights, label_smoothing),
        "dice": Tversky(weights),
        "focal": Focal(weights, focal_gamma, label_smoothing),
        "tversky": Tversky(weights, tversky_alpha, tversky_beta),
        "lovasz": Lovasz(weights),
    }
    if name in terms:
        return SegmentationLoss({name: terms[name]}, [1.0])
    region = name.removesuffix("_ce")
    chosen = {region: terms[region], "ce": terms["ce"]}
    return SegmentationLoss(chosen, [region_weight, 1 - region_weight])


def balanced_weights(class_pixels: Tensor, power: float = 0.5) -> list[float]:
    """Return class weights that favour rare classes: a power of the inverse pixel share, and 1 for an absent class.

    Scaled so that the mean weight of a pixel is 1: the learning rate keeps its meaning. `class_pixels` are `(C,)` int64.
    With power=0 all weigh the same; 0.5 is the inverse square root; with 1 each class weighs the same in sum.
    """
    pixels = class_pixels.double()
    share = pixels / pixels.sum().clamp_min(1)
    present = pixels > 0
    raw = torch.where(present, share, 1.0) ** -power  # any finite number where absent
    weights: list[float] = torch.where(present, raw / (raw * share).sum(), 1.0).tolist()
    return weights
