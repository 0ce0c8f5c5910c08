import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from segfit.report.text import duration, hydra_override, number, shown_path


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1:00"),
        (185, "3:05"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (2 * 86400 + 11045, "2 days, 3:04:05"),
        (float("nan"), "–"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_scores_that_do_not_exist_are_a_dash():
    assert [number(value) for value in (None, float("nan"), 0.5)] == ["–", "–", "0.5000"]


@pytest.mark.parametrize(
    "path",
    [
        "outputs/2030-01-31/12-00-00",
        "/data/my runs/a, b (1)",
        "C:\\runs\\last\\",
        "it's",
        "tail\\'s",
        "äöü/ß",
        "10",
        "1e5",
        "null",
        "True",
        "a=b",
        "{x}",
        "$HOME/`x`",
        "~/runs",
        "run",
    ],
)
def test_a_path_survives_the_shell_and_hydra(path):
    (argument,) = shlex.split(hydra_override("run", path))
    override = OverridesParser.create().parse_override(argument)
    assert override.key_or_group == "run"
    assert str(override.value()) == path


def test_an_ordinary_path_is_not_quoted():
    assert hydra_override("run", "outputs/2030/1") == "run=outputs/2030/1"


def test_paths_are_relative_where_they_are_below(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "outputs" / "1") == "outputs/1"
    assert shown_path(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")
