"""Which sample goes to train, val and test: by name and seed, never by the order of the file system."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from segfit.data.source import some
from segfit.errors import SegFitError, raise_all

FOLDS = 5


SPLITS = ("train", "val", "test")
_CALLED = (
    "train(ing)?",
    "val(id(at(e|ion))?)?|holdout|dev(el(opment)?)?|eval(uation)?",
    "test(ing)?",
)


def split_of(name: str) -> str | None:
    """Return the split that a folder or a list is called after, as "train2017", "Validation" and "test_set" are, or None."""
    for split, called in zip(SPLITS, _CALLED, strict=True):
        if re.fullmatch(rf"({called})[-_ ]?(set|data|images?)?[-_ ]?\d*", name, re.IGNORECASE):
            return split
    return None


def find_splits(
    root: Path, sides: Sequence[str]
) -> tuple[dict[str, list[Path]], list[str], list[str]]:
    """Return split → a folder for each of `sides`, such as images and targets, "" where all is in one; problems; notices.

    Folders that are called after splits lie above the sides or below them, or after both, as images_val and masks_val are.
    """
    lead = root / sides[0]
    above = _folders(root)
    found: dict[str, dict[Path, list[Path]]] = {}
    for folder in above:
        if (part := split_of(folder.name)) and (folder / sides[0]).is_dir():
            found.setdefault(part, {})[folder / sides[0]] = [folder / side for side in sides]
    for folder in _folders(lead):
        if part := split_of(folder.name):
            places = found.setdefault(part, {})
            if folder not in places or not places[folder][-1].exists():
                places[folder] = [_like(folder.name, part, root / side) for side in sides]
    named = {} if found or lead == root else _named(root, sides)
    found |= named
    problems = [
        f"{some(list(places))} are all called after {part}, and are not thrown together. Keep one, or rename the others."
        for part, places in found.items()
        if len(places) > 1
    ]
    if found and "train" not in found:
        problems.append(f"{root}: there is {' and '.join(found)}, but no train folder.")
    layout = {part: next(iter(places.values())) for part, places in found.items()}
    own, notices = {Path(side).parts[0] for side in sides if Path(side).parts}, []
    for folder in above if lead != root and not named else ():
        part = split_of(folder.name)
        if folder.name in own or part in layout:
            continue
        if part is None and found and (folder / sides[0]).is_dir():
            notices.append(f"{folder}: called after no split, so it is not used.")
        elif part == "test" or (part and split_of(sides[0].split("/")[0])):
            notices.append(f"{folder}: no folder '{sides[0]}' in it, so it is not used.")
        elif part:
            problems.append(
                f"{folder}: no folder '{sides[0]}' in it. A split holds {' and '.join(sides)}, or say what they are called."
            )
    if found and lead.is_dir() and not named:
        kept = own | {folders[0].name for folders in layout.values()}
        beside = sorted({one.name for one in lead.iterdir() if one.name[0] != "."} - kept)
        if beside:
            notices.append(f"{lead}: {some(beside)} lie beside the splits and are not used.")
    return layout or {"": [root / side for side in sides]}, problems, notices


def _named(root: Path, sides: Sequence[str]) -> dict[str, dict[Path, list[Path]]]:
    """Return split → its first folder → one for each side, where their names are a side's and a split's in one.

    A first folder without a split in its name holds what is for training, if other sides have splits in theirs.
    """
    # Of each side: split, or "" → folder → the word that says it
    every: list[dict[str, dict[Path, str]]] = []
    for side in sides:
        every.append({})
        for folder in _folders(root):
            rest, word = _apart(folder.name)
            if rest == _apart(side)[0]:
                every[-1].setdefault(split_of(word) or "", {})[folder] = word
    lead, *others = every
    shared = not all({*one} - {""} for one in others)  # by all, which alike names may confuse
    if not lead.keys() - {"", "train"} or (shared and ("" in lead or not _apart(sides[0])[0])):
        return {}
    found: dict[str, dict[Path, list[Path]]] = {}
    for part, folders in lead.items():
        for folder, word in folders.items():
            places = found.setdefault(part or "train", {}).setdefault(folder, [folder])
            for side, own in zip(sides[1:], others, strict=True):
                if not own.keys() - {""}:
                    places.append(_like(word, part, root / side))
                else:
                    other = root / "_".join((*_apart(side)[0], word)).strip("_")
                    places.append(next(iter(own.get(part, [other]))))
    return found


def _apart(name: str) -> tuple[list[str], str]:
    """Return the words of a name in lower case but the one that is called after a split, and that one, "" without any."""
    words = re.split("[-_. ]", name.lower())
    own = next(filter(split_of, words), "")
    return [word for word in words if word != own], own


def _folders(parent: Path) -> list[Path]:
    """Return the folders in a folder, sorted; without a look at each of 100,000s of files."""
    if not parent.is_dir():
        return []
    with os.scandir(parent) as entries:
        # The folder says which entries are files; a link may lead in circles, which only Path takes for none.
        places = [Path(one.path) for one in entries if one.is_symlink() or one.is_dir()]
    return sorted(place for place in places if place.is_dir())


def _like(name: str, part: str, side: Path) -> Path:
    """Return the folder of a split below a side: of that name, or called after the split; all of the side if it has none."""
    named = {split_of(folder.name): folder for folder in _folders(side)}
    if not named.keys() - {None}:
        return side
    return side / name if (side / name).is_dir() else named.get(part, side / name)


def listed(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Return split → those of `names` that the lists in a folder hold: train.txt, val.txt and perhaps test.txt, a name a line.

    A line may have folders before the name, or fewer of them, a suffix, and further columns. Lists of other names, such as
    trainval.txt, are not read. Raises a SegFitError if a list is missing or cannot be read, a name is none of `names`, or may
    be several of them, or stands in two lists.
    """
    known: dict[str, list[str]] = {}  # what is meant by the end of a name, from a / on
    for name in names:
        for end in {*_ends(f"{name}.")}:
            known.setdefault(end, []).append(name)
    known |= {name: [name] for name in names}
    found: dict[str, list[str]] = {}
    problems = []
    for file in sorted(folder.glob("*.txt")):
        if (part := split_of(file.stem)) is None:
            continue
        unknown, unclear = [], []
        lines = map(str.strip, file.read_text("utf-8-sig", "replace").splitlines())
        for line in filter(None, lines):
            # Of the first column, or of the line if its name has spaces; only then of further columns.
            first, whole = (
                _ends(unicodedata.normalize("NFC", one)) for one in (line.split()[0], line)
            )
            spaced = [end for end in whole if " " in end]
            ends = sorted(first + spaced, key=len, reverse=True) + whole
            meant = next((known[end] for end in ends if end in known), [])
            if len(meant) == 1:
                found.setdefault(part, []).append(meant[0])
            elif meant:
                unclear.append(f"{line} ({some(meant)})")
            else:
                unknown.append(line)
        if unknown:
            problems.append(f"{file}: {len(unknown)} names are no image: {some(unknown)}.")
        if unclear:
            problems.append(
                f"{file}: {len(unclear)} names are those of several images: {some(unclear)}. Write their folders, too."
            )
    if missing := [part for part in ("train", "val") if not found.get(part)]:
        problems.append(f"{folder}: no image for {' and '.join(missing)} (data.split.lists).")
    count = Counter(name for members in found.values() for name in set(members))
    if twice := [name for name, times in count.items() if times > 1]:
        problems.append(f"{folder}: {len(twice)} names are in two splits' lists: {some(twice)}.")
    raise_all(problems)
    return {part: sorted(set(members)) for part, members in found.items()}


def _ends(name: str) -> list[str]:
    """Return "a/b.c", "b.c", "a/b" and "b" of "a/b.c"."""
    texts = [name.split("/"), name.rpartition(".")[0].split("/")]
    return ["/".join(text[start:]) for text in texts for start in range(len(text))]


def split_names(
    names: Sequence[str], rule: Any, there: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return split → sorted names; every name in one split, every group in one split; none for splits that are `there`.

    `rule` has the options of `SplitConfig`; of `val` and `test`, shares of the groups, at least one group where above 0.
    Groups are ordered by a hash of seed and group: the order of the names does not matter, and a few added samples leave nearly
    all others where they were. Raises a SegFitError if the expression misses a name, or there are too few groups.
    """
    groups: dict[str, list[str]] = {}
    for name, group in zip(names, groups_of(names, rule.group), strict=True):
        groups.setdefault(group, []).append(name)
    wanted = [part for part in ("val", "test") if part not in there]
    shares = {part: share for part in wanted if (share := getattr(rule, part)) > 0}
    counts = {part: max(1, round(share * len(groups))) for part, share in shares.items()}
    if sum(counts.values()) >= len(groups):
        what = "samples" if rule.group is None else f"groups (data.split.group={rule.group})"
        given = ", ".join(f"data.split.{part}={share:g}" for part, share in shares.items())
        raise SegFitError(
            f"{len(groups)} {what} cannot be split into train and {' and '.join(shares)} ({given}): "
            f"at least {len(shares) + 1} are needed. Add some, or take smaller shares."
        )
    order = sorted(groups, key=lambda one: hashlib.sha256(f"{rule.seed}:{one}".encode()).digest())
    divided = {}
    for part, count in counts.items():
        divided[part], order = order[:count], order[count:]
    if rule.fold is not None:  # each group but those of test is held out in one fold
        if "val" not in divided:
            raise SegFitError(
                f"data.split.fold={rule.fold}: a val folder says already what is held out. Leave one of the two away."
            )
        order = divided["val"] + order
        start, stop = (len(order) * (rule.fold + one) // (rule.folds or FOLDS) for one in (0, 1))
        divided["val"], order = order[start:stop], order[:start] + order[stop:]
        if start == stop:
            raise SegFitError(
                f"data.split.folds: more than the {len(order)} samples or groups there are. Lower it."
            )
    return {
        part: sorted(name for group in members for name in groups[group])
        for part, members in {"train": order, **divided}.items()
    }


def groups_of(names: Sequence[str], expression: str | None) -> list[str]:
    """Return the group of each name: the first group of a regex that is searched in it, or all that matches; itself without one.

    Raises a SegFitError if nothing matches in a name.
    """
    if expression is None:
        return list(names)
    pattern = re.compile(expression)
    matches = {name: pattern.search(name) for name in names}
    missed = [name for name, match in matches.items() if match is None]
    if missed:
        raise SegFitError(
            f"data.split.group={expression} matches nothing in {len(missed)} of {len(names)} names, "
            f"e.g. {', '.join(missed[:3])}. Every sample needs a group."
        )
    return [(m[1] or "") if pattern.groups else m[0] for m in matches.values() if m is not None]
