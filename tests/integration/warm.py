"""What the first command of a process does once, done before processes are forked: parsers warmed up, fonts found."""

import copy
import gc
import io
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from matplotlib.figure import Figure

from tests.unit import composing
from tests.unit.composing import composed

_get_mode = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Hydra composes everything once only to learn whether a config sweeps; here, only those of a search do."""
    if any("hydra" in text or "hparams_search" in text for text in overrides):
        return _get_mode(self, config_name, overrides)
    return None


Hydra.get_mode = _mode  # type: ignore[method-assign]
Plugins.instance()  # they have schemas of their own
_store = ConfigStore.instance()
_before = copy.deepcopy(_store.repo)
for _task in ("restoration", "forecasting", "segmentation"):
    composed(f"task={_task}", "hardware=cpu", "lr=0.1", "report.logger=[]")
composed("run=x", "device=cpu", name="evaluate")
composed("benchmark=plan", "model=cnn", "image_size=[32,32]", name="benchmark")
GlobalHydra.instance().clear()
_store.repo = _before
composing._registered.clear()  # a script that composes registers its task anew
_figure = Figure(layout="constrained")
_figure.subplots().plot([0, 1], label="text")
_figure.savefig(io.BytesIO(), format="png")
gc.collect()
gc.freeze()  # or each collection in a child would look at, and thereby copy, all that is here
