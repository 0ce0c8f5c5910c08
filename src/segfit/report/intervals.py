"""How sure scores are: bootstrap intervals, and two models on the same samples; docs/metrics.md is the contract.

What is resampled are units: samples, or groups of samples that are not independent. Each has counts, and the sum of counts
(N, …) over units decides the scores: `scores` maps sums (R, …) to values (R,) by name, NaN where nothing decides them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.engine.findings import Cell, Column, Findings, Table

Counts = NDArray[np.float64]
Scores = Callable[[Counts], Mapping[str, Counts]]
Interval = tuple[float, float]


def intervals(counts: Counts, scores: Scores, resamples: int, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % percentile intervals of the scores (Efron and Tibshirani, 1993); NaN with fewer than two units."""
    drawn = scores(_resampled(counts, resamples, seed))
    return {name: _interval(values) for name, values in drawn.items()}


def compare(
    first: Counts, second: Counts, scores: Scores, resamples: int, seed: int = 0
) -> dict[str, tuple[float, Interval, float]]:
    """Return by how much the scores of `first` exceed those of `second`, the interval of that, and its two-sided p.

    The units are the same, and are resampled together. p is of the permutation test that swaps the two models in a random
    half of the units.
    """
    both, random = np.stack([first, second], 1), np.random.default_rng(seed)
    sums, change = both.sum(0), second - first
    swaps = [_sum(random.integers(2, size=len(change)), change) for _ in range(resamples)]
    moved = np.stack(swaps)

    def differences(sums: Counts) -> dict[str, Counts]:
        ours, theirs = scores(sums[:, 0]), scores(sums[:, 1])
        return {name: ours[name] - theirs[name] for name in ours}

    drawn = differences(_resampled(both, resamples, seed))
    swapped = differences(np.stack([sums[0] + moved, sums[1] - moved], 1))
    found = {}
    for name, (value,) in differences(sums[None]).items():
        # Swaps that change nothing give the same but for rounding.
        as_large = np.abs(swapped[name]) >= abs(value) * (1 - 1e-9) - 1e-12
        p = (as_large.sum() + 1) / (resamples + 1) if np.isfinite(value) else np.nan
        found[name] = float(value), _interval(drawn[name]), float(p)
    return found


def with_intervals(
    result: Findings, counts: Sequence[Counts], scores: Scores, resamples: int, what: str
) -> Findings:
    """Return findings with scores, their intervals, and of two models their differences; units are called `what`."""
    found = {key: float(value) for key, (value,) in scores(counts[0].sum(0)[None]).items()}
    result = replace(result, scores={**found, **result.scores})
    if not resamples:
        return result
    names = ["score", "value", "low", "high"]
    known, rows = intervals(counts[0], scores, resamples), dict[str, list[Cell]]()
    for key, interval in known.items():
        rows[key] = [key, result.scores[key], *interval]
    title = f"95 % intervals by {resamples} resamples of {len(counts[0])} {what}"
    values = {"intervals": known, "units": len(counts[0])}
    if len(counts) > 1:
        title += "; the difference from the other run, and its p"
        names += ["other", "difference", "from", "to", "p"]
        compared = compare(counts[0], counts[1], scores, resamples)
        theirs = scores(counts[1].sum(0)[None])
        for key, row in rows.items():
            difference, interval, p = compared[key]
            row += [float(theirs[key][0]), difference, *interval, p]
        values["compared"] = {
            key: dict(zip(names[4:], row[4:], strict=True)) for key, row in rows.items()
        }
    columns = [Column(name, ".4f") for name in names]
    table = Table("intervals", title, columns, [*rows.values()])
    return replace(result, tables=[*result.tables, table], values={**result.values, **values})


def summed(counts: Mapping[int, NDArray[Any]], groups: Sequence[str]) -> Counts:
    """Return the counts (N, …) of groups, from those of samples and each sample's group, by index."""
    names, where = np.unique([groups[index] for index in sorted(counts)], return_inverse=True)
    each = np.stack([counts[index] for index in sorted(counts)])
    total = np.zeros((len(names), *each.shape[1:]))
    np.add.at(total, where, each)
    return total


def _resampled(counts: Counts, resamples: int, seed: int) -> Counts:
    """Return sums (R, …) of units drawn with replacement, one draw after the other: all at once would not fit."""
    random, count = np.random.default_rng(seed), len(counts)
    if count < 2:
        return np.full((1, *counts.shape[1:]), np.nan)
    draws = (random.integers(count, size=count) for _ in range(resamples))
    return np.stack([_sum(np.bincount(draw, minlength=count), counts) for draw in draws])


def _sum(weights: NDArray[np.int64], counts: Counts) -> Counts:
    return np.asarray(np.tensordot(weights.astype(np.float64), counts, 1))


def _interval(values: Counts) -> Interval:
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)).tolist() if len(known) else (np.nan, np.nan)
    return low, high
