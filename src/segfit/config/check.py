"""`check` raises one error that lists everything that is wrong with a config."""

import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segfit.config.schema import USED, EvaluateConfig, RunConfig, SplitConfig
from segfit.config.tasks import schema_of
from segfit.errors import nearest, raise_all

LARGEST = 2**32 - 1  # of any whole number; seeds of NumPy end here, and nothing else needs more
_PLAIN_LISTS = ("list[int]", "list[float]", "list[str]")


def check(config: DictConfig, *, recorded: bool = False) -> None:
    """Raise one SegFitError that names every missing, impossible or contradicting value, and what has no effect.

    Options of a `recorded` run may have none.
    """
    kind = OmegaConf.get_type(config) or object
    problems = [*_check_options(config, "")]
    if not problems and issubclass(kind, RunConfig):
        schema = schema_of(config.task.name)
        problems = [*_check_run(config), *schema.problems(config)]
        problems += [] if recorded else _check_used(config, (*USED, *schema.USED))
        problems += [] if recorded or "benchmark" in config else schema.training_problems(config)
    if not problems and issubclass(kind, EvaluateConfig):
        problems = [
            *_check_evaluation(config),
            *getattr(import_module(kind.__module__), "evaluation_problems", lambda _: ())(config),
        ]
    raise_all(problems)


def _check_used(config: DictConfig, rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Yield options that nothing uses, by rows as `USED`; not those of YAML whose switch alone was typed."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    typed = {text.partition("=")[0].lstrip("+") for text in overrides}
    for switch, values, names in rows:
        group, _, leaf = switch.rpartition(".")
        now = OmegaConf.select(config, switch)
        if leaf not in config[group] or (str(now) in values.split() if values else now):
            continue
        choice = group if leaf == "name" else switch
        defaults = OmegaConf.structured(OmegaConf.get_type(config[group]))
        for name in names.split():
            key, value = f"{group}.{name}", config[group][name]
            changed = value != defaults[name] and not typed & {group, switch}
            if value and (key in typed or changed):
                with_it = " or ".join(f"{choice}={one}" for one in values.split())
                yield (
                    f"{key}={shown(value)}: has no effect with {choice}={shown(now)}. Leave it away, or take "
                    f"{with_it or f'{choice} above 0'}."
                )


def _check_evaluation(config: DictConfig) -> Iterator[str]:
    if config.export is not None and (config.get("images") is not None or config.out is not None):
        yield "export writes the model alone: leave images and out away, or leave export away."
    for key in ("run", "compare", "out", "export", "root", "images"):
        if config.get(key) is not None and not config[key]:
            yield f"{key} is empty: give a path, or leave it away."
    if config.export == "hf:" or (
        config.push is not None and "hf:" not in (config.export or "")[:3]
    ):
        yield "push and export=hf: need a folder to write to: export=hf:my_model."
    if config.compare is not None:
        if config.export is not None or config.get("images") is not None:
            yield f"compare={config.compare}: scores are compared. Leave export and images out."
        if not config.bootstrap:
            yield "bootstrap=0: compare needs resamples, such as bootstrap=1000."
    yield from _check_extra_metrics(config.metrics)


def _check_split(split: DictConfig) -> Iterator[str]:
    if split.val + split.test >= 1:
        yield "data.split.val + data.split.test: must leave something to train on (below 1)."
    fold, folds = split.get("fold"), split.get("folds")
    if fold is None and folds is not None:
        yield f"data.split.folds={folds}: has no effect without data.split.fold, such as -m data.split.fold=0,1,2."
    for name in ("val", "test", "fold") if split.get("lists") is not None else ():
        if split[name] != getattr(SplitConfig, name):
            yield (
                f"data.split.{name}={split[name]}: has no effect with data.split.lists={split.lists}, which says what is in "
                "which split. Leave one of the two away."
            )
    if fold is not None and fold >= (folds or 5):
        yield f"data.split.fold={fold}: must be less than data.split.folds={folds or 5}; the first is 0."


def _check_extra_metrics(metrics: DictConfig) -> Iterator[str]:
    for item in metrics.extra or []:
        name = item.get("name") if OmegaConf.is_dict(item) else item
        if not isinstance(name, str) or "${" in shown(item):
            yield f"metrics.extra: {shown(item)} must be a name, or {{name: …, argument: value, …}}, without ${{."


def _check_options(config: DictConfig, prefix: str) -> Iterator[str]:
    schema = OmegaConf.get_type(config)
    if schema is None or not is_dataclass(schema):
        return
    known = [item.name for item in fields(schema)]
    for name in config:
        if name not in known:
            yield f"{prefix}{name!s}: there is no such key.{nearest(str(name), known)}"
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if item.name not in list(config):
            yield f"{key}: cannot be taken out."
            continue
        if OmegaConf.is_missing(config, item.name):
            yield f"{key} has no value: give it on the command line ({key}=…). {_help(item)}"
            continue
        value = config[item.name]
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from _check_options(value, f"{key}.")
        elif item.name == "name" and "help" not in item.metadata and value != item.default:
            group = prefix.rstrip(".")
            yield f"{key}={value}: cannot be set; choose by {group}=…, which brings the right options."
        elif value is not None:
            values = value if OmegaConf.is_list(value) else [value]
            if OmegaConf.is_list(value) and not value and not item.metadata["empty"]:
                yield f"{key}=[]: must hold a value. {_help(item)}"
            metadata = dict(item.metadata)
            if key == "monitor" and OmegaConf.select(config, "metrics.extra"):
                metadata["choices"] = None  # the names of these are known when they are made
            for one in values:
                # OmegaConf takes a mapping for an item of list[float]; items of Any are looked at below.
                nested = OmegaConf.is_config(one) and str(item.type).startswith(_PLAIN_LISTS)
                problem = "must be plain values." if nested else _problem(one, metadata)
                if problem:
                    yield f"{key}={shown(value)}: {problem} {_help(item)}"
                    break


def _help(item: Any) -> str:
    return f"({item.metadata['help']})" if "help" in item.metadata else ""


def shown(value: Any) -> str:
    """Return a value of a config as one types it."""
    return str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


# Functions of `operator` → how they are called.
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _problem(value: Any, metadata: Any) -> str:
    if isinstance(value, str) and "${" in value:
        return "must not hold ${, the mark of a reference: a run that keeps it could not be read again."
    choices = metadata.get("choices")
    if choices and value not in choices:
        return f"must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):  # not every int is a float
            return "must be a finite number."
        for key, words in _LIMITS.items():
            if key in metadata and not getattr(operator, key)(value, metadata[key]):
                return f"must be {words} {metadata[key]:g}."
        if isinstance(value, int) and abs(value) > LARGEST:
            return f"must be at most {LARGEST}."
    return ""


def plain(config: Any) -> Any:
    """Return a config as dicts, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _check_run(config: DictConfig) -> Iterator[str]:
    yield from _check_extra_metrics(config.metrics)
    if "split" in config.data:
        yield from _check_split(config.data.split)
    if "" in (config.init, config.freeze):
        yield "init or freeze is empty: give a value, or leave it away."
    if config.freeze_epochs is not None and config.freeze is None:
        yield f"freeze_epochs={config.freeze_epochs} needs freeze, which says what is frozen: freeze=encoder."
    plain_graphs = config.compile and config.device not in ("cpu", "mps") and config.accumulate == 1
    if config.compile_mode != "default" and not plain_graphs:
        yield (
            f"compile_mode={config.compile_mode}: CUDA graphs need compile=true, a CUDA card and accumulate=1 (they overwrite "
            f"gradients that are kept). Change it, or leave compile_mode away."
        )
    for key in ("freeze", "data.split.group"):
        try:
            re.compile(text := OmegaConf.select(config, key) or "")
        except re.error as error:
            yield f"{key}={text}: no valid regular expression ({error})."
    betas = config.optimizer.betas
    if betas is not None and len(betas) not in (2, 3):
        yield f"optimizer.betas={shown(betas)}: must be two or three numbers."
    if config.patience is not None and config.patience * config.val_every >= config.epochs > 1:
        yield (
            f"patience={config.patience} with val_every={config.val_every} can never stop a run of "
            f"epochs={config.epochs}: lower it, or set patience=null."
        )
