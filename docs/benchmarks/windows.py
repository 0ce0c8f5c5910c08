"""Time a large image in windows, a batch of them at a time against one at a time, by turns in one process.

    python docs/benchmarks/windows.py [--device cuda] [--side 1024] [--threads 2]

Prints for each model and size of window the milliseconds an image one by one and batched, and the ratio: median and
quartiles over the rounds.
"""

import argparse
import statistics
import time

import torch

from segfit.models.build import for_inference, make_model
from segfit.tasks.segmentation.inference import Predictor

ROUNDS = 9
MODELS = {
    "cnn": {"name": "cnn", "base_channels": 16},
    "segformer_b0": {"name": "segformer", "variant": "b0"},
}


def seconds(predictor: Predictor, model: torch.nn.Module, image: torch.Tensor) -> float:
    """Return how long all windows of an image `(3, H, W)` take."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    for strip in predictor.windows(model, image, device, torch.device("cpu")):
        strip.argmax(0)
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each model and size of window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    image = torch.rand(3, options.side, options.side)
    print("model, window, at once: one by one ms, batched ms, times faster (quartiles)")
    for name, settings in MODELS.items():
        model = for_inference(make_model("abcd", settings, pretrained=False)[0].eval()).to(
            options.device
        )
        for window, at_once in ((64, 16), (128, 16), (256, 8)):
            one, many = (Predictor((window, window), 0.5, at_once=count) for count in (1, at_once))
            with torch.inference_mode():
                seconds(many, model, image)
                pairs = [
                    (seconds(one, model, image), seconds(many, model, image)) for _ in range(ROUNDS)
                ]
            low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
            first, second = (
                1000 * statistics.median(column) for column in zip(*pairs, strict=True)
            )
            print(
                f"{name}, {window}, {at_once}: {first:.0f}, {second:.0f}, {middle:.2f} ({low:.2f}-{high:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
