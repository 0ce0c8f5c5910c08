import json

import pytest

from segfit.system.process import Launch, launched, leave_reason


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch()),
        ({"WORLD_SIZE": "4"}, Launch()),  # some batch systems set it for themselves
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            Launch(rank=5, size=8, local_rank=1, local_size=4),
        ),
    ],
)
def test_a_process_is_one_of_several_where_torchrun_says_so(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_the_reason_is_left_in_the_form_that_torchrun_reads(monkeypatch, tmp_path):
    leave_reason("nobody asks")
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    leave_reason("bad.png: cannot be read")
    message = json.loads(path.read_text())["message"]
    assert message["message"] == "bad.png: cannot be read"
    assert int(message["extraInfo"]["timestamp"]) > 0
