import csv
import time
from io import StringIO

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from segfit.engine.events import EndLog
from segfit.report.console import console_report
from segfit.report.loggers import (
    CsvLogger,
    Logger,
    Loggers,
    MlflowLogger,
    WandbLogger,
    run_listener,
)
from segfit.runs.files import RunFolder
from tests.unit.report import events

HPARAMS = {"model": "segformer_b0", "lr": 3e-4}


def whole_run(logger, notify=print):
    loggers = Loggers({"one": logger}, notify=notify)
    events.train(loggers)
    loggers.end(events.end_log(8))
    loggers.close()


def test_a_csv_file_has_every_number_by_update_and_tag(tmp_path):
    whole_run(CsvLogger(tmp_path / "scalars.csv"))
    with (tmp_path / "scalars.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = {(int(row["update"]), row["tag"]): float(row["value"]) for row in rows}
    assert numbers[6, "loss/train"] == pytest.approx(1 / 6)
    assert numbers[8, "score/miou"] == pytest.approx(0.6)
    assert numbers[8, "score_iou/liver"] == pytest.approx(0.6)
    assert (8, "score_iou/kidney") not in numbers


def test_a_logger_that_fails_gives_one_notice_and_the_others_continue(tmp_path):
    class Broken(Logger):
        def scalars(self, values, update):
            raise ConnectionError("no route to host")

    notices = []
    loggers = Loggers(
        {"broken": Broken(), "csv": CsvLogger(tmp_path / "scalars.csv")}, notify=notices.append
    )
    events.train(loggers)
    loggers.close()
    (notice,) = notices
    assert notice.startswith("broken: cannot write: ConnectionError: no route to host.")
    assert "8,loss/train" in (tmp_path / "scalars.csv").read_text()


def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    whole_run(WandbLogger(tmp_path, "lr: 0.1\n"), notify=pytest.fail)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # its own process writes
    while b"score/miou" not in written.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_mlflow_keeps_metrics_and_resumes_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    whole_run(MlflowLogger(tmp_path, HPARAMS), notify=pytest.fail)
    MlflowLogger(tmp_path, HPARAMS).end(events.end_log(8))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("segfit")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["model"] == "segformer_b0"
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [(one.step, one.value) for one in history][-1] == (8, pytest.approx(1 / 8))
    assert run.info.status == "FINISHED"


def test_what_other_processes_post_is_reported_once_and_logged(tmp_path):
    printed = StringIO()
    console = console_report(Console(file=printed, width=200))
    posts = [["precision fell back", "a.png is bad"], ["a.png is bad", "b.png is bad", "oom"]]
    before = ["precision fell back"]
    config = OmegaConf.create({"report": {"logger": ["tensorboard"], "tensorboard": False}})
    listener = run_listener(
        RunFolder(tmp_path), console, config, {}, notices=before, posted=lambda: posts.pop(0)
    )
    listener.notice("oom")
    for updates in (1, 2):
        listener.end(EndLog("finished", updates, {}, None, 1.0))
    listener.close()
    assert not list(tmp_path.rglob("events.out.*"))
    for text in (printed.getvalue(), (tmp_path / "train.log").read_text()):
        assert text.count("a.png is bad") == text.count("b.png is bad") == text.count("oom") == 1
    assert "precision" not in printed.getvalue()  # was printed before there was a run folder
