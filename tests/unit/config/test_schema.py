"""The recipes are the published ones, and no option is undocumented or dead."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from segfit.cli import main as cli
from segfit.config import schema as config
from segfit.system.cards import Gpu
from segfit.tasks.restoration import schema as restoration
from segfit.tasks.segmentation import schema as segmentation
from segfit.tasks.segmentation.data import schema as masks
from tests.unit.composing import composed

SOURCE = Path(config.__file__).parents[1]
SCHEMAS = [
    item
    for module in (config, segmentation, masks, restoration)
    for item in vars(module).values()
    if isinstance(item, type) and is_dataclass(item)
]

# tier → model, batch, px, epochs, lr, scheduler, accumulate, workers, as published
RECIPES = {
    "24gb": ("b5", 32, 288, 100, 3e-4, "cosine", 1, None),
    "12gb": ("b4", 8, 288, 100, 3e-4, "cosine", 1, None),
    "8gb": ("b2", 4, 256, 100, 3e-4, "cosine", 1, None),
    "4gb": ("b0", 2, 224, 50, 2e-4, "none", 4, None),
    "cpu": ("b0", 1, 224, 5, 3e-4, "none", 1, 4),
}


@pytest.mark.parametrize("tier", RECIPES)
def test_recipes_are_the_published_ones(tier: str) -> None:
    run = composed(f"hardware={tier}")
    assert run.hardware.name == tier
    assert RECIPES[tier] == (
        run.model.variant,
        run.batch_size,
        run.image_size,
        run.epochs,
        run.lr,
        run.scheduler.name,
        run.accumulate,
        run.loader.workers,
    )


def test_auto_is_the_recipe_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cli, "visible_gpus", lambda: [Gpu(11.6, "")])
        cli.setup()
        assert composed() == composed("hardware=12gb")
        assert composed().model.variant == "b4"
    cli.setup()


def test_auto_leaves_room_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cli, "visible_gpus", lambda: [Gpu(15.0, "")])  # a T4
        cli.setup()
        run = composed()
    cli.setup()
    assert (run.hardware.name, run.model.variant) == ("24gb", "b5")
    assert (run.batch_size, run.accumulate) == (16, 2)
    assert "batch_size=16 accumulate=2 instead of 32 and 1" in run.hardware.note


def test_the_command_line_wins_over_experiment_and_recipe() -> None:
    run = composed("experiment=b4_288", "model=cnn", "hardware=4gb", "image_size=64")
    assert (run.model.name, run.hardware.name, run.image_size) == ("cnn", "4gb", 64)


def test_an_experiment_wins_over_the_recipe() -> None:
    run = composed("experiment=demo")
    assert (run.model.name, run.hardware.name, run.scheduler.name) == ("cnn", "cpu", "cosine")


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [("b0_224", ("b0", 224)), ("b2_256", ("b2", 256)), ("b4_288", ("b4", 288))],
)
def test_the_progression(experiment: str, expected: tuple[str, int]) -> None:
    run = composed(f"experiment={experiment}")
    assert (run.model.variant, run.image_size) == expected


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_option_has_help(schema: Any) -> None:
    inherited = {
        item.name for base in schema.__mro__[1:] if is_dataclass(base) for item in fields(base)
    }
    for item in fields(schema):
        nested = "Config" in str(item.type)
        if nested or item.name in inherited:  # a sub-class only fixes another default
            continue
        assert item.metadata.get("help", "").endswith((".", "…", "]")), item.name


def test_no_option_is_dead() -> None:
    read: set[str] = set()
    for path in [*SOURCE.rglob("*.py"), *SOURCE.parents[1].glob("*.py")]:
        if path.name == "schema.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.add(node.value)
            elif isinstance(node, ast.arg):
                read.add(node.arg)  # _call(f, **section) fills parameters of these names
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                read.add(node.target.id)
    options = {item.name for schema in SCHEMAS for item in fields(schema)}
    assert options - read == set()
