"""The batch of an update that is not finite, kept to look at."""

import resource
import signal

import pytest
import torch

from segfit.engine.non_finite import save_window

WINDOW = [{"image": torch.zeros(1, 3, 64, 64)}]


def test_a_saved_window_holds_names_and_tensors(tmp_path):
    path = tmp_path / "bad_batches" / "update-000001.pt"
    save_window(path, WINDOW, [["a.png"]], "loss is nan")
    content = torch.load(path, weights_only=True)
    assert content["found"] == "loss is nan"
    (batch,) = content["batches"]
    assert batch["names"] == ["a.png"]
    assert torch.equal(batch["image"], WINDOW[0]["image"])


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(tmp_path):
    """torch itself tells of a position in the file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_window(tmp_path / "update.pt", WINDOW, [["a.png"]], "loss is nan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
