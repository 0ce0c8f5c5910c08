"""SegFit: training that fits the GPU you have."""

from typing import Any

__version__ = "0.1.0"


def load(run: Any, **options: Any) -> Any:
    """Return the `segfit.commands.load_run.Model` of a run, or of several; "last" is the newest. `options` are evaluate.py's.

    `segfit.load("outputs/…").predict("photo.jpg").mask`
    """
    from segfit.commands.load_run import Model  # torch takes seconds

    return Model(run, **options)
