"""Files that a stranger may have written, read as plain values: bounded, and nothing resolved or executed."""

import json
import stat
from pathlib import Path
from typing import Any

import yaml

from segfit.errors import SegFitError

_MOST_BYTES = 1 << 20
_DEEPEST = 32


class _PlainLoader(yaml.SafeLoader):
    """Reads values only: an alias is refused too, since a few of them can unfold to billions of nodes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias; a run holds plain values")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: mappings, lists, strings and numbers, no interpolation among them.

    Raises:
        FileNotFoundError: if there is none.
        SegFitError: if it holds anything else, is too large, or is no file of its own.
    """
    text = _text(path)
    try:
        values = yaml.load(text, Loader=_PlainLoader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:  # a tag with a value of another kind, such as !!bool x, ends in many ways
        raise SegFitError(f"{path}: not readable ({error}).") from error
    _refuse_interpolation(values, path)
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises:
        FileNotFoundError: if there is none.
        SegFitError: if it holds anything else, is too large, or is no file of its own.
    """
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise SegFitError(f"{path}: not readable ({error}).") from error
    if not isinstance(values, dict):
        raise SegFitError(f"{path}: not readable (it holds no mapping).")
    return values


def refuse_links(folder: Path, names: list[str]) -> None:
    """Refuse links by which what is written into a stranger's folder would land elsewhere.

    Raises:
        SegFitError: naming every one of `names`, or of what lies directly in it, that is a link.
    """
    found = []
    for name in names:
        path = folder / name
        inside = sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
        found += [entry for entry in (path, *inside) if entry.is_symlink()]
    if found:
        raise SegFitError(
            [
                f"{entry}: refused, it is a link; what is written would land elsewhere."
                for entry in found
            ]
        )


def _text(path: Path) -> str:
    try:
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            raise SegFitError(f"{path}: refused, it is a link.")
        if not stat.S_ISREG(about.st_mode):
            raise SegFitError(f"{path}: not readable (it is no file).")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SegFitError(f"{path}: refused, it is larger than {_MOST_BYTES >> 20} MiB.")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise SegFitError(f"{path}: not readable ({error}).") from error


def _refuse_interpolation(value: Any, path: Path) -> None:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set)):  # !!omap makes tuples
        for item in value:
            _refuse_interpolation(item, path)
    elif isinstance(value, str) and "${" in value:
        raise SegFitError(
            f"{path}: refused, {value!r} is an interpolation; a run holds plain values."
        )
