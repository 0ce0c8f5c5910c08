"""Compose configs as the entry points do."""

import sys
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from segfit.cli import main as cli
from segfit.config import tasks

_registered: list[str] = []


def set_up(*overrides: str) -> list[str]:
    """Register what composing a command line needs, if its task is not there yet; return it with its task's choices."""
    folders = tasks.config_folders(overrides, cli.CONF)
    task = tasks.task_of(overrides, folders)
    if _registered != [task]:  # it takes a fifth of the time
        with patch.object(sys, "argv", ["train.py", *overrides]):
            cli.setup()
        _registered[:] = [task]
    return [
        text.replace("--config-dir=", "hydra.searchpath=[file://") + "]" * ("--config-dir" in text)
        for text in tasks.qualified(overrides, task, folders)
    ]


def composed(*overrides: str, name: str = "train") -> DictConfig:
    arguments = set_up(*overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose(name, arguments)
