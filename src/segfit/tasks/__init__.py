"""A folder for each task: what it learns from, what a batch of it means, and how its results are shown.

Folders named in the environment variable SEGFIT_TASKS (separated as in PATH) hold tasks too.
"""

import os

__path__ += [folder for folder in os.environ.get("SEGFIT_TASKS", "").split(os.pathsep) if folder]
