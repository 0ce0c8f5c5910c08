"""A folder for each task: what it learns from, what a batch of it means, and how its results are shown.

Folders named in the environment variable SEGFIT_TASKS (separated as in PATH) hold tasks too.
"""

import os


def add_folders() -> None:
    """Look for tasks in the folders of SEGFIT_TASKS, too."""
    named = os.environ.get("SEGFIT_TASKS", "").split(os.pathsep)
    __path__.extend(folder for folder in named if folder and folder not in __path__)


add_folders()
