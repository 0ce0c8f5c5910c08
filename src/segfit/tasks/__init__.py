"""A folder for each task: what it learns from, what a batch of it means, and how its results are shown.

Folders named in the environment variable SEGFIT_TASKS (separated as in PATH) hold tasks too.
"""

import os
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


def add_folders() -> None:
    """Look for tasks in the folders of SEGFIT_TASKS, too."""
    named = os.environ.get("SEGFIT_TASKS", "").split(os.pathsep)
    __path__.extend(folder for folder in named if folder and folder not in __path__)


def module_of(task: str, name: str, base: type[T]) -> T:
    """Return what a module of a task offers, with the methods and values of `base` where it has nothing of its own."""
    offered = base()
    vars(offered).update(vars(import_module(f"{__name__}.{task}.{name}")))
    return offered


add_folders()
