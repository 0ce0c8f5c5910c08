"""What train.py writes is what TensorBoard shows."""

import json

import pytest

from tests.integration.tensorboard_server import read_back
from tests.integration.training import TINY, the_run, train_by_command_line


@pytest.mark.slow
def test_a_run_of_train_py_can_be_looked_at(tmp_path):
    code, output = train_by_command_line(tmp_path, *TINY, "report.log_every=3", "report.panels=2")
    assert code == 0, output
    run = the_run(tmp_path)
    shown = read_back(run)
    ((name, scalars),) = shown.scalars.items()
    assert name == "tensorboard"
    assert [step for step, _ in scalars["loss/train"]] == [3, 6, 9, 12]
    assert [step for step, _ in scalars["score/miou"]] == [6, 12]
    best = json.loads((run / "metrics.json").read_text())["best"]["miou"]
    assert max(value for _, value in scalars["score/miou"]) == pytest.approx(best, abs=1e-6)
    assert {"score_iou/liver", "score_iou/kidney", "score_iou/spleen"} <= scalars.keys()

    panels = [tag for tag in shown.images[name] if tag.startswith("validation/panel/")]
    assert len(panels) == 2
    assert "validation/confusion_matrix" in shown.images[name]

    row = shown.rows[name]
    assert row["hparams"]["batch_size"] == 4
    assert row["hparams"]["model.name"] == "cnn"
    assert row["metrics"]["score_best/miou"] == pytest.approx(best, abs=1e-6)
    assert "base_channels: 8" in shown.texts[name]["config/text_summary"]
