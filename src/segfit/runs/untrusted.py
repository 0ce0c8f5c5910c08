"""Untrusted files, read as plain values: nothing in them is resolved or executed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from segfit.errors import SegFitError


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: mappings, lists, strings and numbers.

    Raises a FileNotFoundError if there is none, a SegFitError if it cannot be read, or holds a tag that makes an object or
    an interpolation.
    """
    values = _parsed(path, yaml.safe_load)
    if "${" in repr(values):
        reason = "it holds an interpolation, ${…}; only plain values are allowed"
        raise SegFitError(f"{path}: not readable ({reason}).")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

    Raises a FileNotFoundError if there is none, a SegFitError if it cannot be read, or holds no mapping.
    """
    values = _parsed(path, json.loads)
    if not isinstance(values, dict):
        raise SegFitError(f"{path}: not readable (it holds no mapping).")
    return values


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    # A tag with a value of another kind, such as !!bool x, raises many types.
    except Exception as error:
        raise SegFitError(f"{path}: not readable ({error}).") from error
