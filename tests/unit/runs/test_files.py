"""Untrusted files are plain values, or they are refused: nothing in them runs."""

import pytest

from segfit.errors import SegFitError
from segfit.runs.files import read_json, read_yaml

REFUSED = {
    "a tag that calls": "a: !!python/object/apply:os.mkdir [{marker}]",
    "a tag that makes": "a: !!python/object/new:os.system [touch {marker}]",
    "an interpolation": "a: ${{oc.env:HOME}}",
    "a hidden interpolation": 'a: "\\x24{{oc.env:HOME}}"',
    "an interpolation as a key": "${{oc.env:HOME}}: 1",
    "nested too deep": "[" * 1000 + "]" * 1000,
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
    with pytest.raises(SegFitError, match=r"config\.yaml: not readable"):
        read_yaml(path)
    assert not marker.exists()


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_what_is_no_file_is_refused(read, tmp_path):
    with pytest.raises(SegFitError, match="not readable"):
        read(tmp_path)


def test_a_file_that_is_not_there_is_an_empty_mapping(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "nothing")
    assert read_json(tmp_path / "nothing") == {}


@pytest.mark.parametrize("text", ["[1, 2]", "[" * 100_000, "{", '{"a": 1', "9" * 5000])
def test_json_is_a_mapping(text, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(SegFitError, match=r"metrics\.json: not readable"):
        read_json(tmp_path / "metrics.json")
