"""Forecasting by the real command line: train, evaluate, export, kill and resume, sweep, benchmarks."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import scipy.stats
import torch

import segfit
from segfit.commands.export import export_run
from segfit.engine.checkpoint import load_checkpoint
from segfit.errors import SegFitError
from segfit.tasks.forecasting.data.table import waves_table
from segfit.tasks.forecasting.evaluation import make_exported
from tests.integration.training import command, compose_run, finished, same, start, train, wait_for

SMALL = (
    *("task=forecasting", "hardware=cpu", "model=linear", "device=cpu", "precision=fp32"),
    *("data.length=500", "data.lookback=48", "data.horizon=12", "batch_size=64", "epochs=3"),
    "lr=0.01",
)
QUIET = ("report.logger=[]", "report.page=false")  # pictures take longer than training


def run(folder: Path, *arguments: str, script: str = "train.py", code: int = 0) -> str:
    done = finished(command(*arguments, script=script), folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    extra = "[torchmetrics.regression.MeanSquaredError, torchmetrics.regression.R2Score]"
    output = run(folder, *SMALL, f"metrics.extra={extra}", "hydra.run.dir=run")
    assert "window/s" in output
    assert "last value's MSE" in output
    return folder


def test_it_learns_more_than_repeating_the_past(trained):
    found = metrics(trained / "run")
    assert found["monitor_mode"] == "min"
    assert found["season"] == 24
    best = found["best"]
    assert best["mse"] < 0.8 * best["mse_season"]
    assert best["mse"] < 0.8 * best["mse_last"]
    assert best["mean_squared_error"] == pytest.approx(best["mse"], rel=1e-5)
    assert 0 < best["r2_score"] < 1


def test_evaluation_gives_the_scores_of_training_and_writes_forecasts(trained):
    run(trained, "run=run", "split=val", "device=cpu", "every=1", script="evaluate.py")
    folder = trained / "run/evaluation/val"
    assert metrics(folder)["scores"] == pytest.approx(metrics(trained / "run")["best"])
    table = pd.read_csv(folder / "forecasts.csv", parse_dates=["date"])
    assert list(table.columns) == ["series", "date", "step", "prediction", "truth"]
    assert len(table) == 4 * 2 * 39 * 12  # series, columns, windows of 50 rows, horizon
    squared = (table["prediction"] - table["truth"]) ** 2
    assert squared.mean() == pytest.approx(metrics(folder)["scores"]["true_mse"], rel=1e-4)
    truths = table.groupby(["series", "date"])["truth"]
    assert (truths.max() - truths.min()).max() == 0  # one truth a date, whatever the window
    assert {"forecasts.png", "error_by_step.png", "errors.csv"} <= {
        path.name for path in folder.iterdir()
    }


def test_scores_have_intervals_by_blocks_of_time_and_runs_are_compared(trained):
    options = ("split=test", "device=cpu", "every=1", "compare=run")
    run(trained, "run=run", *options, script="evaluate.py")
    folder = trained / "run/evaluation/test"
    found, table = metrics(folder), pd.read_csv(folder / "forecasts.csv", parse_dates=["date"])
    squared = (table["prediction"] - table["truth"]) ** 2
    begun = table["date"] - pd.to_timedelta(table["step"], unit="h")  # the last date that was seen
    # A day, the season, is longer than the horizon.
    days = ((begun - begun.min()) // pd.Timedelta("1D")).to_numpy()
    sums, counts = np.bincount(days, squared), np.bincount(days)
    expected = scipy.stats.bootstrap(
        (sums, counts), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=2000, rng=0,
    ).confidence_interval  # fmt: skip
    assert found["units"] == len(sums) == 4
    assert found["intervals"]["true_mse"] == pytest.approx([*expected], rel=0.03)
    itself = found["compared"]["mse"]
    assert (itself["difference"], itself["p"]) == (0, 1)


def test_the_future_begins_an_hour_after_the_data(trained):
    run(trained, "run=run", "future=true", "device=cpu", script="evaluate.py")
    table = pd.read_csv(trained / "run/evaluation/future/forecasts.csv", parse_dates=["date"])
    assert len(table) == 4 * 2 * 12
    hours = pd.date_range("2020-01-01", periods=512, freq="h")[500:]
    assert (table["date"].unique() == hours).all()
    assert table["truth"].isna().all()
    rows = waves_table(compose_run(*SMALL, base=()).data).values.view(4, 500, 2)[2].numpy()
    frame = pd.DataFrame(rows, columns=["value_0", "value_1"])
    frame.attrs["series"] = "wave_002"
    model = segfit.load(trained / "run", device="cpu")
    found = model.predict(frame[-60:])
    for place, name in enumerate(frame):
        written = table[table["series"] == f"wave_002/{name}"]["prediction"]
        assert np.allclose(found[:, place], written, atol=1e-5)
    with pytest.raises(SegFitError, match="which series"):
        model.predict(rows)
    with pytest.raises(SegFitError, match=r"input 0: the last 48 \+ 0 rows of value_0, value_1"):
        model.predict([frame[-47:]])


def test_exported_programs_forecast_what_evaluation_wrote(trained):
    run(trained, "run=run", "export=model.onnx", "device=cpu", script="evaluate.py")
    export_run(segfit.load(trained / "run", device="cpu").run, trained / "model.pt2")
    run(trained, "run=run", "split=test", "device=cpu", "out=test", script="evaluate.py")
    files = {"series.json": ""}
    program = torch.export.load(trained / "model.pt2", extra_files=files).module()
    session = onnxruntime.InferenceSession(trained / "model.onnx")
    facts = json.loads(files["series.json"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["series.json"]) == facts
    table = pd.read_csv(trained / "test/forecasts.csv")
    one = table[table["series"] == "wave_002/value_1"]
    assert facts["targets"] == ["value_0", "value_1"]
    rows = waves_table(compose_run(*SMALL, base=()).data).values.view(4, 500, 2)[2]
    own = facts["series"]["wave_002"]
    mean, std = (torch.tensor([own[key]]) for key in ("mean", "std"))
    inputs = {"window": rows[None, 400 - 48 : 400], "mean": mean, "std": std}
    named = {key: value.numpy() for key, value in inputs.items()}
    for forecast in (program(*inputs.values()).detach(), *session.run(["forecasts"], named)):
        assert np.allclose(forecast[0, :, 1], one["prediction"].iloc[:12], atol=1e-4)
    assert np.allclose(rows[400:412, 1], one["truth"].iloc[:12], atol=1e-5)


@pytest.mark.parametrize("options", [("model=lstm_64",), ("model=transformer", "loss=quantile")])
def test_onnx_gives_what_torch_does_for_any_number_of_windows(tmp_path, options):
    train(tmp_path / "run", *SMALL, *options, "max_steps=1", base=())
    model = segfit.load(tmp_path / "run", device="cpu")
    export_run(model.run, tmp_path / "model.onnx")
    deployed = make_exported(model.run.config, model.run.model).module
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 7):
        window, mean, std = (
            torch.randn(count, 48, 2) + 9,
            torch.randn(count, 2),
            torch.ones(count, 2),
        )
        with torch.inference_mode():
            expected = deployed(window, mean, std)
        named = {"window": window.numpy(), "mean": mean.numpy(), "std": std.numpy()}
        (found,) = session.run(["forecasts"], named)
        assert found.shape[:3] == (count, 12, 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_killed_and_resumed_it_ends_as_if_nothing_had_been(tmp_path):
    dropout = (
        "model=lstm_64",
        "model.patch=12",
        "model.num_layers=2",
    )  # where random numbers have to go on, too
    short = (*SMALL, *dropout, "epochs=2", "data.length=300", *QUIET)
    run(tmp_path, *short, "hydra.run.dir=calm")
    slow = ("checkpoint.every_steps=3", "report.log_every=1", "hydra.run.dir=run")
    process = start(tmp_path, *short, *slow)
    wait_for(process, tmp_path, "update 10/", logs="run/train.log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path, f"resume={tmp_path / 'run'}")
    resumed, calm = (
        load_checkpoint(tmp_path / name / "checkpoints/last.pt")["model"]
        for name in ("run", "calm")
    )
    assert same(resumed, calm)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "quantile"])
def test_accumulated_updates_are_those_of_the_big_batch(tmp_path, loss):
    short = (*SMALL, f"loss={loss}", "max_steps=4", "seed=3")
    one = train(tmp_path / "one", *short, base=())
    many = train(tmp_path / "many", *short, "batch_size=16", "accumulate=4", base=())
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_model_that_learnt_nothing_is_named_when_training_ends(tmp_path):
    output = run(
        tmp_path, *SMALL, "epochs=1", "max_steps=1", "lr=1.0e-9", "data.noise=0.01", *QUIET
    )
    assert "does not beat repeating the last value" in output or "last season" in output


@pytest.mark.parametrize("place", ["host", "loader"])
def test_wherever_windows_are_made_they_are_the_same(tmp_path, place):
    short = (*SMALL, "max_steps=4", "report.log_every=1")
    gathered = train(tmp_path / "one", *short, base=())
    other = train(tmp_path / "two", *short, f"data.place={place}", base=())
    assert gathered.losses == other.losses


@pytest.mark.slow  # test_other_task.py has one whose score falls, too
def test_a_sweep_puts_the_least_error_first(tmp_path):
    run(tmp_path, "-m", *SMALL, *QUIET, "lr=0.00001,0.01", "hydra.sweep.dir=sweep", "epochs=1")
    with (tmp_path / "sweep/leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["best_mse"]) for row in rows]
    assert [row["lr"] for row in rows] == ["0.01", "1e-05"]
    assert errors == sorted(errors)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mode", "options", "answer"),
    [
        ("plan", (), "it fits"),
        slow("throughput", ("benchmark.warmup=1",), "TFLOP"),
        slow("max_batch", ("batch_size=64",), "batch_size="),
        slow("lr_find", ("benchmark.updates=40",), "lr"),
        ("diagnose", ("benchmark.warmup=1",), "Bottleneck"),
        slow("ladder", ("benchmark.warmup=1",), "windows are gathered as a whole"),
        slow("optimize", ("benchmark.warmup=1", "benchmark.out=local.yaml"), "composed recipe"),
    ],
)
def test_benchmarks_answer(tmp_path, mode, options, answer):
    arguments = (*SMALL, f"benchmark={mode}", "seconds=0.3", "hydra.run.dir=found", *options)
    assert answer in run(tmp_path, *arguments, script="benchmark.py")


# ------------------------------------------------------------------------------------ returns

PRICES = (
    *("task=forecasting", "hardware=cpu", "model=linear", "device=cpu", "precision=fp32"),
    *("data=csv", "data.target=close", "data.returns=true", "data.lookback=8", "data.horizon=1"),
    *("data.cache=none", "epochs=4", "lr=0.03"),
)


def write_prices(folder: Path, signal: float) -> None:
    """Write prices of twelve symbols whose returns remember `signal` of those before."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    days = pd.date_range("2018-01-01", periods=1000, freq="B")
    for number in range(12):
        returns = draw.normal(0, 0.01, 1000)
        for day in range(1, 1000):
            returns[day] += signal * returns[day - 1]
        table = pd.DataFrame({"date": days, "close": 100 * np.exp(returns.cumsum())})
        table.to_csv(folder / f"s{number}.csv", index=False)


def test_random_walks_give_no_information(tmp_path):
    write_prices(tmp_path / "prices", signal=0.0)
    scores = train(tmp_path / "run", *PRICES, f"data.root={tmp_path / 'prices'}", base=())
    found = scores.training.fit.result.scores
    assert abs(found["ic"]) < 2 * found["ic_se"]
    assert abs(found["hit_rate"] - 0.5) < 2 * found["hit_rate_se"]
    assert found["mse"] > 0.99 * found["mse_last"]


def test_a_planted_signal_is_found(tmp_path):
    write_prices(tmp_path / "prices", signal=0.5)
    scores = train(tmp_path / "run", *PRICES, f"data.root={tmp_path / 'prices'}", base=())
    found = scores.training.fit.result.scores
    files = sorted((tmp_path / "prices").iterdir())
    prices = np.stack([pd.read_csv(file)["close"] for file in files])
    returns = np.diff(np.log(prices))
    days = range(699, 799)  # of validation
    best = np.mean([np.corrcoef(returns[:, day - 1], returns[:, day])[0, 1] for day in days])
    assert found["ic"] > 0.9 * best > 0.3
    assert found["hit_rate"] > 0.6


def test_what_contradicts_itself_is_said_before_any_work(tmp_path):
    wrong = ("data.season=100", "monitor=ic", "data.split.val=0.6", "data.split.test=0.5")
    output = run(tmp_path, *SMALL, *wrong, code=2)
    for text in ("data.season=100: must be at most data.lookback=48", "monitor=ic", "below 1"):
        assert text in output


def test_a_data_set_without_test_part_says_so(tmp_path):
    with pytest.raises(SegFitError, match="val: there is no window"):
        train(tmp_path, *SMALL, "data.split.val=0.01", base=())


def test_a_run_keeps_its_columns_and_predicts_without_its_data(tmp_path):
    hours = np.arange(300)
    table = pd.DataFrame({
        "date": pd.date_range("2024-01-01", periods=300, freq="h"),
        "a": np.sin(hours / 12),
        "b": 100 + np.cos(hours / 12),
        "c": np.random.default_rng(0).normal(0, 9, 300),
    })  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    table.to_csv(data / "m.csv", index=False)
    options = [one for one in SMALL if not one.startswith(("data.length", "data.loo", "epochs"))]
    given = (
        "data=csv",
        f"data.root={data}",
        "data.target=a",
        "data.lookback=24",
        "data.cache=none",
    )
    arguments = (*options, *given, "model=lstm_64", "epochs=1", *QUIET)
    output = run(tmp_path, *arguments, "hydra.run.dir=run")
    assert "2024-01-01 to 2024-01-13 11:00:00, mostly 1:00:00 apart" in output
    expected = segfit.load(tmp_path / "run", device="cpu").predict(table)
    scored = ("run=run", "split=val", "device=cpu")
    run(tmp_path, *scored, script="evaluate.py")
    before = metrics(tmp_path / "run/evaluation/val")["scores"]
    # Rows of the training part that came out otherwise: standardised as in the run, val's windows are the same.
    early = table.assign(b=table["b"].where(hours > 20, 500))
    early[["date", "c", "a", "b"]].to_csv(data / "m.csv", index=False)
    run(tmp_path, *scored, script="evaluate.py")
    assert metrics(tmp_path / "run/evaluation/val")["scores"] == before
    table[["date", "c", "a", "b"]].to_csv(data / "m.csv", index=False)
    run(tmp_path, f"resume={tmp_path / 'run'}", "epochs=2")
    assert metrics(tmp_path / "run")["best"]["mse"] <= before["mse"]
    again = segfit.load(tmp_path / "run", device="cpu", checkpoint="last")
    known = again.predict(table)
    table.drop(columns="b").to_csv(data / "m.csv", index=False)
    assert "there is no column b" in run(tmp_path, *scored, script="evaluate.py", code=2)
    (data / "m.csv").unlink()
    found = segfit.load(tmp_path / "run", device="cpu", checkpoint="last").predict(
        table[["c", "b", "a"]]
    )
    assert np.array_equal(found, known)
    assert found.shape == expected.shape == (12, 1)
    run(tmp_path, "run=run", "device=cpu", "export=model.pt2", script="evaluate.py")
    extra = {"series.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["series.json"])["series"].keys() == {"m"}
