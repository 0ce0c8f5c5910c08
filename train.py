"""Train a model.

python train.py experiment=demo                # a first run, offline, on any machine
python train.py hardware=8gb model=segformer_b2 data=folder data.root=my_data data.num_classes=3
python train.py -m batch_size=2,4,8            # one run for each value, and a leader board
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from segfit.cli import main as cli
from segfit.config.check import check
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.sweeps import job as sweep_jobs
from segfit.system.process import launched

cli.setup()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Train what the command line composes; return the best monitored score, for sweepers."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # one job of a sweep
        return sweep_jobs.run_job(Path(__file__))
    with cli.errors_held_back():
        return run(config)
    return float("nan")


def run(config: DictConfig) -> float:
    """Check the config and train it; a run folder in which nothing was written is removed again."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        resumed = config.resume is not None
        if resumed:
            config = runs.resumed_config(folder, overrides)
        else:
            check(config)
        runs.claim(folder, resumed=resumed)

        from segfit.commands.train import train  # torch and friends only when work starts

        with cli.ctrl_c_kept():
            end = train(config, overrides, folder, resumed=resumed)
    except (SegFitError, KeyboardInterrupt):
        if launched().rank == 0:
            runs.discard_if_empty(folder)
        raise
    if end.reason == "interrupted":
        raise KeyboardInterrupt  # exit code 130, after everything is saved
    return float(end.best_scores.get(config.monitor, float("nan")))


if __name__ == "__main__":
    cli.run(main, "train")
