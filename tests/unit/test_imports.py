"""Imports run one way, as docs/architecture.md draws it."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "segfit"
BELOW_TASKS = {"models", "data", "engine", "report"}
COMPOSING = {"config", "runs"}  # what the command line needs of a config, without torch

# Folder of segfit → what it may import of ours, besides itself and errors.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"commands"},  # segfit.load
    "errors": set(),
    "system": set(),
    "models": {"system"},
    "data": {"system"},
    "engine": {"system"},
    "report": {"engine", "runs.files", "system"},
    "tasks": {*BELOW_TASKS, "config", "system"},
    "config": {"system", "tasks"},
    "runs": {"config", "system"},
    "sweeps": {"config", "runs", "engine.findings", "report.text", "report.page", "system"},
    "cli": {"config", "runs", "sweeps", "engine.out_of_memory", "system"},
    "assembly": {"tasks", *BELOW_TASKS, *COMPOSING, "system"},
    "commands": {"assembly", "tasks", *BELOW_TASKS, *COMPOSING, "system"},
    "tuning": {"assembly", "tasks", *BELOW_TASKS, *COMPOSING, "system"},
}
WITHOUT_TORCH = ("cli", "config", "errors", "runs", "sweeps", "system")
HEAVY = {"torch", "torchvision", "timm", "transformers", "kornia", "torchmetrics", "matplotlib"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_every_room_is_in_the_table() -> None:
    assert {room(path) for path in modules()} - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    allowed = {own, "errors", *ALLOWED.get(own, set())}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(node):
            if not name.startswith("segfit."):
                continue
            target = name.removeprefix("segfit.")
            assert any(target == entry or target.startswith(f"{entry}.") for entry in allowed), (
                f"{path.relative_to(SOURCE)}:{node.lineno} imports {name}"  # type: ignore[attr-defined]
            )


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if room(path) in WITHOUT_TORCH],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_composing_does_not_import_torch(path: Path) -> None:
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    packages = {entry.split(".")[0] for node in top_level for entry in imported(node)}
    assert not packages & HEAVY


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_starting_does_not_import_torchmetrics(path: Path) -> None:
    """Its import takes seconds, and nothing needs it before the first validation."""
    if path.match("tasks/*/metrics.py"):
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in imported(node):
            assert not re.match(r"(torchmetrics|segfit\.tasks\.\w+\.metrics)\.", f"{name}.")


NEUTRAL = ("engine", "report", "runs", "sweeps", "system", "data")
OF_A_TASK = re.compile(r"\b(masks?|num_classes|miou|confusion)\b", re.IGNORECASE)


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if room(path) in NEUTRAL],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_what_serves_every_task_speaks_of_none(path: Path) -> None:
    assert not OF_A_TASK.findall(path.read_text(encoding="utf-8"))


def test_the_tree_in_the_docs_is_that_of_the_folders() -> None:
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^      (\w+)(?:/|\.py) ", text, re.MULTILINE)
    there = {room(path) for path in modules()} - {"__init__"}
    assert sorted(named) == sorted(there)
    assert len(there) <= 14
    for folder, line in re.findall(r"^      (\w+)/ +([\w, ]+):", text, re.MULTILINE):
        files = {path.stem for path in (SOURCE / folder).iterdir()}
        assert {name.strip() for name in line.split(",")} <= files, folder
