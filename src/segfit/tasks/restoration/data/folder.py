"""Pictures, or pairs of pictures, in folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.data.files import files_by_name, list_files, some
from segfit.data.images import IMAGE_SUFFIXES
from segfit.data.splits import SplitRule, split_names
from segfit.errors import SegFitError
from segfit.tasks.restoration.data.reading import Pixels, read_picture

SPLITS = ("train", "val", "test")


@dataclass
class PictureSource:
    """A `Source` of picture files: clean ones, or clean ones with degraded partners.

    Args:
        image_mode: "rgb" or "gray".
        names: relative names without suffix, in the order of the indices.
        targets: the clean file of each name.
        inputs: the degraded file of each name; None: they are made.
        problems: what listing the files found.
        smallest: pixels that a side has to have, for the pre-flight.
    """

    image_mode: str
    names: Sequence[str]
    targets: Mapping[str, Path]
    inputs: Mapping[str, Path] | None = None
    problems: Sequence[str] = ()
    smallest: int = 0
    options: str = field(init=False)

    def __post_init__(self) -> None:
        self.options = repr(("restoration", self.image_mode, self.smallest))  # of a report

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        """Return the picture's name relative to its folder, without suffix, with / between folders."""
        return self.names[index]

    def files(self, index: int) -> list[Path]:
        """Return the clean file, then its degraded partner if there is one."""
        name = self.names[index]
        return [self.targets[name], *([self.inputs[name]] if self.inputs is not None else [])]

    def read(self, index: int) -> tuple[Pixels, ...]:
        """Return the clean picture (H, W, C) uint8 or uint16, then the degraded one if there is one.

        Raises:
            SegFitError: if a file cannot be read, or a pair has two sizes.
        """
        files = self.files(index)
        pictures = tuple(read_picture(file, self.image_mode) for file in files)
        if pictures[0].shape != pictures[-1].shape:
            raise SegFitError(f"{files[1]}: {sizes(pictures)}.")
        return pictures

    def inspect(self, index: int) -> str:
        """Return a report on a picture or pair as JSON; see `preflight.look_at`."""
        from segfit.tasks.restoration.data.preflight import look_at

        return look_at(self, index)


def sizes(pictures: Sequence[Pixels]) -> str:
    """Return "target 640×480, input 320×240"."""
    words = zip(("target", "input"), pictures, strict=False)
    return ", ".join(f"{name} {one.shape[1]}×{one.shape[0]}" for name, one in words)


def folder_sources(data: DictConfig, smallest: Mapping[str, int]) -> dict[str, PictureSource]:
    """Return the splits of a data set in folders: `root/<split>` where there is one, else `root`, divided by `data.split`.

    As is the train folder where there is no val folder. A pair has one relative name but for the suffix.

    Args:
        data: a FolderConfig or PairsConfig.
        smallest: split → pixels that a side has to have.

    Raises:
        SegFitError: with every problem that keeps the folders from being a data set. The pre-flight finds what is
            wrong with single files.
    """
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise SegFitError(
            f"data.root={data.root}: there is no such folder (looked in {Path.cwd()})."
        )
    folders = {part: root / data[part] for part in SPLITS if (root / data[part]).is_dir()}
    listings = {part: _list(folder, data) for part, folder in (folders or {"": root}).items()}
    problems = [problem for found in listings.values() for problem in found.fatal]
    if problems:
        raise SegFitError(problems)
    found: dict[str, PictureSource] = {}
    for part, (names, listing) in _divide(listings, SplitRule(**plain(data.split))).items():
        found[part] = PictureSource(
            data.image_mode, names, listing.targets, listing.inputs, listing.problems,
            smallest[part],
        )  # fmt: skip
    return found


@dataclass
class _Listing:
    targets: dict[str, Path]
    inputs: dict[str, Path] | None = None
    problems: list[str] = field(default_factory=list)  # files without a partner, and the like
    fatal: list[str] = field(default_factory=list)  # there is nothing to train on


def _list(folder: Path, data: DictConfig) -> _Listing:
    if data.name == "folder":
        targets, problems = _pictures(folder)
        return _Listing(targets, None, problems, [] if targets else [_nothing(folder)])
    sides = {key: folder / data[key] for key in ("target", "input")}
    missing = [
        f"{side}: no such folder (data.{key}). {folder} holds "
        f"{some(sorted(path.name for path in folder.iterdir())) or 'nothing'}."
        for key, side in sides.items()
        if not side.is_dir()
    ]
    if missing:
        return _Listing({}, fatal=missing)
    (targets, problems), (inputs, more) = (_pictures(side) for side in sides.values())
    problems += more
    paired = sorted(targets.keys() & inputs.keys())
    fatal = [
        _nothing(side)
        for side, files in zip(sides.values(), (targets, inputs), strict=True)
        if not files
    ]
    if not paired and not fatal:
        fatal = [
            f"{sides['input']}: no picture of it has a partner of the same name in {sides['target']}."
        ]
    for own, other, files, others in (
        (sides["target"], sides["input"], targets, inputs),
        (sides["input"], sides["target"], inputs, targets),
    ):
        alone = [
            files[name].relative_to(own).as_posix() for name in sorted(files.keys() - others.keys())
        ]
        if alone:
            problems.append(
                f"{own}: {len(alone)} of {len(files)} pictures have no partner in {other}: {some(alone)}. "
                "Partners have one name but for the suffix."
            )
    return _Listing(
        {name: targets[name] for name in paired},
        {name: inputs[name] for name in paired},
        problems,
        fatal,
    )


def _pictures(folder: Path) -> tuple[dict[str, Path], list[str]]:
    return files_by_name(list_files(folder, IMAGE_SUFFIXES), folder)


def _nothing(folder: Path) -> str:
    kinds = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    other = sorted({path.suffix for path in list_files(folder, ())})
    return f"{folder}: no picture in it ({kinds})" + (
        f"; it holds files of type {some(other)}." if other else "."
    )


def _divide(
    listings: Mapping[str, _Listing], rule: SplitRule
) -> dict[str, tuple[list[str], _Listing]]:
    """Return split → names and where they are listed: train gives what has no folder of its own."""
    parts = {part: (sorted(found.targets), found) for part, found in listings.items() if part}
    whole = listings.get("", listings.get("train"))
    if whole is None or "val" in parts:
        return parts
    test = 0.0 if "test" in parts else rule.test
    divided = split_names(sorted(whole.targets), SplitRule(rule.val, test, rule.seed, rule.group))
    return {
        **{part: (names, whole) for part, names in divided.items()},
        **{k: v for k, v in parts.items() if k == "test"},
    }
