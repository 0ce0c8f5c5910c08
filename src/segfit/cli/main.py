"""What every entry point shares: Hydra's resolvers, error messages, exit codes.

Exit codes: 0 done; 1 a bug or a crash (with a traceback); 2 wrong input (with a message); 130 interrupted by Ctrl-C
after saving; 143 a sweep that SIGTERM ended.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from segfit.cli.explain import chain, explain, page
from segfit.config import tasks
from segfit.errors import SegFitError
from segfit.runs.files import RunFolder
from segfit.runs.folder import InUseError
from segfit.sweeps import callback as sweep
from segfit.sweeps import job as sweep_jobs
from segfit.system.cards import smaller_batches, tier_of, visible_gpus
from segfit.system.files import reporting
from segfit.system.process import launched, leave_reason, outlive_readers

CONF = Path(__file__).parents[3] / "conf"
_GRACE_SECONDS = 3.0  # torchrun ends this process within them if the main process failed, too


def setup() -> None:
    """Register the schemas of the task, resolvers and `hardware=auto`; must run before hydra.main composes.

    Choices on the command line become those of the task, where it has its own.
    """
    # Before torch is imported: on a Mac, what its GPU cannot do runs on the CPU, and torch warns.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # argparse takes overrides in one piece: those behind a flag would be "unrecognized arguments".
    values = [value for flag, value in pairwise(sys.argv) if flag in ("--config-dir", "-cd")]
    sys.argv[1:] = sorted(
        sys.argv[1:], key=lambda text: text not in values and bool(re.match("[^-].*=|~", text))
    )
    folders = tasks.config_folders(sys.argv[1:], CONF)
    try:
        task = tasks.task_of(sweep.resumed_arguments(sys.argv[1:]), folders)
        tasks.register(task)
        sys.argv[1:] = sweep.resumed_arguments(tasks.qualified(sys.argv[1:], task, folders))
    except SegFitError as error:
        fail(error.problems)
    _alias_detected_hardware(task, folders)
    # Hydra copies it, and all in it, to compose, and again for each group that --help or an error lists.
    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    OmegaConf.register_new_resolver("help_page", page, replace=True)
    resolvers: dict[str, Callable[..., str]] = {
        "run_dir": run_dir,
        "sweep_dir": lambda name: new_folder("multirun", name),
        "benchmark_dir": lambda mode: new_folder("outputs/benchmark", None, f"{mode}-"),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=True, replace=True)


def _alias_detected_hardware(task: str, folders: Sequence[Path]) -> None:
    # A defaults list may hold `hardware: ${detect:}`, but Hydra forbids `override` below such an entry, and
    # overriding the model is what a recipe is for. So auto is a second name for the file of the tier found.
    gpus = visible_gpus()
    tier = tier_of(gpus[0].total_gib) if gpus else "cpu"
    names = [f"{task}/{tier}.yaml", f"{task}/cpu.yaml", f"{tier}.yaml"]
    places = [folder / "hardware" / name for name in names for folder in folders]
    recipe = OmegaConf.load(next(path for path in places if path.is_file()))
    if gpus:
        # Processes that start together would see each other's share as taken.
        free = gpus[0].free_gib() if launched().size == 1 else gpus[0].total_gib
        recipe = OmegaConf.merge(recipe, smaller_batches(task, tier, recipe, free))
    ConfigStore.instance().store(group="hardware", name="auto", node=recipe, package="_global_")


def run_dir(resume: str | None, name: str | None) -> str:
    """Return the folder of this run: the resumed one, or a new one.

    Raises a SegFitError if `resume` is not a run folder, or `name` leads out of outputs.
    """
    if resume is not None:
        folder = tasks.run_folder(resume)
        if Path(resume).name == "best.pt":
            raise SegFitError(f"resume={resume}: runs resume from the last state: resume={folder}.")
        if not RunFolder(folder).config.is_file():
            raise SegFitError(
                f"resume={resume}: not a run folder (it has no config.yaml). Give a folder that train.py "
                f"wrote, such as outputs/2030-01-31/12-00-00."
            )
        return str(folder)
    if launched().rank > 0:
        return "."  # the main process makes the folder and sends its name when all have joined
    return new_folder("outputs", name)


def new_folder(parent: str, name: str | None, prefix: str = "") -> str:
    """Return the folder of a name below `parent`; without one create one, named by date and time.

    Raises a SegFitError if it cannot be created, or `name` leads elsewhere.
    """
    if name is not None:
        path = Path(name)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise SegFitError(f"name={name}: must be below {parent}. For others: hydra.run.dir=…")
        return str(parent / path)
    now = datetime.now()
    for attempt in range(1, 1000):
        clock = f"{prefix}{now:%H-%M-%S}" + f"-{attempt}" * (attempt > 1)
        folder = Path(parent, f"{now:%Y-%m-%d}", clock)
        with reporting(f"cannot create the folder {folder}"), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)  # fails if another run started in the same second
            return str(folder)
    raise SegFitError(f"cannot create a new folder below {parent}.")


_held_back: list[Exception] = []


@contextlib.contextmanager
def errors_held_back() -> Iterator[None]:
    """Keep an error until Hydra has returned: Hydra would print a line of its own about it."""
    try:
        yield
    except Exception as error:
        _held_back.append(error)


@contextlib.contextmanager
def ctrl_c_kept() -> Iterator[None]:
    """Let Ctrl-C stay a KeyboardInterrupt where the cleanup of a library that it interrupted fails, as OmegaConf's may."""
    try:
        yield
    except Exception as error:
        interrupted = any(isinstance(one, KeyboardInterrupt) for one in chain(error))
        if interrupted and not isinstance(error, SegFitError):
            raise KeyboardInterrupt from None
        raise


def run(
    main: Callable[[], None], config_name: str, no_sweep: str = "", no_torchrun: str = ""
) -> NoReturn:
    """Run a function decorated by hydra.main, print errors as messages, exit.

    `no_sweep` says why this program takes no -m, and what to do instead (empty: it takes it); `no_torchrun` the same of
    several processes by torchrun.
    """
    outlive_readers()
    signs = ("-m", "--m", "resume_sweep=", "hydra.mode=MULTIRUN", "hparams_search=")
    sign = next((text for text in sys.argv[1:] if text.lstrip("+").startswith(signs)), None)
    if launched().size > 1:
        if sign and not no_torchrun:
            no_torchrun = (
                f"{sign} would sweep in every process. Start each job by torchrun, without {sign}."
            )
        if no_torchrun:
            fail([f"torchrun: {no_torchrun}"])
    if no_sweep and sign:
        fail([f"{sign}: {no_sweep}"])  # before Hydra makes the sweep's folders
    has_mode = any(text.startswith("benchmark=") for text in sys.argv)
    if config_name == "benchmark" and not has_mode and {"--help", "-h"} & {*sys.argv}:
        sys.argv.append("benchmark=plan")  # Hydra composes the config for its help, too
    sweep_jobs.obey_ctrl_c()
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if not verbose:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
        os.environ[sweep_jobs.QUIET] = "1"
    try:
        main()
        if _held_back:
            raise _held_back.pop()
    except KeyboardInterrupt:
        sweep.print_resume_command()
        sys.exit(sweep_jobs.INTERRUPTED)
    except SystemExit as error:
        if error.code == sweep_jobs.TERMINATED:
            sweep.print_resume_command()
        raise
    except sweep.RefusedError as refused:
        caught = refused.error
    except Exception as error:
        if verbose:
            raise
        caught = error
    else:
        if sweep.LeaderBoard.interrupted:
            sys.exit(sweep_jobs.INTERRUPTED)
        sys.exit(1 if sweep.LeaderBoard.failed else 0)
    problems = sweep.without_a_result(caught) or explain(caught, CONF, config_name, sys.argv[1:])
    if problems:
        sweep.discard_unstarted()
    sweep.print_resume_command()
    if not problems:
        out_of_memory = isinstance(caught, MemoryError)
        if "torch" in sys.modules:
            from segfit.engine.out_of_memory import is_out_of_memory  # imports torch

            out_of_memory = is_out_of_memory(caught)
        kind = "oom" if out_of_memory else "crash"
        sweep_jobs.leave_error(kind, f"{type(caught).__name__}: {caught}", 1)
        raise caught
    if not isinstance(caught, InUseError):  # another process trains in this folder; nothing failed
        sweep_jobs.leave_error("input", problems[0], 2)
    fail(problems, caught.exit_code if isinstance(caught, SegFitError) else 2)


def fail(problems: list[str], code: int = 2) -> NoReturn:
    """Print the problems and exit; of several processes the main one prints, and another only if it alone fails."""
    if launched().rank > 0:
        time.sleep(_GRACE_SECONDS)
    leave_reason("\n".join(problems))
    count = len(problems)
    print("Error:" if count == 1 else f"{count} errors:", file=sys.stderr)
    for problem in problems:
        print("  - " + problem.replace("\n", "\n    "), file=sys.stderr)
    sys.exit(code)
