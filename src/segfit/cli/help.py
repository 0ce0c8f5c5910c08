"""The page that --help prints: groups with their choices, then every key with its value and its help text."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

_KEY_WIDTH = 36  # columns of key=value; its help starts in the next line where it is longer
_VALUE_WIDTH = 40
_FLAGS = """\
Flags:
  --cfg job                           Print the composed config and exit.
  --hydra-help                        Hydra's own flags."""


def page(*, _root_: DictConfig) -> str:
    """Return the page for a composed config, as the template that Hydra substitutes: `$` is doubled."""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    groups = _groups(_root_.hydra.runtime.choices, OmegaConf.select(_root_, "task.name"))
    lines = [(sys.modules["__main__"].__doc__ or "").rstrip()]
    lines += ["", "Groups (group=choice); * marks what is composed:"]
    lines += [_row(name, " ".join(choices), width) for name, choices in groups.items()]
    lines += ["", "Keys (key=value), with the values that are composed:"]
    for title, rows in _sections(_root_):
        lines += ["", title] if title else []
        lines += [_row(option, text, width) for option, text in rows]
    return "\n".join([*lines, "", _FLAGS]).replace("$", "$$")


def _groups(chosen: DictConfig, task: str) -> dict[str, list[str]]:
    """Return the choices of each group; the chosen one with an asterisk."""
    groups = [str(name) for name in chosen if not str(name).startswith("hydra")]
    groups += ["hydra/launcher", "hydra/sweeper"] if "hparams_search" in groups else []
    options = GlobalHydra.instance().config_loader().get_group_options
    found = {}
    for group in sorted(groups):
        names = [name for name in options(group) if not name.endswith("_schema")]
        own = options(f"{group}/{task}")  # what a task has of its own stands for the rest
        names = [*own, *(name for name in names if name == "auto")] if own else names
        now = str(chosen[group]).removeprefix(f"{task}/")
        found[group] = [f"{name}*" if name == now else name for name in names]
    return found


def _sections(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield (title, rows of key=value and help) of a config's own keys, then of each of its sections."""
    schema: Any = OmegaConf.get_type(config)
    inner, rows = [], []
    for item in fields(schema):
        value = config._get_node(item.name)
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            inner.append(item.name)
        elif "help" in item.metadata and not (
            item.name == "name" and item.metadata.get("choices", ())
        ):
            choices = ", ".join(item.metadata.get("choices", ()))
            text = item.metadata["help"] + (f" One of: {choices}." if choices else "")
            rows.append((f"{prefix}{item.name}={_shown(config, item.name)}", text))
    summary = (schema.__doc__ or "").partition("\n")[0]
    yield (f"{prefix.rstrip('.')}: {summary}" if prefix else "", rows)
    for name in inner:
        yield from _sections(config[name], f"{prefix}{name}.")


def _shown(config: DictConfig, key: str) -> str:
    if OmegaConf.is_missing(config, key):
        return "???"
    value = config[key]
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return textwrap.shorten(text, _VALUE_WIDTH, placeholder=" …")


def _row(left: str, text: str, width: int) -> str:
    indent = " " * (_KEY_WIDTH + 2)
    wrapped = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
    if len(left) >= _KEY_WIDTH:
        return f"  {left}\n{wrapped}"
    return f"  {left:<{_KEY_WIDTH}}{wrapped.lstrip()}"
