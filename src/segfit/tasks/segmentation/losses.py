"""Segmentation losses that add up: accumulated micro-batches have the loss of one big batch.

A loss is a weighted sum of terms, each a sum over the batch, divided by a total of the whole update:

    totals = sum(loss.totals(targets) for targets in micro_batches)
    for logits, targets in micro_batches:
        loss(logits, targets, totals).backward()

Targets are hard, `(B, H, W)` int64 with `IGNORE_INDEX`, or soft, `(B, C, H, W)` float that sums to 1 over classes and is
0 where ignored. Hard targets and their one-hot form give the same loss. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.schema import LossConfig

EPSILON = 1e-7  # keeps divisors and bases of powers above 0; too small to smooth anything


class SegmentationLoss(nn.Module):
    """Σ_k share_k · numerator_k / total_k over the terms of a loss, with the names and options of `LossConfig`.

    A pixel term, ce or focal, is a mean over valid pixels; each weighs Σ_c class_weight_c · target_c, as in torch's losses.
    A region term is a mean over images of the weighted mean over the classes in an image's ground truth, as MONAI's
    `DiceLoss(weight=)`; an image without a valid pixel of a class that weighs something does not count.

    `class_weights` are one a class, for all terms; None: all 1. `label_smoothing` is for pixel terms: regions of smoothed
    labels overlap perfectly with no prediction.
    """

    def __init__(
        self, options: LossConfig, num_classes: int, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        weights = class_weights or [1.0] * num_classes
        self.alike = all(weight == 1 for weight in weights)
        self.class_weights = nn.Buffer(torch.tensor(weights), persistent=False)
        self.terms = options.name.split("_")  # of a pair the region comes first
        share = options.region_weight
        shares = [share, 1 - share] if len(self.terms) == 2 else [1.0]
        self.shares = nn.Buffer(torch.tensor(shares), persistent=False)
        self.smoothing, self.gamma = options.label_smoothing, options.focal_gamma
        costs = (options.tversky_alpha, options.tversky_beta)
        self.costs = {"dice": (0.5, 0.5), "tversky": costs}  # of false positives and negatives

    @torch.no_grad()
    def totals(self, targets: Tensor, each: bool = False) -> Tensor:
        """Return the divisor of each term, `(K,)` float32, to be summed over the micro-batches of an update.

        `each`: of each image by itself, `(B, K)`.
        """
        quick = self.alike and targets.ndim == 3  # several times faster on a CPU
        weights = valid_pixels(targets) if quick else pixel_weights(targets, self.class_weights)
        pixels = weights.flatten(1)
        totals = [
            pixels.sum(1) if term in ("ce", "focal") else (pixels > 0).any(1) for term in self.terms
        ]
        found = torch.stack(totals, 1)
        return (found if each else found.sum(0)).float()

    def forward(self, logits: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss, `()` float32 (float64 for float64 logits); with totals `(B, K)` that of each image, `(B,)`.

        Computed in fp32 also under autocast: sums over pixels overflow fp16. A term whose total is 0 adds 0 and has no
        gradient. Logits are `(B, C, H, W)` of any float type, `totals` `(K,)` float32 those of the whole update.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = self.class_weights.to(logits.dtype)
        terms = [self._numerator(term, logits, targets, weights) for term in self.terms]
        sums = torch.stack(terms, 1)
        # Divided by 1 where the total is 0: where() alone would let NaN through in backward.
        means = (sums if totals.ndim == 2 else sums.sum(0)) / torch.where(totals > 0, totals, 1)
        return (self.shares * torch.where(totals > 0, means, 0)).sum(-1)

    def _numerator(self, term: str, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return a term's sum over each image, `(B,)`, of logits of float32 or float64 and class weights `(C,)`."""
        if term == "ce":
            return cross_entropy(logits, targets, weights, self.smoothing)
        if term == "focal":
            return focal(logits, targets, weights, self.gamma, self.smoothing)
        truth = per_class(targets, logits.shape[1]).flatten(2)
        valid = valid_pixels(targets).flatten(1).unsqueeze(1)
        present = truth.any(2) if truth.dtype == torch.bool else truth.amax(2) > 0
        weights = present * weights
        probabilities = logits.softmax(1).flatten(2)
        if term == "lovasz":
            losses = lovasz_losses(probabilities, truth, valid)
        else:
            losses = tversky_losses(probabilities, truth, valid, *self.costs[term])
        whole = weights.sum(1)
        return (losses * weights).sum(1) / whole.masked_fill(whole == 0, 1)


def valid_pixels(targets: Tensor) -> Tensor:
    """Return `(B, H, W)` bool: the pixels that count."""
    return targets.sum(1) > 0 if targets.ndim == 4 else targets != IGNORE_INDEX


def pixel_weights(targets: Tensor, class_weights: Tensor) -> Tensor:
    """Return `(B, H, W)` float; 0 where ignored."""
    if targets.ndim == 4:
        return (targets.float() * class_weights.view(1, -1, 1, 1)).sum(1)
    ignored = targets == IGNORE_INDEX
    return class_weights[targets.masked_fill(ignored, 0)].masked_fill(ignored, 0)


def per_class(targets: Tensor, num_classes: int) -> Tensor:
    """Return `(B, C, H, W)`: soft targets as they are, hard ones as a one-hot of bool, a quarter of float's memory."""
    if targets.ndim == 4:
        return targets
    classes = torch.arange(num_classes, device=targets.device)
    return targets.unsqueeze(1) == classes.view(1, -1, 1, 1)


def smooth(targets: Tensor, share: float) -> Tensor:
    """Return `(B, C, H, W)` with this share of each pixel's target spread over all classes; ignored pixels stay 0."""
    return targets * (1 - share) + targets.sum(1, keepdim=True) * (share / targets.shape[1])


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Return the sum over each image, `(B,)`, of cross-entropy with class weights and label smoothing, as torch's."""
    if targets.ndim == 3:
        # Not reduction="sum", which is not deterministic on CUDA.
        entropy = F.cross_entropy(
            logits,
            targets,
            weights,
            ignore_index=IGNORE_INDEX,
            label_smoothing=smoothing,
            reduction="none",
        )
        return entropy.flatten(1).sum(1)
    # torch's own smoothing would let ignored pixels (all 0) count.
    smoothed = smooth(targets, smoothing)
    return -(smoothed * logits.log_softmax(1) * weights.view(1, -1, 1, 1)).flatten(1).sum(1)


def focal(
    logits: Tensor, targets: Tensor, weights: Tensor, gamma: float, smoothing: float
) -> Tensor:
    """Return the sum over each image, `(B,)`, of -w (1 - p)^gamma log p (Lin et al., arXiv 1708.02002); gamma = 0: cross-entropy.

    A soft target takes the mean of its classes' losses, weighted by the target; smoothed labels are soft ones, as in
    Keras's `CategoricalFocalCrossentropy`.
    """
    if smoothing or targets.ndim == 4:
        shares = smooth(per_class(targets, logits.shape[1]), smoothing)
        entropy = -logits.log_softmax(1)
        weights = shares * weights.view(1, -1, 1, 1)
    else:
        entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
        weights = pixel_weights(targets, weights)
    # Clamped, because the slope of x^gamma at 0 is infinite for gamma < 1.
    misses = (-torch.expm1(-entropy)).clamp_min(EPSILON)
    return (weights * misses**gamma * entropy).flatten(1).sum(1)


# The loss of each class of an image, `(B, C)`, finite for absent classes too, of probabilities `(B, C, N)` float over the N
# pixels of an image, the truth `(B, C, N)` bool or float in [0, 1], 0 at ignored pixels, and which are valid, `(B, 1, N)` bool.


def tversky_losses(
    probabilities: Tensor, truth: Tensor, valid: Tensor, alpha: float, beta: float
) -> Tensor:
    """Return 1 - TP / (TP + alpha·FP + beta·FN) with soft counts, in [0, 1] (Salehi et al., arXiv 1706.05721).

    alpha = beta = 0.5 is the Dice loss, 1 - 2·Σpt / (Σp + Σt). Not smoothed: a class that counts has a pixel, and a
    perfect prediction costs exactly 0.
    """
    hits = (probabilities * truth).sum(2)
    false_positives = (probabilities * valid).sum(2) - hits
    misses = truth.sum(2) - hits
    return 1 - hits / (hits + alpha * false_positives + beta * misses).clamp_min(EPSILON)


def lovasz_losses(probabilities: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """Return Lovász-Softmax in [0, 1], the convex extension of the Jaccard loss (Berman et al., arXiv 1705.08790).

    Weighted, it is that of the weighted mean of the classes' Jaccard losses: the extension is linear in the set function.

    For soft targets, the counts along the sorted errors are sums of shares; these are not deterministic on CUDA.
    """
    # An ignored pixel has error 0: it comes last and adds nothing.
    errors = (truth.to(probabilities.dtype) - probabilities).abs() * valid
    errors, order = errors.sort(dim=2, descending=True)
    truth = truth.gather(2, order)
    hits = truth.cumsum(2)  # int64 for bool: exact, and deterministic on CUDA
    intersection = hits[..., -1:] - hits
    union = intersection + torch.arange(1, truth.shape[2] + 1, device=truth.device)
    share = truth.to(torch.get_default_dtype() if truth.dtype == torch.bool else truth.dtype)
    # By how much each pixel raises 1 - intersection / union when it joins those before it, in closed form: a numerical
    # difference would leave two digits of fp32 in a large image.
    divisor = union * (union - 1 + share).clamp_min(EPSILON)
    return (errors * ((share * union + intersection * (1 - share)) / divisor)).sum(2)


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
