"""Compose configs as the entry points do."""

import copy
import sys
from collections.abc import Sequence
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from segfit.cli import main as cli
from segfit.config import tasks

_registered: list[
    object
] = []  # the task, and its schema in Hydra's store, which others may replace
_chosen: dict[tuple[str, ...], tuple[object, DictConfig]] = {}


def set_up(*overrides: str) -> list[str]:
    """Register what composing a command line needs, if its task is not there yet; return it with its task's choices."""
    folders = tasks.config_folders(overrides, cli.CONF)
    task = tasks.task_of(overrides, folders)
    schema = ConfigStore.instance().repo.get("run_schema.yaml")
    if not _registered or _registered[0] != task or _registered[1] is not schema:
        with patch.object(sys, "argv", ["train.py", *overrides]):
            cli.setup()  # it takes a fifth of the time
        _registered[:] = [task, ConfigStore.instance().repo["run_schema.yaml"]]
    return [
        text.replace("--config-dir=", "hydra.searchpath=[file://") + "]" * ("--config-dir" in text)
        for text in tasks.qualified(overrides, task, folders)
    ]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    return composed_of(set_up(*overrides), name)


def composed_of(arguments: Sequence[str], name: str = "train") -> DictConfig:
    """Compose what `set_up` returned: each choice of groups once, as it takes Hydra most of the time, and values on a copy."""
    if not any("hydra" in text or "local" in text for text in arguments):
        choices = [text for text in arguments if _is_choice(text)]
        auto = ConfigStore.instance().repo["hardware"]["auto.yaml"]
        key = (name, str(_registered[0]), *choices)
        try:
            if key not in _chosen or _chosen[key][0] is not auto:
                _chosen[key] = auto, _composed(choices, name)
            values = [text for text in arguments if text not in choices]
            overrides = OverridesParser.create().parse_overrides(values)
            config = copy.deepcopy(_chosen[key][1])
            if not any(override.is_sweep_override() for override in overrides):
                ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
                return config
        except Exception:
            pass  # Hydra reports it below
    return _composed(arguments, name)


def _composed(arguments: Sequence[str], name: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose(name, list(arguments))


def _is_choice(text: str) -> bool:
    group = text.partition("=")[0].lstrip("+~").partition("@")[0]
    return (cli.CONF / group).is_dir()
