"""The schema of a forecasting run, and what can be wrong with it; never torch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.check import shown
from segfit.config.schema import (
    REQUIRED,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    option,
)

UNIT = "window"
FLOAT64 = True
MONITORS = dict.fromkeys(("mse", "mae", "mase", "loss"), "min") | {"ic": "max", "hit_rate": "max"}
COLUMNS = {"mse": "MSE", "mae": "MAE", "mse_last": "last value's MSE"}
# Whose errors are counted: the model's, and those of two forecasts that need none.
FORECASTERS = {"model": "model", "last": "last value", "season": "last season"}
_ERRORS = ("MSE", "MAE", "true MSE", "true MAE", "MASE")
ERRORS = {label.lower().replace(" ", "_"): label for label in _ERRORS}  # key → label
MEMORY_ADVICE = "Lower data.lookback, choose a smaller model, or set data.place=host."
MEMORY_OPTIONS = ("lookback", "horizon")


@dataclass
class LSTMConfig(ModelConfig):
    """A long short-term memory (Hochreiter and Schmidhuber, 1997), a row or a patch a step."""

    name: str = "lstm"
    hidden_size: int = option(128, "Width of the hidden state.", ge=1, le=8192)
    num_layers: int = option(1, "Layers on top of each other.", ge=1, le=64)
    dropout: float = option(0.3, "Between layers and before the head.", ge=0, lt=1)
    patch: int = option(24, "Values a step; 0: one, which takes many times as long.", ge=0)
    revin: bool = option(True, "Normalise each window by itself (RevIN), not by the series alone.")
    mixed: bool = option(False, "One state for all targets, the classic LSTM; false: one a target.")


@dataclass
class TransformerConfig(ModelConfig):
    """A transformer on patches of each target, after PatchTST (Nie et al., arXiv 2211.14730)."""

    name: str = "transformer"
    hidden_size: int = option(32, "Width of a token.", ge=1, le=8192)
    num_layers: int = option(2, "Encoder layers.", ge=1, le=64)
    num_heads: int = option(4, "Heads; hidden_size is a multiple of it.", ge=1, le=64)
    dropout: float = option(0.3, "Everywhere in the encoder.", ge=0, lt=1)
    patch: int = option(24, "Values a token; patches do not overlap.", ge=1)
    revin: bool = option(True, "Normalise each window by itself (RevIN), not by the series alone.")
    norm: str = option(
        "batch", "Of tokens; layer: accumulating equals the big batch.", choices=("batch", "layer")
    )
    mixed: bool = option(False, "Tokens of all targets at once; false: each target by itself.")


@dataclass
class LinearConfig(ModelConfig):
    """One linear layer (Zeng et al., arXiv 2205.13504): the baseline that others have to beat."""

    name: str = "linear"
    kind: str = option(
        "nlinear", "Minus the last value, or trend and rest apart.", choices=("nlinear", "dlinear")
    )


@dataclass
class SplitConfig:
    """How the time is cut, the same dates for all series: train, then val, then test."""

    val: float = option(0.1, "Share of the dates held out for validation.", gt=0, lt=1)
    test: float = option(0.2, "Share held out for testing, the last ones.", ge=0, lt=1)
    val_from: str | None = option(None, "First date of validation instead, such as 2024-01-01.")
    test_from: str | None = option(None, "First date of testing; needs val_from.")
    months: list[int] | None = option(None, "Months of 30 days instead; ETT's: [12, 4, 4].", ge=1)


@dataclass
class SeriesConfig(DataConfig):
    """What every source of series has."""

    lookback: int = option(96, "Rows that a forecast is made from.", ge=1, le=1_000_000)
    horizon: int = option(24, "Rows that are forecast.", ge=1, le=1_000_000)
    season: int | None = option(None, "Rows of a season; null: a day, week or year by dates.", ge=1)
    returns: bool = option(False, "Targets are prices: forecast their logarithmic returns.")
    place: str = option(
        "auto",
        "Where windows are made. device: gathered there, from series that lie there. host: gathered on the host, and "
        "copied batch by batch. auto: device, if the series take less than half of its free memory. loader: one by "
        "one in data workers, to compare.",
        choices=("auto", "device", "host", "loader"),
    )
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class WavesConfig(SeriesConfig):
    """Built-in hourly series: trend, day, week and noise. No files, deterministic."""

    name: str = "waves"
    num_series: int = option(4, "Series.", ge=1, le=100_000)
    length: int = option(2000, "Rows of each.", ge=16, le=10_000_000)
    columns: int = option(2, "Values a row, all of them targets.", ge=1, le=10_000)
    noise: float = option(0.3, "Standard deviation; that of the waves is about 1.", ge=0, le=1000)
    data_seed: int = option(0, "Another seed, another data set.", ge=0)


@dataclass
class CsvConfig(SeriesConfig):
    """A CSV file, or a folder with a file a series."""

    name: str = "csv"
    root: str = option(REQUIRED, "The file, or the folder.")
    date: str | None = option(None, "Column of the dates; null: date, datetime, time or timestamp.")
    columns: list[str] | None = option(
        None, "Columns that are read besides the dates; null: all of the first file."
    )
    # Any: a name or several
    target: Any = option(None, "Column or list of columns to forecast; null: all but known.")
    known: list[str] = option([], "Columns known in advance, such as holidays.", empty=True)
    on_missing: str = option(
        "fail",
        "Values that are missing or infinite, and dates left out of a regular series. fail: the run ends and "
        "names them. ffill: the value before is repeated. drop: their rows are left out.",
        choices=("fail", "ffill", "drop"),
    )
    cache: str = option(
        "disk",
        "Numbers read from files are kept. disk: in data.cache_dir, mapped into memory, until files "
        "change. none, ram: in memory, read at every start.",
        choices=("none", "ram", "disk"),
    )


@dataclass
class LossConfig:
    """Of standardised values, a mean over the whole effective batch."""

    name: str = option(REQUIRED, "Which error.", choices=("mse", "mae", "huber", "quantile"))
    delta: float = option(1.0, "Where huber goes from squares to lines.", gt=0, le=1000)
    quantiles: list[float] = option(
        [0.1, 0.5, 0.9], "Of quantile; 0.5 is the forecast, the others its band.", gt=0, lt=1
    )


@dataclass
class Run(RunConfig):
    """A forecasting training."""

    loss: LossConfig = field(default_factory=LossConfig)
    monitor: str = option("mse", "Score that picks the best checkpoint.", choices=tuple(MONITORS))


@dataclass
class Evaluate(EvaluateConfig):
    """evaluate.py of a forecasting run."""

    split: str = option("test", "Which part of the run's data.", choices=("train", "val", "test"))
    future: bool = option(False, "Forecast what comes after the last row of each series instead.")
    every: int | None = option(None, "Write every so many windows; null: horizon; 0: none.", ge=0)
    pictures: int = option(8, "How many forecasts are drawn.", ge=0, le=64)


USED = (("loss.name", "huber", "delta"), ("loss.name", "quantile", "quantiles"))
GROUPS: dict[str, dict[str, type]] = {
    "model": {"lstm": LSTMConfig, "transformer": TransformerConfig, "linear": LinearConfig},
    "data": {"waves": WavesConfig, "csv": CsvConfig},
}


def sample_label(config: DictConfig) -> str:
    """Return what a sample of a config is called: the rows that are seen and forecast."""
    return f"{config.data.lookback} → {config.data.horizon} rows"


def held_out_shape(config: DictConfig) -> tuple[int, ...]:
    """Return the rows of a window, its columns, and how many of them are targets and known in advance."""
    from segfit.tasks.forecasting.data import files  # pandas; it reads a file's header, if any

    layout = files.layout_of(config.data)
    rows = int(config.data.lookback + config.data.horizon)
    return rows, len(layout.columns), layout.targets, layout.known


def smaller_samples(config: DictConfig, share: float) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield ever shorter look-backs and what they cost, from a share of the present one on, which may be above 1."""
    rows = int(config.data.lookback * share)
    least = max(config.model.get("patch") or 1, config.data.season or 1)
    while rows >= least:
        yield {"data.lookback": rows}, "less of the past is seen"
        rows //= 2


def error_names(forecasters: Iterable[str]) -> list[str]:
    """Return what the errors of some forecasters are called: mse, …, mse_last, …"""
    suffixes = ["" if name == "model" else f"_{name}" for name in forecasters]
    return [f"{key}{suffix}" for suffix in suffixes for key in ERRORS]


def remark(scores: Mapping[str, float]) -> str:
    """Return a sentence that says which naive forecasts the model does not beat; empty if it beats them."""
    better = [
        f"repeating the {label} ({scores[f'mse_{name}']:.4g})"
        for name, label in FORECASTERS.items()
        if name != "model" and scores.get(f"mse_{name}", float("inf")) <= scores.get("mse", 0.0)
    ]
    if not better:
        return ""
    return f"The model's MSE of {scores['mse']:.4g} does not beat {' or '.join(better)}: it has learnt nothing of use."


def problems(config: DictConfig) -> Iterator[str]:
    """Yield what is impossible or contradicts itself in a composed run, beyond the values of single options."""
    data, model = config.data, config.model
    if (model.get("patch") or 0) > data.lookback:
        yield f"model.patch={model.patch}: must be at most data.lookback={data.lookback}."
    if model.name == "transformer" and model.hidden_size % model.num_heads:
        yield f"model.hidden_size={model.hidden_size}: must be a multiple of model.num_heads={model.num_heads}."
    if data.season is not None and data.season > data.lookback:
        yield f"data.season={data.season}: must be at most data.lookback={data.lookback}."
    if config.monitor in ("ic", "hit_rate") and not data.returns:
        yield f"monitor={config.monitor}: only returns have this score. Set data.returns=true."
    if config.loss.name == "quantile":
        quantiles = list(config.loss.quantiles)
        if 0.5 not in quantiles or quantiles != sorted(set(quantiles)):
            yield f"loss.quantiles={shown(quantiles)}: must rise, with 0.5 among them."
    yield from _check_split(data.split)
    if OmegaConf.get_type(data) is CsvConfig:
        yield from _check_csv(data)
    elif data.returns:
        yield "data.returns=true: waves are no prices. Choose data=csv."


def _check_split(split: DictConfig) -> Iterator[str]:
    if split.months is not None and (len(split.months) != 3 or split.val_from is not None):
        yield f"data.split.months={shown(split.months)}: must be three numbers, without data.split.val_from."
    dates = []
    for key in ("val_from", "test_from"):
        try:
            dates.append(utc_seconds(split[key] or "9999-12-31"))
        except ValueError:
            yield f"data.split.{key}={split[key]}: must be a date such as 2024-01-31."
    if split.test_from is not None and (split.val_from is None or dates != sorted(dates)):
        yield "data.split.test_from: needs data.split.val_from, an earlier date."


def utc_seconds(date: str) -> int:
    """Return the seconds since 1970 of a date in ISO 8601, UTC if it names no zone; raise a ValueError if it is none."""
    at = datetime.fromisoformat(date)
    return int((at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp())


def _check_csv(data: DictConfig) -> Iterator[str]:
    if not data.root:
        yield "data.root is empty: give a CSV file, or a folder of them."
    if not all(isinstance(name, str) for name in targets_of(data)):
        yield f"data.target={shown(data.target)}: must be the name of a column, or a list of them."
        return
    for name in sorted({*targets_of(data)} & {*data.known}):
        yield f"data.known: {name} is a target, too. What is known needs no forecast."
    for key, names in (("target", targets_of(data)), ("known", data.known)):
        if len({*names}) < len(names):
            yield f"data.{key}={shown(names)}: names a column twice."
        for name in names:
            if data.columns is not None and name not in data.columns:
                yield f"data.{key}: {name} is not among data.columns={shown(data.columns)}."


def evaluation_problems(options: DictConfig) -> Iterator[str]:
    """Yield what contradicts itself in the options of evaluate.py."""
    if options.future and options.compare is not None:
        yield f"compare={options.compare}: the future has no scores yet. Leave future out."


def targets_of(data: DictConfig) -> list[str]:
    """Return the names in `data.target`; empty where it is null."""
    several = OmegaConf.is_list(data.target) or data.target is None
    return list(data.target or []) if several else [data.target]
