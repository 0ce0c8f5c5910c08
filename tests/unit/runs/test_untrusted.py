"""Files of a stranger are plain values, or they are refused: nothing runs, and nothing fills the memory."""

import os
import time
from pathlib import Path

import pytest

from segfit.errors import SegFitError
from segfit.runs.untrusted import read_json, read_yaml, refuse_links

REFUSED = {
    "a tag that calls": "a: !!python/object/apply:os.mkdir [{marker}]",
    "a tag that makes": "a: !!python/object/new:os.system [touch {marker}]",
    "an interpolation": "a: ${{oc.env:HOME}}",
    "an interpolation as a key": "${{oc.env:HOME}}: 1",
    "an alias": "a: &x [1]\nb: *x",
    "a billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]",
    "nested too deep": "[" * 1000 + "]" * 1000,
    "nested deep enough for a merge to fail": "a: " + "[" * 40 + "]" * 40,
    "never closed": "[" * 100_000,
    "no YAML": "a: [1",
    "a date that is none": "a: 2001-99-99",
    "a number of 5000 digits": "a: " + "9" * 5000,
    "an unhashable key": "? [1, 2]\n: 1",
    "not UTF-8": b"a: \xff",
    "a control character": b"a: \x00",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused(name, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "config.yaml"
    content = REFUSED[name]
    if isinstance(content, str):
        content = content.format(marker=marker).encode()
    path.write_bytes(content)
    with pytest.raises(SegFitError, match=r"config\.yaml: (refused|not readable)"):
        read_yaml(path)
    assert not marker.exists()


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_a_gigabyte_of_lists_costs_neither_time_nor_memory(read, tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(b"[" * (1 << 20))
        file.truncate(1 << 30)
    start = time.process_time()
    with pytest.raises(SegFitError, match="larger than 1 MiB"):
        read(path)
    assert time.process_time() - start < 5  # parsing a thousandth of it would take longer


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_only_files_of_their_own_are_read(read, tmp_path):
    (tmp_path / "secret").write_text('{"a": 1}')
    for name, target in (("link", tmp_path / "secret"), ("endless", Path("/dev/zero"))):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "endless", "folder", "pipe"):
        with pytest.raises(SegFitError, match=rf"{name}: (refused|not readable)"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, "{", '{"a": 1', "9" * 5000])
def test_json_is_a_mapping(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(SegFitError, match=r"metrics\.json: not readable"):
        read_json(tmp_path / "metrics.json")


def test_links_are_named_all_at_once(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for link in ("train.log", "checkpoints/last.pt"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SegFitError) as error:
        refuse_links(tmp_path, ["config.yaml", "train.log", "checkpoints"])
    assert len(error.value.problems) == 2
    refuse_links(tmp_path, ["config.yaml"])
