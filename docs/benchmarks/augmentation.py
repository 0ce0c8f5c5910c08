"""Time a batch through our augmentation and through the same operations chained from others' classes.

    python docs/benchmarks/augmentation.py [--device cuda] [--batch 32] [--side 256] [--threads 2]

Prints milliseconds an image: median and quartiles of some rounds, all contestants taking turns, and how many times
as long as `segfit kornia-gpu` each one took, round by round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import kornia
import kornia.augmentation as K
import torch
import torchvision
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from segfit.tasks.segmentation.augmentation import CpuAugment
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu
from segfit.tasks.segmentation.schema import AugmentationConfig

ROUNDS, WARM = 22, 2
BILINEAR = v2.InterpolationMode.BILINEAR
# What lies outside of the frame: grey in images, ignored in masks.
FILL = {tv_tensors.Image: 0.5, tv_tensors.Mask: 255}


def options() -> dict[str, object]:
    """Return the config's defaults as keyword arguments of the pipelines."""
    config = AugmentationConfig(name="kornia-gpu")
    own = KorniaGpu.__dataclass_fields__.keys() & vars(config).keys()
    return {name: getattr(config, name) for name in own}


def naive(images: Tensor, masks: Tensor) -> Callable[[], object]:
    """One kornia transform an operation, the mask as a fourth channel of those that move pixels."""
    moves = nn.Sequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomRotation(20.0, p=0.7),
        K.RandomAffine(0.0, scale=(0.8, 1.2), p=0.7),
    )
    colors = nn.Sequential(
        K.ColorJitter(0.3, 0.2, 0.2, 0.1, p=0.5),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.1),
        K.RandomGaussianNoise(std=0.05, p=0.1),
    )

    def run() -> object:
        moved = moves(torch.cat([images, masks[:, None].float()], 1))
        return colors(moved[:, :3]), moved[:, 3].round().long()

    return run


def sequential(images: Tensor, masks: Tensor) -> Callable[[], object]:
    """`AugmentationSequential` with masks of their own, rotation and scale in one transform."""
    chain = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(20.0, scale=(0.8, 1.2), p=0.7),
        K.ColorJitter(0.3, 0.2, 0.2, 0.1, p=0.5),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.1),
        K.RandomGaussianNoise(std=0.05, p=0.1),
        data_keys=["input", "mask"],
    )
    labels = masks[:, None].float()
    return lambda: chain(images, labels)


def torchvision_v2(images: Tensor, masks: Tensor) -> Callable[[], object]:
    """torchvision's transforms image by image, as it draws once a call; rotation and scale in one."""
    chain = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply(
                [v2.RandomAffine(20.0, scale=(0.8, 1.2), interpolation=BILINEAR, fill=FILL)], 0.7
            ),
            v2.RandomApply([v2.ColorJitter(0.3, 0.2, 0.2, 0.1)], 0.5),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.1),
            v2.RandomApply([v2.GaussianNoise(sigma=0.05)], 0.1),
        ]
    )
    pairs = [
        (tv_tensors.Image(image), tv_tensors.Mask(mask))
        for image, mask in zip(images, masks, strict=True)
    ]

    def run() -> object:
        drawn = [chain(image, mask) for image, mask in pairs]
        return torch.stack([image for image, _ in drawn]), torch.stack([mask for _, mask in drawn])

    return run


def spread(values: list[float]) -> str:
    """Return median and quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:6.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.rand(args.batch, 3, args.side, args.side, device=args.device)
    masks = torch.randint(0, 19, images[:, 0].shape, device=args.device)
    bytes_, small = (255 * images).byte().cpu(), masks.byte().cpu()
    ours, worker = KorniaGpu(**options()), CpuAugment(**options())  # type: ignore[arg-type]
    seeds = iter(range(10**9))
    contestants: dict[str, Callable[[], object]] = {
        "segfit kornia-gpu": lambda: ours(images, masks, seed=next(seeds)),
        "kornia nn.Sequential": naive(images, masks),
        "kornia AugmentationSequential": sequential(images, masks),
        "torchvision v2, float": torchvision_v2(images, masks),
        "segfit cpu (one worker)": lambda: [
            worker(image, mask, seed=next(seeds)) for image, mask in zip(bytes_, small, strict=True)
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / args.batch * 1e3)
    print(f"torch {torch.__version__}, kornia {kornia.__version__}, {args}")
    print(f"torchvision {torchvision.__version__}; ms/image, and times as long (quartiles)")
    counted = {name: values[WARM:] for name, values in times.items()}
    ours_took = counted["segfit kornia-gpu"]
    for name, values in counted.items():
        ratios = [value / own for value, own in zip(values, ours_took, strict=True)]
        print(f"{name:30s} {spread(values):22s} {spread(ratios)}")


if __name__ == "__main__":
    main()
