"""Which results are off: as plain sentences."""

import math
from collections.abc import Iterator
from typing import Any

# The largest relative error of fp32 without TF32 against fp64 that is rounding, by what it is an error of.
_EXACT = {
    "logits": 1e-3, "gradient": 2e-2, "loss": 1e-4, "elsewhere": 1e-3, "miscounted": 0.0
}  # fmt: skip
_ROUNDING = {"bf16": 0.05, "fp16": 0.01}
_FORECAST = 0.1  # of what is allocated
_LEARNED = 0.3  # mIoU: something was learned


def off(stage: str, found: Any) -> list[str]:
    """Return what is off about the result of a stage; what has no right value is never off."""
    judge = globals().get(f"_{stage}")
    return list(judge(found)) if judge else []


def _cards(found: Any) -> Iterator[str]:
    for name in ("torch", "nvml"):
        for number, one in enumerate(found["driver"]):
            other = found[name][number] if number < len(found[name]) else ["none", 0.0]
            if one[0] != other[0] or abs(one[1] - other[1]) > 0.05 * one[1]:
                yield f"card {number} is {one} by the driver, {other} by {name}"
    if len(found["torch"]) > len(found["driver"]):
        yield f"torch has {len(found['torch'])} cards, the driver {len(found['driver'])}"


def _waits(found: Any) -> Iterator[str]:
    if not all(map(math.isfinite, found.values())):
        yield f"not finite: {found}"


def _exact(found: Any) -> Iterator[str]:
    for of, errors in found.items():
        for name, error in errors.items():
            if not error <= _EXACT[name]:
                yield f"{of}: {name} off by {error:.1e}, more than {_EXACT[name]:.0e}"


def _augmentation(found: Any) -> Iterator[str]:
    if not (found["images"] <= 0.01 and found["masks"] <= 1e-3):
        yield f"images differ by {found['images']:.1e}, {found['masks']:.2%} of the masks' pixels"


def _rounding(found: Any) -> Iterator[str]:
    for precision, errors in found.items():
        if not max(errors.values()) <= _ROUNDING[precision]:
            yield f"{precision} is off by more than {_ROUNDING[precision]}: {errors}"
        if not errors["fast"] <= 1.5 * errors.get("stock", math.inf):
            yield f"{precision} rounds worse than the stock model: {errors}"


def _repeated(found: Any) -> Iterator[str]:
    for how, same in found.items():
        if not same:
            yield f"trained {how}, the weights have other bits"


def _compiled(found: Any) -> Iterator[str]:
    if found["notice"]:
        yield found["notice"]
    elif not found["logits"] <= 1e-3:
        yield f"compiled logits differ by {found['logits']:.1e}"


def _learns(found: Any) -> Iterator[str]:
    if found["updates"] >= 200 and not found["best"]["miou"] >= _LEARNED:
        yield f"in {found['precision']}, {found['updates']} updates reach an mIoU of {found['best']['miou']:.2f}"


def _predicted(found: Any) -> Iterator[str]:
    for batch, one in found.items():
        if one["allocated"] is None:
            yield f"batch {batch} does not fit; predicted were {one['predicted']:.2f} GiB"
        elif not abs(one["predicted"] / one["allocated"] - 1) <= _FORECAST:
            yield f"batch {batch}: {one['predicted']:.2f} GiB predicted, {one['allocated']:.2f} allocated"


def _recipe(found: Any) -> Iterator[str]:
    yield from (line for line in found["notices"] if "out of memory" in line)


def _runs_out(found: Any) -> Iterator[str]:
    said = " ".join([found["ended"], *found["notices"]])
    if "out of memory" not in said or ("Error" in found["ended"]) != found["refused"]:
        yield f"ended by {found['ended']!r}, having said {found['notices']}"


def _largest(found: Any) -> Iterator[str]:
    largest, planned, cap = found["max_batch"], found["planned"], found["samples"]
    if not abs(largest - min(planned, cap)) <= _FORECAST * min(planned, cap):
        yield f"{largest} is the largest batch, {planned} was planned"
    verdicts = {batch: verdict for batch, verdict, _ in found["tried"]}
    if largest < cap and verdicts.get(largest + 1, "fits") == "fits":
        yield f"{largest} is the largest batch, but {largest + 1} was not seen to fail"


def _step(found: Any) -> Iterator[str]:
    yield from (f"batch {batch}: {one['why']}" for batch, one in found.items() if "why" in one)


def _busy(found: Any) -> Iterator[str]:
    if found["read_by"] == "psutil":  # no card
        return
    if not found["names"]:
        yield f"diagnose names {found['change']}, not precision or model.fast"
    if found["utilisation"] is not None and found["utilisation"] < 80:
        yield f"the card is busy for {found['utilisation']:.0f} % of the time: not bound by it"


def _processes(found: Any) -> Iterator[str]:
    if not found["difference"] <= 1e-4:
        yield f"{found['joined']}: weights differ by {found['difference']:.1e} from those of one process"
