"""What README and docs say is true: commands compose, the README's tables are those of conf, links lead somewhere."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from segfit.cli import main as cli
from segfit.system.cards import needs_of
from tests.unit.composing import composed

LAUNCHERS = sorted((cli.CONF / "hydra" / "launcher").glob("*.yaml"))
README = cli.CONF.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
CHINESE = README.with_name("README.zh-CN.md").read_text(encoding="utf-8")
NOTEBOOK = README.parent / "notebooks" / "segfit.ipynb"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def entry_commands() -> list[tuple[str, list[str]]]:
    return [entry for entry in map(parsed, commands()) if entry is not None]


def parsed(line: str) -> tuple[str, list[str]] | None:
    """Return (entry point, arguments) of a command line, None if it starts something else."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["docker", "run"]:
        words = words[words.index("segfit") :]
    if words[:1] == ["torchrun"]:
        words = words[sum(1 for word in words[1:] if word.startswith("--")) :]
    if len(words) < 2 or words[1] not in ("train.py", "evaluate.py", "benchmark.py"):
        return None
    # "…" alone stands for whatever else one types, data.root=… for a folder. hardware=local exists only once
    # benchmark=optimize has written it.
    kept = [word for word in words[2:] if word not in ("…", "hardware=local")]
    return words[1].removesuffix(".py"), [word.replace("…", "folder") for word in kept]


def documented() -> list[tuple[str, list[str]]]:
    """Return the commands of docs that are lines of their own or stand between backticks."""
    found = []
    for path in sorted((README.parent / "docs").rglob("*.md")):
        text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
        lines = re.findall(
            r"^ *(?:[A-Z_]+=\S+ )*((?:python|torchrun --.*) \w+\.py .*)$", text, re.MULTILINE
        )
        inline = [" ".join(code.split()) for code in re.findall(r"`(python \w+\.py [^`]*)`", text)]
        lines += [code for code in inline if "<" not in code]  # hardware=<tier>: each of them
        found += [entry for entry in map(parsed, lines) if entry is not None]
    return found


def single_runs(arguments: list[str]) -> list[list[str]]:
    """Leave out flags; a sweep becomes one list of overrides a job, without what a search draws."""
    overrides = [text for text in arguments if "=" in text]
    if "-m" not in arguments:
        return [overrides]
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            choices.append([str(override.input_line)])
    return [list(job) for job in itertools.product(*choices)]


def test_there_are_commands() -> None:
    assert len(entry_commands()) >= 8
    assert len(documented()) >= 20
    engines = {text for _, arguments in documented() for text in arguments}
    assert {f"hydra/launcher={path.stem}" for path in LAUNCHERS} <= engines
    assert "hparams_search=optuna" in engines
    assert {name for name, _ in documented()} == {"train", "evaluate", "benchmark"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    {str(entry): entry for entry in [*entry_commands(), *documented()]}.values(),
    ids=lambda item: str(item).replace("/", "_"),
)
def test_commands_compose(name: str, arguments: list[str]) -> None:
    for overrides in single_runs(arguments):
        assert composed(*overrides, name=name)


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("tier", ["24gb", "12gb", "8gb", "4gb", "cpu"])
def test_recipe_table_is_conf(tier: str) -> None:
    run = composed(f"hardware={tier}")
    cells = [tier, f"segformer_{run.model.variant}", run.batch_size, run.accumulate]
    cells += [run.image_size, run.epochs, run.lr, run.scheduler.name, run.augmentation.name]
    assert f"| {' | '.join(str(cell) for cell in cells)} |" in TEXT


@pytest.mark.parametrize("tier", ["24gb", "12gb", "8gb", "4gb"])
def test_recipes_of_restoration_need_what_their_page_says(tier: str) -> None:
    run = composed("task=restoration", f"hardware={tier}")
    name = "cnn" + "".join(
        f" {key}={run.model[key]}" * (run.model[key] != usual)
        for key, usual in (("base_channels", 32), ("num_blocks", 4))
    )
    gib = gib_of("restoration", name, 3 * run.patch_size**2, run.batch_size, run.accumulate)
    batch = f"{run.batch_size}" + f" × {run.accumulate} accumulated" * (run.accumulate > 1)
    cells = [run.model.base_channels, run.model.num_blocks, run.patch_size, batch]
    row = " | ".join([*map(str, cells), str(run.loss.perceptual or "–"), f"{gib} GiB |"])
    page = (README.parent / "docs/restoration.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {tier}(, cpu)? \| {re.escape(row)}$", page, re.MULTILINE)
    recipe = (cli.CONF / f"hardware/restoration/{tier}.yaml").read_text(encoding="utf-8")
    assert f"# Needs {gib} GiB by prediction" in recipe


@pytest.mark.parametrize("tier", ["24gb", "12gb", "8gb", "4gb"])
def test_experiments_that_fill_a_card_need_what_their_table_says(tier: str) -> None:
    run, size = composed(f"experiment=fill_{tier}"), tier.removesuffix("gb")
    model = f"segformer_{run.model.variant}"
    gib = gib_of("segmentation", model, 3 * run.image_size**2, run.batch_size, run.accumulate)
    batch = f"{run.batch_size}" + f" × {run.accumulate}" * (run.accumulate > 1)
    row = f"| `fill_{tier}` | {model} | {batch} | {gib} of {size} |"
    assert row in (README.parent / "docs/hardware.md").read_text(encoding="utf-8")
    experiment = (cli.CONF / f"experiment/fill_{tier}.yaml").read_text(encoding="utf-8")
    assert f"# Needs {gib} of {size} GiB by plan" in experiment


def gib_of(task: str, model: str, numbers: int, batch: int, accumulate: int) -> str:
    """Return what cards.json, which benchmark=plan made, says of a training."""
    needs = needs_of(task, model)
    assert needs is not None
    return f"{needs.gib(numbers, batch, accumulate):.1f}"


@pytest.mark.parametrize("text", [TEXT, CHINESE], ids=["english", "chinese"])
def test_links_lead_to_files(text: str) -> None:
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert targets
    missing = [
        target for target in targets if not (README.parent / target.partition("#")[0]).exists()
    ]
    assert missing == []


def shape(text: str) -> dict[str, list[object]]:
    """Return what a translation keeps: headings by level, tables by size, commands, code, links and figures."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return {
        "headings": re.findall(r"^(#+) ", text, re.MULTILINE),
        "commands": [
            [shlex.split(line, comments=True) for line in block.splitlines()] for block in blocks
        ],
        "python": re.findall(r"```python\n(.*?)```", text, re.DOTALL),
        "tables": [[row.count("|") for row in table.splitlines()] for table in tables],
        "links": sorted(re.findall(r"\]\(((?!README)[^)]+)\)", text)),
        "code": sorted(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))),
        "figures": re.findall(r"\*\*([\d.–]+×?)\*\*", text),
    }


def test_the_chinese_readme_says_the_same() -> None:
    english, chinese = shape(TEXT), shape(CHINESE)
    for what, kept in english.items():
        assert chinese[what] == kept, what


def test_the_notebook_types_what_the_readme_does() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
    typed = [parsed(line.strip("!# \n")) for line in lines if re.match(r"(# )?!python", line)]
    assert len(typed) == 5
    # `make demo` is its first command, in a folder with a name of its own
    known = [*entry_commands(), ("train", ["experiment=demo", "name=demo"])]
    run = "outputs/2030-01-31/12-00-00"
    assert [
        entry
        for entry in typed
        if entry not in [(n, [a.replace(run, "last") for a in args]) for n, args in known]
    ] == []
    assert {"cell_type", "metadata", "source", "id"} <= cells[0].keys()


def test_each_row_of_the_fault_table_names_tests_that_are_there():
    text = (README.parent / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    tests = Path(__file__).parents[1]
    for number, named in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", named):
            # A name without a folder lies beside the one before it.
            folder = name.rpartition("/")[0] or folder
            assert (tests / folder / name.rpartition("/")[2]).is_file(), f"row {number}: {name}"
