"""Score a run, predict new images, or export the model.

python evaluate.py run=outputs/2030-01-31/12-00-00 split=test
python evaluate.py run=outputs/2030-01-31/12-00-00 images=photos out=results
python evaluate.py run=outputs/2030-01-31/12-00-00 export=model.pt2
python evaluate.py run=outputs/2030-01-31/12-00-00 export=hf:folder
"""

from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from segfit.cli import main as cli
from segfit.config.check import check
from segfit.runs import folder as runs

cli.setup()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(options: DictConfig) -> None:
    """Evaluate what the command line says."""
    with cli.errors_held_back():
        evaluate(options)


@cli.ctrl_c_kept()
def evaluate(options: DictConfig) -> None:
    """Rebuild the run's model; predict, score, write everything down, or export it."""
    check(options)
    configs = runs.load_named(options)

    from segfit.commands import evaluate as evaluation
    from segfit.commands import export
    from segfit.commands import load_run as trained  # torch and friends only when work starts
    from segfit.report.console import WorkProgress, console_report
    from segfit.report.text import print_findings, stdout_console

    console = stdout_console()
    notice, checking = console_report(console).notice, WorkProgress(console)
    predicting = partial(checking, what="predicting")
    try:
        run = trained.load_runs(options, configs, notice)
        if (options.export or "").startswith("hf:"):
            folder = Path(options.export.removeprefix("hf:")).expanduser()
            export.publish(run, folder, options.push)
            console.print(f"Written to {folder}", markup=False)
            return
        if options.export is not None:
            export.export_run(run, Path(options.export).expanduser())
            console.print(f"Written to {options.export}", markup=False)
            return
        done = evaluation.evaluate_run(run, options, notice, checking, predicting)
    finally:
        checking.close()
    for label, text in done.about().items():
        console.print(f"{label:11} {text}", markup=False, soft_wrap=True)
    print_findings(done.result, done.written, console)


if __name__ == "__main__":
    cli.run(
        main,
        "evaluate",
        no_sweep="evaluate.py takes one run at a time. Call it once a run.",
        no_torchrun="evaluate.py scores a run in one process. Start it by python.",
    )
