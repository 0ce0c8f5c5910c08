"""A folder for each task: what it learns from, what a batch of it means, and how its results are shown.

Folders named in the environment variable SEGFIT_TASKS (separated as in PATH) hold tasks too.
"""

import os
from importlib import import_module
from types import SimpleNamespace
from typing import Any


def add_folders() -> None:
    """Look for tasks in the folders of SEGFIT_TASKS, too."""
    named = os.environ.get("SEGFIT_TASKS", "").split(os.pathsep)
    __path__.extend(folder for folder in named if folder and folder not in __path__)


def module_of(task: str, name: str) -> Any:
    """Return what a module of a task offers, with that of `tasks/defaults.py` where it has nothing of its own."""
    own, others = import_module(f"{__name__}.{task}.{name}"), import_module(f"{__name__}.defaults")
    return SimpleNamespace(**{**vars(others), **vars(own)})


add_folders()
