"""Measure or predict something about a training: memory, speed, learning rate. Takes whatever train.py takes.

python benchmark.py benchmark=plan hardware=8gb model=segformer_b4     # will it fit? needs no GPU
python benchmark.py benchmark=diagnose data=folder data.root=my_data data.num_classes=3
python benchmark.py benchmark=optimize         # the fastest setting here, written as hardware=local
"""

import shlex
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from segfit.cli import main as cli
from segfit.config.check import check, plain
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.system.hardware import machine

cli.setup()


@hydra.main(version_base="1.3", config_path="conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    """Answer what the command line asks."""
    with cli.errors_held_back():
        benchmark(config)


def benchmark(config: DictConfig) -> None:
    """Measure, print, write everything down."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        check(config)
        measure(config, folder)
    except (SegFitError, KeyboardInterrupt):
        runs.discard_if_empty(folder)
        raise


@cli.ctrl_c_kept()
def measure(config: DictConfig, folder: Path) -> None:
    """Run the mode's module and report what it found."""
    # torch and friends only when work starts
    from segfit.report.console import WorkProgress, console_report
    from segfit.report.files import write_findings
    from segfit.report.text import print_findings, stdout_console
    from segfit.tuning import Bench

    console = stdout_console()
    progress = WorkProgress(console, lines=True)
    mode = config.benchmark.name
    try:
        bench = Bench(
            folder,
            cache(console_report(console).notice),  # once, however many trainings a mode makes
            lambda what, done, total: progress(done, total, what),
        )
        findings = import_module(f"segfit.tuning.{mode}").run(config, bench)
    finally:
        progress.close()
    about = {
        "benchmark": mode,
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "config": plain(config),
    }
    write_findings(findings, folder, about)
    print_findings(findings, [folder], console)


if __name__ == "__main__":
    cli.run(
        main,
        "benchmark",
        no_sweep="benchmark.py compares within a mode. Call it once a mode.",
        no_torchrun="benchmark.py measures one process. Start it by python.",
    )
