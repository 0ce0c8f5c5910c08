"""Train a segmentation model: python train.py hardware=8gb model=segformer_b2 data=folder data.root=…"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segfit import cli, runs, sweep, sweep_jobs
from segfit.check import check
from segfit.errors import SegFitError

cli.setup()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float:
    """Train what the command line composes; return the best monitored score, for sweepers."""
    if sweep.is_sweep():
        return sweep_jobs.run_job(config.monitor, Path(__file__))
    with cli.errors_held_back():
        return run(config)
    return float("nan")


def run(config: DictConfig) -> float:
    """Check the config and train it; a run folder in which nothing was written is removed again."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        if config.resume is not None:
            config = runs.resumed_config(folder, overrides)
        check(config)
        runs.claim(folder, resumed=config.resume is not None)
        return train(config, overrides, folder)
    except SegFitError:
        runs.discard_if_empty(folder)
        raise


def train(config: DictConfig, overrides: list[str], folder: Path) -> float:
    """Build, fit, report."""
    # torch and friends only when work starts
    from segfit.build.training import make_training, metrics_of
    from segfit.report import session
    from segfit.report.console import console_report

    console, checking, notices = console_report(), session.PreflightProgress(), list[str]()

    def notice(message: str) -> None:
        notices.append(message)
        console.notice(message)

    try:
        training = make_training(config, folder, notice, checking)
    finally:
        checking.close()
    runs.save_config(config, overrides, folder)
    report = session.RunReport(folder, console, notices)
    if config.report.tensorboard:
        step = training.fit.state.progress.update if config.resume is not None else None
        report.add_tensorboard(training.classes, OmegaConf.to_yaml(config), training.hparams, step)
    listener = report.listener
    try:
        end = training.fit.run(listener, training.facts)
    finally:
        listener.close()  # an exception must leave no hidden cursor and no unwritten line
    metrics = metrics_of(training, end, config)
    report.conclude(end, config.monitor, metrics)
    if end.reason == "interrupted":
        raise KeyboardInterrupt  # exit code 130, after everything is saved
    return float(end.best_scores.get(config.monitor, float("nan")))


if __name__ == "__main__":
    cli.run(main, "train")
