"""Which sample goes to train, val and test: by name and seed, never by the order of the file system."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from segfit.errors import SegFitError

FOLDS = 5


@dataclass(frozen=True)
class SplitRule:
    """How samples without folders of their own are divided.

    Args:
        val: share (0-1) of the groups held out for validation; at least one group where > 0.
        test: share held out for testing; at least one group where > 0.
        seed: another seed, another split.
        group: regular expression searched in a sample's relative name (no suffix, / between folders);
            samples whose first group (or match, if it has no group) agrees stay together. None: every
            sample is its own group.
        fold: 0-based number of the fold that is held out for validation, of `folds`; None: `val` says how many.
    """

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    group: str | None = None
    fold: int | None = None
    folds: int | None = None


def split_names(names: Sequence[str], rule: SplitRule) -> dict[str, list[str]]:
    """Return split → sorted names; every name in one split, every group in one split.

    Groups are ordered by a hash of seed and group: the order of the names does not matter, and a few added samples leave
    nearly all others where they were.

    Raises:
        SegFitError: if the expression is invalid or misses a name, or there are too few groups.
    """
    groups: dict[str, list[str]] = {}
    for name, group in zip(names, _groups(names, rule.group), strict=True):
        groups.setdefault(group, []).append(name)
    shares = {part: share for part in ("val", "test") if (share := getattr(rule, part)) > 0}
    counts = {part: max(1, round(share * len(groups))) for part, share in shares.items()}
    if sum(counts.values()) >= len(groups):
        what = "samples" if rule.group is None else f"groups (data.split.group={rule.group})"
        given = ", ".join(f"data.split.{part}={share:g}" for part, share in shares.items())
        raise SegFitError(
            f"{len(groups)} {what} cannot be split into train and {' and '.join(shares)} ({given}): "
            f"at least {len(shares) + 1} are needed. Add some, or take smaller shares."
        )
    order = sorted(
        groups, key=lambda group: hashlib.sha256(f"{rule.seed}:{group}".encode()).digest()
    )
    divided = {}
    for part, count in counts.items():
        divided[part], order = order[:count], order[count:]
    if rule.fold is not None:  # each group but those of test is held out in one fold
        if "val" not in divided:
            raise SegFitError(
                f"data.split.fold={rule.fold}: a val folder says already what is held out. Leave one of the two away."
            )
        order = divided["val"] + order
        start, stop = (
            len(order) * number // (rule.folds or FOLDS) for number in (rule.fold, rule.fold + 1)
        )
        divided["val"], order = order[start:stop], order[:start] + order[stop:]
        if start == stop:
            raise SegFitError(
                f"data.split.folds: more than the {len(order)} samples or groups there are. Lower it."
            )
    return {
        part: sorted(name for group in members for name in groups[group])
        for part, members in {"train": order, **divided}.items()
    }


def _groups(names: Sequence[str], expression: str | None) -> list[str]:
    if expression is None:
        return list(names)
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise SegFitError(
            f"data.split.group={expression} is not a regular expression: {error}."
        ) from error
    matches = {name: pattern.search(name) for name in names}
    missed = [name for name, match in matches.items() if match is None]
    if missed:
        raise SegFitError(
            f"data.split.group={expression} matches nothing in {len(missed)} of {len(names)} names, "
            f"e.g. {', '.join(missed[:3])}. Every sample needs a group."
        )
    return [(m[1] or "") if pattern.groups else m[0] for m in matches.values() if m is not None]
