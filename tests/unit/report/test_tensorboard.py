import itertools
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

from segfit.errors import SegFitError
from segfit.report.loggers import Loggers
from segfit.report.tensorboard import TensorBoardLogger
from segfit.system.monitor import Sample
from tests.unit.report import events

HPARAMS = {"model": "segformer_b0", "lr": 3e-4, "batch_size": 4, "fast": True}


def report(log_dir, resume_step=None, **options):
    board = TensorBoardLogger(log_dir, "lr: 0.1\nmodel: {name: x}\n", HPARAMS, resume_step)
    return Loggers({"tensorboard": board}, **options)


def whole_run(log_dir):
    board = report(log_dir)
    events.train(board)
    board.end(events.end_log(8))
    board.close()
    return log_dir


def load(log_dir):
    return EventAccumulator(str(log_dir), size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(log_dir, tag):
    return [(event.step, event.value) for event in load(log_dir).Scalars(tag)]


def test_scalars_are_there_by_update(tmp_path):
    whole_run(tmp_path)
    steps = [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6), (8, 1 / 8)]
    assert scalars(tmp_path, "loss/train") == [(step, pytest.approx(v)) for step, v in steps]
    expected = {
        "train/lr": (8, 3e-4),
        "train/grad_norm": (8, 1.25),
        "train/loss_scale": (8, 1.0),
        "train/scaler_skips": (8, 0.0),
        "speed/samples_per_second": (8, 45.3),
        "speed/data_wait_percent": (8, 2.0),
        "system/peak_memory_gib": (8, 3.25),
        "speed/epoch_seconds": (8, 75.0),
        "loss/epoch": (8, 0.75),
        "score/miou": (8, 0.6),
        "loss/val": (8, 0.4),
        "score_iou/liver": (8, 0.6),
        "score_best/miou": (8, 0.6),
    }
    for tag, (step, value) in expected.items():
        assert scalars(tmp_path, tag)[-1] == (step, pytest.approx(value)), tag
    assert "score_iou/kidney" not in load(tmp_path).Tags()["scalars"]  # absent from the truth


def test_pictures_of_the_first_and_the_last_validation_are_there(tmp_path):
    whole_run(tmp_path)
    loaded = load(tmp_path)
    for tag, kind in (
        ("validation/panel/case_1", b"\xff\xd8"),
        ("validation/confusion_matrix", b"\x89PNG"),
    ):
        images = loaded.Images(tag)
        assert (images[0].step, images[-1].step) == (4, 8)
        assert images[0].encoded_image_string.startswith(kind)


def test_the_config_is_there_as_text(tmp_path):
    whole_run(tmp_path)
    (config,) = load(tmp_path).Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert text == "```yaml\nlr: 0.1\nmodel: {name: x}\n```"
    (facts,) = load(tmp_path).Tensors("facts/text_summary")
    assert "| weights | random \\| none |" in facts.tensor_proto.string_val[0].decode()


def hparams_tags(log_dir):
    return load(log_dir).PluginTagToContent(metadata.PLUGIN_NAME)


def test_hparams_are_one_row_in_the_runs_own_folder(tmp_path):
    whole_run(tmp_path)
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    tags = hparams_tags(tmp_path)
    start = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["model"].string_value == "segformer_b0"
    assert start.hparams["lr"].number_value == 3e-4
    assert start.hparams["fast"].string_value == "true"
    experiment = metadata.parse_experiment_plugin_data(tags[metadata.EXPERIMENT_TAG])
    names = {info.name.tag for info in experiment.metric_infos}
    assert names == {
        "score_best/loss",
        "score_best/miou",
        "score_best/macro_f1",
        "score_best/pixel_accuracy",
    }
    end = metadata.parse_session_end_info_plugin_data(tags[metadata.SESSION_END_INFO_TAG])
    assert end.status == STATUS_SUCCESS


def test_an_interrupted_run_keeps_everything_and_its_row_open(tmp_path):
    board = report(tmp_path)
    events.train(board, last=6)
    board.end(events.end_log(6, "interrupted", best_epoch=0))  # not closed
    assert scalars(tmp_path, "loss/train")[-1][0] == 6
    assert scalars(tmp_path, "score_best/miou") == [(4, 0.5)]
    assert metadata.SESSION_END_INFO_TAG not in hparams_tags(tmp_path)
    board.close()


def test_a_killed_run_has_lost_nothing_that_was_logged(tmp_path):
    board = report(tmp_path / "run")
    events.train(board, last=6)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # what is on disk at this moment
    assert [step for step, _ in scalars(tmp_path / "copy", "loss/train")] == [2, 4, 6]
    assert [step for step, _ in scalars(tmp_path / "copy", "score/miou")] == [4]
    board.close()


@pytest.mark.parametrize(("saved", "killed"), [(4, 8), (5, 7), (4, 4), (0, 3)])
def test_no_step_appears_twice_after_resuming(tmp_path, saved, killed):
    board = report(tmp_path)
    events.train(board, last=killed)
    board.close()

    board = report(tmp_path, resume_step=saved)
    events.train(board, first=saved)
    board.end(events.end_log(8))
    board.close()

    loaded = load(tmp_path)
    assert [event.step for event in loaded.Scalars("loss/train")] == [2, 4, 6, 8]
    for tag in loaded.Tags()["scalars"]:
        steps = [event.step for event in loaded.Scalars(tag)]
        assert all(one < two for one, two in itertools.pairwise(steps)), tag
    for tag in loaded.Tags()["images"]:
        steps = [event.step for event in loaded.Images(tag)]
        assert len(set(steps)) == len(steps), tag


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SegFitError, match=r"cannot write TensorBoard events.*report.logger=\[\]"):
        report(tmp_path / "file" / "tensorboard")


def test_a_disk_that_fills_up_is_reported_once_and_training_goes_on(tmp_path, monkeypatch):
    notices = []
    board = report(tmp_path, notify=notices.append)
    board.start(events.info())

    def full(*_):
        raise OSError(28, "No space left on device")

    writer = board._loggers["tensorboard"]._writer
    monkeypatch.setattr(writer, "flush", full)
    monkeypatch.setattr(writer, "add_event", full)
    events.train(board)
    board.end(events.end_log(8))
    assert len(notices) == 1
    assert "No space left on device" in notices[0]
    monkeypatch.undo()
    board.close()


def test_what_the_monitor_saw_is_there_as_means_of_each_window(tmp_path):
    class Watched:
        def __init__(self):
            self.calls = []
            self.start = lambda: self.calls.append("start")
            self.close = lambda: self.calls.append("close")
            self.batches = [[], [sample(40), sample(60)], [sample(90)], []]

        def fresh(self):
            return self.batches.pop(0)

    def sample(utilisation):
        return Sample(0.0, utilisation, 2.0, 70.0, None, None)

    watched = Watched()
    board = report(tmp_path, monitor=watched)
    events.train(board)
    board.end(events.end_log(8))
    board.close()
    assert watched.calls == ["start", "close"]
    assert scalars(tmp_path, "system/utilisation") == [(4, 50.0), (6, 90.0)]
    assert scalars(tmp_path, "system/temperature") == [(4, 70.0), (6, 70.0)]
    assert "system/power_w" not in load(tmp_path).Tags()["scalars"]
