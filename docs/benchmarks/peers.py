"""Train side by side with those whom one might use instead, on the same data, model, loss, optimizer and precision.

    python docs/benchmarks/peers.py [--root ../shared/data/camvid] [--only loop|peers|smp …] [--quick]

loop   what our loop costs: a real training against the bare update, again and again on one batch.
peers  our loop, Lightning's Trainer and transformers' Trainer: the stock model in all, then our fast one in ours.
smp    our SegFormer and segmentation_models.pytorch's: the bare update of both.

Everybody has a process of their own (in `loop`, both share one); one at a time takes a block of steps, in turns, the order rotating. A round is
a block of each; what is compared is compared within a round. `peers` and `smp` need
`pip install -r requirements-peers.txt` (or `make peers-setup`). What is measured is in <out>.json and <out>.md after
each case; a second call continues with the cases that are missing, one with other settings begins again.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from contestants import Contestant, run

SECTIONS = ("loop", "peers", "smp")
NEEDS = {"loop": (), "peers": ("lightning", "accelerate"), "smp": ("segmentation_models_pytorch",)}
PACKAGES = ("segfit", "torch", "transformers", "timm", "lightning", "accelerate")
STEPS = {"b0": 10, "b1": 6, "b2": 4, "b3": 3, "b4": 2, "b5": 2}
SMP_HEAD = {"b0": 256, "b1": 256}  # channels of the paper's head; the larger variants have 768
WARM = 1
BARE = "bare update"  # what others are compared with where it takes part

# contestant → {"facts": {…: …}, "rounds": [[seconds a step, seconds of it waited for data], …]}
Results = dict[str, dict[str, Any]]

# Of everybody. Validation never comes, so that an epoch's end is all that is not counted.
COMMON = (
    "augmentation=none",
    "loss=ce",
    "model.weights=null",
    "scheduler=none",
    "epochs=1000000",
    "val_every=1000000",
    "data.check=off",
    "limit_val_batches=1",
    "accumulate=1",
    "compile=false",
    "loader.workers=null",  # not the number of a recipe
)
STOCK = ("model.fast=false",)
TITLES = {
    "loop": "What the loop costs",
    "peers": "Whole training, the same model",
    "smp": "The update alone, other models",
}


@dataclass(frozen=True)
class Case:
    """One comparison; its first contestant, or the one aside, is what the others are compared with."""

    section: str
    model: str
    precision: str
    contestants: tuple[Contestant, ...]

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"{self.section} {self.model} {self.precision}"


def contestants_of(section: str, model: str, lend: bool) -> tuple[Contestant, ...]:
    """Return who takes part in a section; `lend` lets others keep freed memory as we do."""
    if section == "loop":
        return (
            Contestant("training", "segfit"),
            Contestant(BARE, "segfit", aside=True),
        )
    if section == "peers":
        return (
            Contestant("SegFit, stock model", "segfit", STOCK),
            Contestant("Lightning Trainer", "lightning", STOCK, (("lend", int(lend)),)),
            Contestant("transformers Trainer", "huggingface", STOCK, (("lend", int(lend)),)),
            Contestant("SegFit, fast model", "segfit"),
        )
    alone = ("loader.workers=0",)
    widths = sorted({SMP_HEAD.get(model, 768), 256}, reverse=True)
    others = (
        Contestant(f"smp, head of {width}", "smp", alone, (("width", width),)) for width in widths
    )
    return (Contestant("SegFit", "bare", alone), *others)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return what the command line asks for."""
    models = {"loop": options.models, "peers": options.peer_models, "smp": options.models}
    return [
        Case(section, model, precision, contestants_of(section, model, options.lend))
        for section in options.only
        for model in models[section]
        for precision in options.precisions
    ]


def overrides_of(case: Case, options: argparse.Namespace) -> list[str]:
    """Return the overrides of train.py's config that all contestants of a case share."""
    steps = steps_of(case, options)
    data = (
        ["data=camvid", f"data.root={options.root}"]
        if options.root
        else [
            "data=shapes",
            f"data.train_size={options.batch * 8 * (steps + WARM)}",
            f"data.resolution={max(32, options.side)}",
        ]
    )
    return [
        *COMMON,
        *data,
        f"model=segformer_{case.model}",
        f"precision={case.precision}",
        f"batch_size={options.batch}",
        f"image_size={options.side}",
        "data.cache=disk",
        f"data.cache_dir={options.out.parent / 'cache'}",
        f"report.log_every={steps}",  # one reading of the loss in each block
        *options.overrides,
    ]


def steps_of(case: Case, options: argparse.Namespace) -> int:
    """Return the counted steps of a block."""
    return int(options.steps or STEPS[case.model])


# ----------------------------------------------------------------------------------- measuring


def measure(case: Case, options: argparse.Namespace, context: Any) -> Results:
    """Let everybody take turns."""
    blocks = (WARM, steps_of(case, options))
    shared = overrides_of(case, options)
    pipes: list[Connection] = []
    processes = []
    results: Results = {}
    try:
        for contestant in case.contestants:
            if contestant.aside:
                pipes.append(pipes[-1])
                results[contestant.name] = {**list(results.values())[-1], "rounds": []}
                continue
            pipe, end = context.Pipe()
            process = context.Process(target=run, args=(contestant, shared, blocks, end))
            process.start()
            end.close()
            processes.append(process)
            print(f"{case.name}: {contestant.name} starts", file=sys.stderr, flush=True)
            pipes.append(pipe)
            # One after the other, so that all start up undisturbed.
            results[contestant.name] = {"facts": answer(contestant, pipe), "rounds": []}
        for turn in range(options.rounds + 1):
            print(f"{case.name}: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
            for place in range(len(pipes)):
                index = (place + turn) % len(pipes)
                pipes[index].send("aside" if case.contestants[index].aside else "go")
                seconds, waited = answer(case.contestants[index], pipes[index])
                if turn:  # the first round warms up
                    rounds = results[case.contestants[index].name]["rounds"]
                    rounds.append([seconds, waited])
    finally:
        for pipe in pipes:
            pipe.close()  # whoever waits for "go" ends
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
    return results


def answer(contestant: Contestant, pipe: Connection) -> Any:
    """Return what a contestant says next.

    Raises:
        SystemExit: if it says that it failed, or nothing more.
    """
    try:
        said = pipe.recv()
    except EOFError:
        sys.exit(f"{contestant.name}: its process died. Most likely memory ran out.")
    if isinstance(said, str):
        sys.exit(f"{contestant.name}: {said}")
    return said


# ------------------------------------------------------------------------------------ reporting


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def table(results: Results, batch: int) -> list[str]:
    """Return a Markdown table; times are compared round by round with the first contestant's."""
    first = BARE if BARE in results else next(iter(results))
    reference = [seconds for seconds, _ in results[first]["rounds"]]
    lines = [
        f"| | ms a step (quartiles) | images/s | time against {first} (quartiles) | waited for data | what ran |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        rounds, facts = result["rounds"], result["facts"]
        low, middle, high = (1e3 * value for value in spread([seconds for seconds, _ in rounds]))
        ratios = [mine / theirs for (mine, _), theirs in zip(rounds, reference, strict=True)]
        least, ratio, most = spread(ratios)
        against = "1" if name == first else f"{ratio:.3f} ({least:.3f}–{most:.3f})"
        waited = sum(wait for _, wait in rounds) / sum(seconds for seconds, _ in rounds)
        lines.append(
            f"| {name} | {middle:.1f} ({low:.1f}–{high:.1f}) | {1e3 * batch / middle:.2f} "
            f"| {against} | {100 * waited:.1f} % "
            f"| {facts['model']}, {facts['precision']}, {facts['workers']} workers |"
        )
    return lines


def report(found: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    settings, facts = found["settings"], found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"{facts['device']}, {facts['os']}, Python {facts['python']}; {versions}.",
        "",
        "```sh",
        *found["commands"],
        "```",
    ]
    for section in SECTIONS:
        cases = {name: case for name, case in found["cases"].items() if name.split()[0] == section}
        for name, results in cases.items():
            _, model, precision = name.split()
            first = next(iter(results.values()))
            rounds, threads = len(first["rounds"]), first["facts"]["threads"]
            lines += [
                "",
                f"{TITLES[section]}: {model}, {precision}, {settings['side']} px, batch {settings['batch']}, "
                f"{rounds} rounds, threads: {threads}{', freed memory kept by all' if settings['lend'] else ''}",
                "",
                *table(results, settings["batch"]),
            ]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Return what is installed of the packages that matter."""
    found = {}
    for name in (*PACKAGES, "segmentation-models-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far: those of an earlier call with the same settings, or none."""
    from segfit.system.hardware import machine

    fresh: dict[str, Any] = {
        "settings": {
            "data": options.root or "shapes",
            "side": options.side,
            "batch": options.batch,
            "lend": options.lend,
            "overrides": options.overrides,
        },
        "machine": machine(),
        "versions": versions(),
        "commands": [],
        "cases": {},
    }
    file = options.out.with_suffix(".json")
    if file.exists() and not options.fresh:
        earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if all(earlier.get(key) == fresh[key] for key in ("settings", "machine", "versions")):
            return earlier
        print(f"{file} has other settings, device or versions: beginning again")
    return fresh


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--root", help="folder of CamVid; without it, SegFit's built-in phantoms")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=["b0", "b2"])
    parser.add_argument("--peer-models", nargs="+", choices=list(STEPS), default=["b0"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9, help="that count; one more warms up")
    parser.add_argument("--steps", type=int, help="of a block; default: by the model's size")
    parser.add_argument("--out", type=Path, default=Path("outputs/peers/results"))
    parser.add_argument(
        "--lend", action="store_true", help="others keep freed memory as our loop does (CPU, glibc)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--quick", action="store_true", help="see that it runs: b0, 64 px, 2 rounds"
    )
    parser.add_argument("overrides", nargs="*", help="of train.py's config, for everybody")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models = options.peer_models = ["b0"]
        options.precisions, options.side, options.batch = ["fp32"], 64, 2
        options.rounds, options.steps = 2, 2
    return options


def missing(sections: Iterable[str]) -> list[str]:
    """Return the packages that sections need and that are not installed."""
    needed = {package for section in sections for package in NEEDS[section]}
    return sorted(package for package in needed if importlib.util.find_spec(package) is None)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write down."""
    options = parsed(arguments)
    if absent := missing(options.only):
        sys.exit(
            f"{', '.join(absent)}: not installed. Type: pip install -r requirements-peers.txt. "
            "Or leave them out: --only loop"
        )
    found = begin(options)
    command = shlex.join(["python", "docs/benchmarks/peers.py", *arguments])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    context = starting()
    for case in cases_of(options):
        if case.name in found["cases"] and not options.fresh:
            continue
        results = measure(case, options, context)
        found["cases"][case.name] = results
        if command not in found["commands"]:
            found["commands"].append(command)
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        options.out.with_suffix(".md").write_text(report(found), encoding="utf-8")
        print(f"\n{case.name}\n" + "\n".join(table(results, options.batch)), flush=True)
    print(f"\nWritten to {options.out}.json and .md")


def starting() -> Any:
    """Return how processes are started: forked from one that has imported what takes seconds, where that exists."""
    if platform.system() == "Windows":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["segfit.assembly.training", "segfit.models.segformer"])
    return context


if __name__ == "__main__":
    main(sys.argv[1:])
