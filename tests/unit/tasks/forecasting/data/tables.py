"""Series for tests: CSV files, and what is made of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from segfit.tasks.forecasting.data.series import LazySeries, SeriesSet, Windows
from tests.unit.composing import composed


def config_of(root: Path, *overrides: str) -> Any:
    """Return the config of a training on CSV files with small windows."""
    return composed(
        *("task=forecasting", "data=csv", f"data.root={root}", "data.lookback=8"),
        *("data.horizon=4", "model=linear", *overrides),
    )


def frame(rows: int = 100, columns: Sequence[str] = ("a", "b"), **given: Any) -> pd.DataFrame:
    """Return hours and random walks; `given` are columns that replace or join them."""
    draw = np.random.default_rng(0)
    dates = pd.date_range("2024-01-01", periods=rows, freq="h")
    values = {name: draw.normal(0, 1, rows).cumsum() + 100 for name in columns}
    return pd.DataFrame({"date": dates, **values, **given})


def write(table: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def series_of(root: Path, *overrides: str) -> SeriesSet:
    return LazySeries(config_of(root, *overrides).data).series


def windows_of(root: Path, part: str, *overrides: str) -> Windows:
    data = config_of(root, *overrides).data
    return Windows(LazySeries(data), part, data)
