"""Compose configs as the entry points do."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from segfit.cli import main as cli


def composed(*overrides: str, name: str = "train") -> DictConfig:
    cli.setup()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose(name, list(overrides))
