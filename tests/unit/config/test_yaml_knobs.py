"""Every file of conf says how it is launched, and the keys that it comments out hold their default values.

A knob is a line `# key: value  # why`; a line `# key:` holds knobs of a section, which are indented.
"""

import re
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from segfit.cli import main as cli
from segfit.config.check import check
from tests.unit.composing import composed_of, set_up
from tests.unit.test_readme import parsed, single_runs

GROUP_FILES = [
    path
    for path in sorted(cli.CONF.rglob("*.yaml"))
    if path.parent != cli.CONF and "hydra" not in path.parts and path.stem != "local"
]
WITHOUT_KNOBS = ("augmentation/none", "benchmark/monitor")
_KNOB = re.compile(r"^( *)# ( *\w+:(?: \S.*?  # \S.*)?)$", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(cli.CONF).with_suffix("").as_posix()


def uncommented(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a file holds with its knobs, and how many there are."""
    text, found = _KNOB.subn(r"\1\2", path.read_text(encoding="utf-8"))
    values = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)  # no key twice
    assert isinstance(values, dict)
    values.pop("defaults", None)
    return {str(key): value for key, value in values.items()}, found


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Return the commands of a file's header, as (entry point, arguments)."""
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header
    lines = re.findall(r"^# +(python .*)$", re.sub(r"\\\n#\s*", "", header[0]), re.MULTILINE)
    return [command for line in lines if (command := parsed(line)) is not None]


def compose_all(arguments: list[str], program: str) -> DictConfig:
    """Compose with Hydra's own config, which some files set."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose(program, arguments, return_hydra_config=True)


def differences(values: dict[str, Any], config: Any, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        node = config._get_node(key) if key in config else None
        if isinstance(value, dict) and isinstance(node, DictConfig):
            found += differences(value, node, f"{prefix}{key}.")
        elif node is None:
            found.append(f"{prefix}{key}: there is no such key")
        else:
            there = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
            there = there.name if isinstance(there, Enum) else there
            if there != value:
                found.append(f"{prefix}{key}: {value!r}, but {there!r} is composed")
    return found


def test_files_are_found() -> None:
    assert len(GROUP_FILES) > 50


@pytest.mark.parametrize("path", GROUP_FILES, ids=name_of)
def test_it_launches_as_its_header_says_and_its_knobs_hold_the_defaults(path: Path) -> None:
    values, knobs = uncommented(path)
    assert knobs or name_of(path) in WITHOUT_KNOBS
    for index, (program, arguments) in enumerate(commands(path)):
        for overrides in single_runs(arguments):
            compose = compose_all if "hydra" in values else composed_of
            config = compose(set_up(*overrides), program)
            if index == 0:
                group, *task, _ = path.relative_to(cli.CONF).parts
                assert f"{group}={path.stem}" in overrides
                assert all(f"task={name}" in overrides for name in task)
                root = "# @package _global_" in path.read_text(encoding="utf-8")
                assert differences(values, config if root else config[group]) == []
            with open_dict(config):
                config.pop("hydra", None)
            check(config)
    assert commands(path)


@pytest.mark.parametrize("name", ["train", "evaluate", "benchmark"])
def test_the_knobs_of_an_entry_point_hold_the_defaults(name: str) -> None:
    values, knobs = uncommented(cli.CONF / f"{name}.yaml")
    assert knobs
    config = compose_all(set_up(*(["benchmark=plan"] if name == "benchmark" else [])), name)
    assert differences(values, config) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# lr: 0.1  # why", 1),
        ("  # lr: 0.1  # why", 1),
        ("# split:\n#   val: 0.2  # why", 2),
        ("# lr: 0.1", 0),
        ("# mIoU: a score. It is\n# Note: this", 0),
    ],
)
def test_what_is_a_knob(text: str, found: int) -> None:
    assert _KNOB.subn("", text)[1] == found


def test_a_wrong_knob_is_found() -> None:
    config = OmegaConf.create({"model": {"dropout": 0.1}})
    assert differences({"model": {"dropout": 0.1}}, config) == []
    assert differences({"model": {"dropout": 0.2, "drop": 1}, "lr": 1}, config) == [
        "model.dropout: 0.2, but 0.1 is composed",
        "model.drop: there is no such key",
        "lr: there is no such key",
    ]
