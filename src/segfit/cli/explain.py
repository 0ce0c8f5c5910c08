"""What a command line may hold, as --help prints it, and what is wrong with one: a plain message for each wrong argument.

Hydra stops at the first error. Here each choice of a group is composed by itself, then each override is applied by itself,
so that all errors are listed at once, each with the nearest valid name.
"""

import errno
import json
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from segfit.config.check import check, flat
from segfit.config.tasks import DEFAULT, config_folders, schema_of, task_of
from segfit.errors import SegFitError, nearest

_KEY_WIDTH = 36  # columns of key=value; its help starts in the next line where it is longer
_VALUE_WIDTH = 40
_FLAGS = """\
Flags:
  --cfg job                           Print the composed config and exit.
  --hydra-help                        Hydra's own flags."""
# What OmegaConf and Python say of a value → plain English; the first that is found.
_PLAINER = {
    "is not a valid bool": "must be true or false.",
    "could not be converted to Integer": "must be a whole number.",
    "could not be converted to Float": "must be a number.",
    "Cannot convert '$VALUE_TYPE' to string": "must be text.",
    "is not Optional": "must not be null.",
    "is not a ListConfig": "must be a list, in brackets: [a,b].",
}
# Our keys → what other libraries call them.
_FOREIGN = {
    "image_size": "imgsz img_size crop_size",
    "batch_size": "batch train_batch_size per_device_train_batch_size",
    "lr": "lr0 learning_rate base_lr max_lr",
    "epochs": "max_epochs num_epochs num_train_epochs n_epochs",
    "max_steps": "max_iters max_iterations",
    "accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum",
    "loader.workers": "workers num_workers dataloader_num_workers",
    "precision": "amp fp16 bf16 mixed_precision",
    "model.weights": "weights pretrained",
    "optimizer.weight_decay": "wd",
    "hydra.run.dir": "output_dir save_dir out_dir project",
    "val_every": "val_interval eval_interval check_val_every_n_epoch",
    "patience": "early_stopping_patience early_stopping",
    "clip_grad_norm": "gradient_clip_val max_grad_norm",
    "seed": "random_seed manual_seed",
}
_OURS = {word: key for key, words in _FOREIGN.items() for word in words.split()}
_NEEDED = ("task", "benchmark")  # groups without which nothing else composes
# Where Hydra reads the command line and the files. It can raise anything there: `=3` is a ValueError.
_COMPOSING = ("config_loader_impl.py", "defaults_list.py", "overrides_parser.py")


def explain(error: BaseException, conf: Path, config_name: str, arguments: list[str]) -> list[str]:
    """Return what is wrong with the input (the arguments without the program's name), or [] if the error is a bug."""
    for cause in chain(error):
        if isinstance(cause, SegFitError):
            return cause.problems
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    hydras = isinstance(error, (HydraException, OmegaConfBaseException))
    hydras = hydras or any(file.match("hydra/_internal/utils.py") for file in files[-1:])  # flags
    if not hydras and not any(file.name in _COMPOSING for file in files):
        places = [file.parts for file in files if {"hydra", "segfit"} & set(file.parts)]
        if isinstance(error, OSError) and places and "hydra" in places[-1]:  # not our code
            return [f"Hydra cannot create its folder (hydra.run.dir, hydra.sweep.dir): {error}."]
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENAMETOOLONG):
            return [f"{error.filename}: {error.strerror}. Choose one that you may use."]
        return []
    problems = _faulty_overrides(conf, config_name, arguments)
    return list(dict.fromkeys(problems)) or [_plain(str(error))]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _plain(message: str) -> str:
    """Drop the hints that are about Hydra's internals."""
    noise = ("object_type=", "reference_type=", "To append", "Set the env")
    lines = [line.strip() for line in message.splitlines() if not line.endswith("_schema")]
    return "\n".join(line for line in lines if line and not line.startswith(noise))


def _faulty_overrides(conf: Path, config_name: str, arguments: list[str]) -> list[str]:
    problems, lines = list[str](), list[str]()
    for text in arguments:
        if text.startswith("-") or ("=" not in text and not text.startswith("~")):
            continue
        try:
            override = OverridesParser.create().parse_override(text)
            if not override.key_or_group:
                raise ValueError("There is no key before the =.")
            lines += _lines(override)
        except Exception as error:
            key, _, value = text.partition("=")
            hint = (_plain(str(error)).splitlines() or [""])[0]
            if isinstance(error, HydraException):
                hint = "Brackets and quotes come in pairs."
                bare = re.sub(r"""(["'])([^"']*)\1(?=\s*:)""", r"\2", value)
                if bare != value:
                    hint = f"Keys have no quotes: '{key}={bare}'."
                elif value[:1] not in ("{", "[") and '"' not in value:
                    hint = f"Text with special characters needs quotes, '{key}=\"{value}\"'."
            problems.append(f"{text}: not understood. {hint}")
    GlobalHydra.instance().clear()
    folders = config_folders(arguments, conf)
    places = create_config_search_path(str(conf))
    for folder in folders[:-1]:
        places.prepend("command-line", str(folder.absolute()), "schema")
    version.setbase("1.3")
    Hydra.create_main_hydra2("explain", places)
    try:
        return problems + _try_each(config_name, lines, task_of(arguments, folders))
    finally:
        GlobalHydra.instance().clear()


def _lines(override: Override) -> list[str]:
    """Return an override as text: one line, or one for each value of a sweep."""
    if override.is_interval_sweep():
        return [f"{override.get_key_element()}={cast(IntervalSweep, override.value()).start}"]
    if not override.is_sweep_override():
        return [override.input_line or ""]
    return [f"{override.get_key_element()}={one}" for one in override.sweep_string_iterator()]


def _try_each(config_name: str, lines: list[str], task: str) -> list[str]:
    problems, good = list[str](), dict[str, str]()
    # Choices of groups first, those that others need before them: which keys and choices exist depends on them.
    groups = sorted(filter(_group, lines), key=lambda line: _group(line) not in _NEEDED)
    for line in groups:
        tried = {**good, _group(line): line}
        try:
            compose(config_name, [*tried.values()])
        except SegFitError as error:
            problems += error.problems
        except Exception as error:
            if "You must specify" not in str(error):  # of another group, by a line of its own
                problems.append(_reason(line, error, task))
        else:
            good = tried
    try:
        config = compose(config_name, [*good.values()], return_hydra_config=True)
    except Exception:
        return problems  # the choices alone do not compose, so no value is at fault
    values: Any = OmegaConf.to_container(config)
    keys = [key for key in flat(values) if not key.startswith("hydra.")]
    known = [*dict.fromkeys([*_groups(), *keys, *(key.rpartition(".")[0] or key for key in keys)])]
    for line in [line for line in lines if line not in groups]:
        override = OverridesParser.create().parse_override(line)
        key = override.key_or_group
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except Exception as error:
            if override.is_add() or key in known or key.startswith("hydra."):
                problems.append(_reason(line, error, task))
            else:
                problems.append(f"{key}: there is no such key.{_right_key(key, known, task)}")
    if not problems:
        return []
    try:
        with open_dict(config):
            del config["hydra"]
        check(config)
    except Exception as error:  # one that is not ours follows from what is wrong already
        found = getattr(error, "problems", ())
        problems += [problem for problem in found if "has no value" not in problem]
    return problems


def _group(line: str) -> str:
    """Return the group that a line chooses from, "" if it is of another kind."""
    name = line.split("=")[0].lstrip("+~").split("@")[0]
    return name if name in _groups() else ""


def _groups() -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    hydras = [f"hydra/{group}" for group in loader.list_groups("hydra")]
    return [group for group in loader.list_groups("") if group != "hydra"] + hydras


def _reason(line: str, error: Exception, task: str) -> str:
    value = line.partition("=")[2]
    loader = GlobalHydra.instance().config_loader()
    causes = [_plain(str(cause)) for cause in chain(error)]
    if (group := _group(line)) and not value.startswith(("[", "{")):
        options = loader.get_group_options
        shared = [choice for choice in options(group) if not choice.endswith("_schema")]
        own = options(f"{group}/{task}")
        own += ["auto"] if own and "auto" in shared else []
        # What asks for a schema or a group that this task lacks is another task's.
        lacking = isinstance(error, MissingConfigException) or "Could not override" in causes[0]
        others = task != DEFAULT and value in shared and lacking
        if others or (value not in shared and value.removeprefix(f"{task}/") not in own):
            if line == "hardware=local":
                return f"{line}: does not exist yet. `python benchmark.py benchmark=optimize` writes it."
            known = own if others else own or shared
            there = f"There are: {', '.join(known)}." if known else f"task={task} has none."
            return f"{line}: no such choice.{nearest(value, known)} {there}"
    line = line.lstrip("+")
    for theirs, plain in _PLAINER.items():
        if any(theirs in cause for cause in causes):
            return f"{line}: {plain}"
    text = next((c for c in reversed(causes) if c), str(error))
    return f"{line}: {re.sub(r' *full_key: .*', '', text).strip()}"


def _right_key(name: str, known: list[str], task: str) -> str:
    group, _, leaf = name.rpartition(".")
    kinds = schema_of(task).GROUPS.get(group, {}).items()
    if owners := [name for name, kind in kinds if any(leaf == item.name for item in fields(kind))]:
        return f" Of {group}, {' and '.join(owners)} has it."
    ours = _OURS.get(leaf, "")
    if ours in known or ours.startswith("hydra."):
        return f" In SegFit it is {ours}."
    # weight_decay → optimizer.weight_decay
    same = [key for key in known if key.split(".")[-1] == leaf]
    return nearest(name, known) or (f" Did you mean '{same[0]}'?" if same else "")


def page(*, _root_: DictConfig) -> str:
    """Return the page for a composed config, as the template that Hydra substitutes: `$` is doubled."""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    groups = _choices(_root_.hydra.runtime.choices, OmegaConf.select(_root_, "task.name"))
    lines = [(sys.modules["__main__"].__doc__ or "").rstrip()]
    lines += ["", "Groups (group=choice); * marks what is composed:"]
    lines += [_row(name, " ".join(choices), width) for name, choices in groups.items()]
    lines += ["", "Keys (key=value), with the values that are composed:"]
    return "\n".join([*lines, *_section(_root_, "", width), "", _FLAGS]).replace("$", "$$")


def _choices(chosen: DictConfig, task: str) -> dict[str, list[str]]:
    """Return the choices of each group; the chosen one with an asterisk."""
    groups = [str(name) for name in chosen if not str(name).startswith("hydra")]
    groups += ["hydra/launcher", "hydra/sweeper"] if "hparams_search" in groups else []
    options = GlobalHydra.instance().config_loader().get_group_options
    found = {}
    for group in sorted(groups):
        names = [name for name in options(group) if not name.endswith("_schema")]
        own = options(f"{group}/{task}")  # what a task has of its own stands for the rest
        names = [*own, *(name for name in names if name == "auto")] if own else names
        now = str(chosen[group]).removeprefix(f"{task}/")
        found[group] = [f"{name}*" if name == now else name for name in names]
    return found


def _section(config: DictConfig, prefix: str, width: int) -> Iterator[str]:
    """Yield the lines of a config's own keys, with value and help, then of each of its sections."""
    schema: Any = OmegaConf.get_type(config)
    if prefix:
        summary = (schema.__doc__ or "").partition("\n")[0]
        yield f"\n{prefix.rstrip('.')}: {summary}"
    inner = []
    for item in fields(schema):
        choices = ", ".join(item.metadata.get("choices", ()))
        if is_dataclass(OmegaConf.get_type(config._get_node(item.name))):
            inner.append(item.name)
        elif "help" in item.metadata and not (item.name == "name" and choices):
            text = item.metadata["help"] + (f" One of: {choices}." if choices else "")
            value = "???" if OmegaConf.is_missing(config, item.name) else config[item.name]
            value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown = textwrap.shorten(shown, _VALUE_WIDTH, placeholder=" …")
            yield _row(f"{prefix}{item.name}={shown}", text, width)
    for name in inner:
        yield from _section(config[name], f"{prefix}{name}.", width)


def _row(left: str, text: str, width: int) -> str:
    indent = " " * (_KEY_WIDTH + 2)
    wrapped = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
    if len(left) >= _KEY_WIDTH:
        return f"  {left}\n{wrapped}"
    return f"  {left:<{_KEY_WIDTH}}{wrapped.lstrip()}"
