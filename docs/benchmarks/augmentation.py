"""Time a batch through our augmentation and through the same operations chained from kornia's classes.

    python docs/benchmarks/augmentation.py [--device cuda] [--batch 32] [--side 256]

Prints milliseconds an image: median and best of some rounds, all contestants taking turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import kornia
import kornia.augmentation as K
import torch
from torch import Tensor, nn

from segfit.augmentation.cpu import CpuAugment
from segfit.augmentation.kornia_gpu import KorniaGpu
from segfit.config import AugmentationConfig

ROUNDS = 12


def options() -> dict[str, object]:
    """Return the config's defaults as keyword arguments of the pipelines."""
    config = AugmentationConfig(name="kornia_gpu")
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
        "segfit kornia_gpu": lambda: ours(images, masks, seed=next(seeds)),
        "kornia nn.Sequential": naive(images, masks),
        "kornia AugmentationSequential": sequential(images, masks),
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
    for name, values in times.items():
        warm = values[2:]
        print(f"{name:30s} median {statistics.median(warm):6.2f}   best {min(warm):6.2f} ms/image")


if __name__ == "__main__":
    main()
