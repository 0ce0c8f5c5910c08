import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfit.report.files import files_of, write_json
from tests.unit.report import events


def test_tables_become_csv_without_totals_and_figures_png():
    files = dict(files_of(events.result(0.5)))
    assert list(csv.reader(files["per_class.csv"].decode().splitlines())) == [
        ["class", "IoU", "pixels"],
        ["[liver]", "0.5", "1234567"],
        ["kidney", "", "0"],
    ]
    with Image.open(io.BytesIO(files["confusion_matrix.png"])) as image:
        assert image.format == "PNG"
        assert image.size == (300, 200)


def test_metrics_are_strict_json(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(
        path,
        {
            "nan": float("nan"),
            "inf": [np.float64("inf"), 1.5],
            "int": np.int64(3),
            "confusion": np.eye(2, dtype=np.int64),
            "run": Path("outputs/1"),
            "nested": {"none": None, "ok": True, 1: "ä"},
        },
    )

    def no_constants(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constants) == {
        "nan": None,
        "inf": [None, 1.5],
        "int": 3,
        "confusion": [[1, 0], [0, 1]],
        "run": "outputs/1",
        "nested": {"none": None, "ok": True, "1": "ä"},
    }


def test_a_failed_write_leaves_the_old_metrics(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_json(path, {"miou": 0.5})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"miou": 0.6})
    assert json.loads(path.read_text()) == {"miou": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
