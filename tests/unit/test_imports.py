"""Imports run one way, as docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "segfit"
LEAVES = {
    "errors", "files", "hardware", "labels", "locks", "monitor", "phases", "processes", "strangers", "streams",
}  # fmt: skip
BUILT = {
    "augmentation", "data", "engine", "losses", "metrics", "models", "optim", "report", "tasks",
}  # fmt: skip

# Room → what it may import of ours, besides itself. A room is a top-level module or package of segfit.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "hardware": set(),
    "labels": set(),
    "locks": {"errors"},
    "strangers": {"errors"},
    "monitor": {"hardware"},
    "phases": set(),
    "processes": set(),
    "streams": set(),
    "config": LEAVES,
    "config_benchmark": {"config"},
    "check": {"config", *LEAVES},
    "runs": {"config", "check", *LEAVES},
    "sweep_jobs": {"runs", *LEAVES},
    "sweep_record": {"runs", "sweep_jobs", *LEAVES},
    "sweep": {"report.leaderboard", "report.text", "runs", "sweep_jobs", "sweep_record", *LEAVES},
    "explain": {"config", "check", *LEAVES},
    "cli": {
        "config",
        "check",
        "explain",
        "sweep",
        "sweep_jobs",
        "sweep_record",
        "engine.out_of_memory",
        *LEAVES,
    },
    "models": LEAVES,
    "data": LEAVES,
    "augmentation": LEAVES,
    "losses": LEAVES,
    "metrics": LEAVES,
    "tasks": {"losses", "metrics", "engine.events", "engine.world", *LEAVES},
    "engine": LEAVES,
    "optim": {"engine", *LEAVES},
    "report": {"engine.events", "engine.checkpoint", *LEAVES},
    "build": {"config", "check", "runs", *BUILT, *LEAVES},
    "trained": {"build", "config", "check", "runs", *BUILT, *LEAVES},
    "training": {"build", "runs", *BUILT, *LEAVES},
    "tuning": {"build", "config", "check", "runs", *BUILT, *LEAVES},
    "export": {"trained", "models", "config", "check", *LEAVES},
    "predictions": {"data", "engine.events", "metrics", "report", *LEAVES},
    "evaluation": {"predictions", "build", "trained", "config", "check", "runs", *BUILT, *LEAVES},
}
WITHOUT_TORCH = (
    "check", "cli", "config", "config_benchmark", "errors", "explain", "files", "hardware", "labels", "locks", "monitor",
    "phases", "processes", "runs", "strangers", "streams", "sweep", "sweep_jobs", "sweep_record",
)  # fmt: skip
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
    allowed = {own, *ALLOWED.get(own, set())}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in imported(node):
            if not name.startswith("segfit."):
                continue
            target = name.removeprefix("segfit.")
            assert any(target == entry or target.startswith(f"{entry}.") for entry in allowed), (
                f"{path.relative_to(SOURCE)}:{node.lineno} imports {name}"  # type: ignore[attr-defined]
            )


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_composing_does_not_import_torch(name: str) -> None:
    top_level = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8")).body
    packages = {entry.split(".")[0] for node in top_level for entry in imported(node)}
    assert not packages & HEAVY
