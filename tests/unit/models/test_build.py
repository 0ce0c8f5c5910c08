"""Every way to get pretrained weights, and every way that it can fail, without a network."""

import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from segfit.errors import SegFitError
from segfit.models import build
from segfit.models.segformer import make_segformer
from segfit.models.timm_unet import TimmUnet
from tests.unit.payload import Payload

RECOMMENDED = "nvidia/segformer-b0-finetuned-ade-512-512"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """An empty cache and a hub where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A b0 for 3 classes, as transformers saves it."""
    torch.manual_seed(7)
    model, _ = make_segformer("b0", 3, weights=None)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def make_timm_unet(encoder, num_classes, *, weights):
    model = TimmUnet(encoder, num_classes, weights=weights)
    return model, model.weights


def put_in_cache(repo: str, folder: Path) -> None:
    """Lay `folder` out as huggingface_hub's cache does."""
    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")


def copy_checkpoint(source: Path, target: Path, *, change=lambda state: state) -> Path:
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def test_null_is_random_and_says_so():
    _, report = make_segformer("b0", 3, weights=None)
    assert (report.source, report.warning) == ("random", "")


def test_folder_gives_all_weights(checkpoint):
    reference, _ = make_segformer("b0", 3, weights=str(checkpoint))
    torch.manual_seed(99)
    model, report = make_segformer("b0", 3, weights=str(checkpoint))
    assert report.source == str(checkpoint)
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_other_class_count_makes_only_the_classifier_new(checkpoint):
    source, _ = make_segformer("b0", 3, weights=str(checkpoint))
    model, _ = make_segformer("b0", 4, weights=str(checkpoint))
    assert model.decode_head.classifier.weight.shape[0] == 4
    for key, value in source.state_dict().items():
        if not key.startswith("decode_head.classifier."):
            assert torch.equal(model.state_dict()[key], value), key


def test_auto_takes_the_cache(checkpoint):
    put_in_cache(RECOMMENDED, checkpoint)
    model, report = make_segformer("b0", 3, weights="auto")
    assert report.source == RECOMMENDED
    source, _ = make_segformer("b0", 3, weights=str(checkpoint))
    assert torch.equal(model.decode_head.linear_fuse.weight, source.decode_head.linear_fuse.weight)


def test_hub_name_takes_the_cache_even_offline(checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    put_in_cache("someone/segformer", checkpoint)
    _, report = make_segformer("b0", 3, weights="someone/segformer")
    assert report.source != "random"


@pytest.mark.parametrize("make", [make_segformer, make_timm_unet], ids=["segformer", "timm_unet"])
@pytest.mark.parametrize("offline", [False, True])
def test_auto_without_hub_is_random_with_a_loud_warning(make, offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    _, report = make("b0" if make is make_segformer else "resnet10t", 3, weights="auto")
    assert report.source == "random"
    assert "WARNING: RANDOM WEIGHTS" in report.warning
    assert ("HF_HUB_OFFLINE" if offline else NOBODY) in report.warning
    assert "hf download" in report.warning


@pytest.mark.parametrize("make", [make_segformer, make_timm_unet], ids=["segformer", "timm_unet"])
def test_named_weights_that_cannot_be_fetched_stop_the_run(make):
    with pytest.raises(SegFitError, match="nvidia/some-model") as error:
        make("b0" if make is make_segformer else "resnet10t", 3, weights="nvidia/some-model")
    for remedy in (NOBODY, "hf download nvidia/some-model", "model.weights=null"):
        assert remedy in str(error.value)


def test_a_hub_that_is_silent_is_given_up_quickly(monkeypatch):
    monkeypatch.setattr(build, "PROBE_SECONDS", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # accepts, and never answers
        # without the bound this call would not return
        reason = build.unreachable(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert reason


def test_a_hub_that_is_silent_about_files_is_given_up_quickly(monkeypatch):
    """It answers for itself, and then takes no more calls."""
    asked, over = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            if self.path == "/":
                self.send_response(200)
                self.end_headers()
            else:
                over.wait()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(build, "PROBE_SECONDS", 1.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        _, report = make_segformer("b0", 3, weights="auto")
        over.set()
        server.shutdown()
    assert "RANDOM WEIGHTS" in report.warning
    # The client would have come back for minutes.
    assert asked.count(f"/{RECOMMENDED}/resolve/main/config.json") == 1


@pytest.mark.parametrize("name", ["no/such/path", "./nowhere", "resnet", "/absent"])
def test_a_name_that_is_nothing(name):
    with pytest.raises(SegFitError, match="no such file or folder"):
        make_segformer("b0", 3, weights=name)


def test_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(SegFitError, match=r"model\.safetensors .* found cat\.jpg"):
        make_segformer("b0", 3, weights=str(tmp_path))


def test_checkpoint_of_another_variant(checkpoint):
    with pytest.raises(
        SegFitError, match=r"not the weights of a SegFormer b1.*another shape.*model\.variant"
    ):
        make_segformer("b1", 3, weights=str(checkpoint))


def test_every_kind_of_wrong_key_is_reported_at_once(checkpoint, tmp_path):
    def change(state):
        del state["decode_head.batch_norm.weight"]
        state["decode_head.batch_norm.bias"] = torch.zeros(3)
        state["decode_head.extra"] = torch.zeros(1)
        return state

    folder = copy_checkpoint(checkpoint, tmp_path / "odd", change=change)
    with pytest.raises(SegFitError) as error:
        make_segformer("b0", 3, weights=str(folder))
    message = str(error.value)
    assert "missing: decode_head.batch_norm.weight" in message
    assert "unexpected: decode_head.extra" in message
    assert "of another shape: decode_head.batch_norm.bias" in message


def test_a_missing_classifier_is_an_error(checkpoint, tmp_path):
    def change(state):
        return {k: v for k, v in state.items() if "decode_head.classifier" not in k}

    folder = copy_checkpoint(checkpoint, tmp_path / "headless", change=change)
    with pytest.raises(SegFitError, match=r"missing: decode_head\.classifier\.bias"):
        make_segformer("b0", 3, weights=str(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_without_its_folder(checkpoint, tmp_path, suffix):
    state = load_file(checkpoint / "model.safetensors")
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    _, report = make_segformer("b0", 3, weights=str(file))
    assert report.source != "random"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x00" * 64])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_files(tmp_path, checkpoint, name, content):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SegFitError, match="not a readable checkpoint"):
        make_segformer("b0", 3, weights=str(tmp_path))


@pytest.mark.parametrize("make", [make_segformer, make_timm_unet], ids=["segformer", "timm_unet"])
def test_code_in_a_checkpoint_is_never_run(make, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"weight": Payload(trace)}, tmp_path / "evil.bin")
    with pytest.raises(SegFitError, match="not a readable checkpoint"):
        make("b0" if make is make_segformer else "resnet10t", 3, weights=str(tmp_path / "evil.bin"))
    assert not trace.exists()


def test_the_report_is_all_that_is_said(checkpoint, capfd, caplog):
    with caplog.at_level(logging.INFO):
        make_segformer("b0", 5, weights=str(checkpoint))
        make_segformer("b0", 5, weights="auto")
    out, err = capfd.readouterr()
    assert out + err == ""
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
