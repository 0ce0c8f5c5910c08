"""What processes that train together agree on, with two real ones; and what one alone does."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import DistBackendError, TCPStore

from segfit.engine.distributed import (
    SINGLE_PROCESS,
    Distributed,
    PeerFailed,
    _is_from_peer,
    refuse_differences,
)
from segfit.errors import SegFitError
from tests.integration.forked import Forked

ROOT = Path(__file__).parents[3]

# What each process finds is printed as JSON.
TOGETHER = """
import json, sys
import numpy as np
import torch
from torch import nn
from segfit.data.cache_stores import RamStore
from segfit.engine.compiling import compiled_or_eager
from segfit.engine.precision import Precision
from segfit.engine.distributed import joined

def kept():
    store = RamStore(1)
    store.put(0, (np.full((2, 2, 3), 7, np.uint8),))
    return store

found = {}
with joined("cpu") as processes:
    rank = processes.rank
    found["sum"] = processes.sum(torch.tensor([1.0, 10.0 * rank])).tolist()
    found["max"] = processes.max(rank, -rank, 5)
    found["gather"] = processes.gather({"rank": rank})
    store = processes.once_a_machine(kept)
    store.blocks[0].numpy()[64] += rank  # the first pixel of the one memory that both see
    processes.gather(None)
    found["shared"] = int(store.get(0)[0][0, 0, 0])
    if rank == 1:
        processes.post("a line")
        processes.post("Zeile zwei: ×")
    processes.gather(None)
    found["posted"] = [processes.posted(), processes.posted()] if processes.is_main else None

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(rank)  # the main process's count
        model[0].running_mean.fill_(1.0 + 2 * rank)
    forward = processes.wrap(model)
    model.eval()
    inputs = torch.tensor([[1.0, 0.0]]) * (1 + rank)
    with processes.no_sync(forward):
        forward(inputs).sum().backward()
    found["own"] = model[1].weight.grad.tolist()
    forward(inputs).sum().backward()
    found["common"] = model[1].weight.grad.tolist()
    found["weight"] = model[1].weight.tolist()
    with torch.no_grad():
        model[0].running_mean.fill_(1.0 + 2 * rank)
    processes.average_buffers(model)
    found["mean"] = model[0].running_mean.tolist()

    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        if rank == 1 and len(graphs) > most:
            raise RuntimeError("no compiler")
        return graph.forward
    compile = torch.compile
    torch.compile = lambda module, mode: compile(module, backend=backend)
    deep = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(3)))  # more than a bucket of 25 MiB
    for most in (9, 0):
        graphs.clear()
        torch._dynamo.reset()
        example, precision = torch.ones(2, 2000), Precision("fp32", "cpu")
        forward, notice = compiled_or_eager(deep, example, precision, processes)
        found["compiled"] = found.get("compiled", []) + [processes.unwrap(forward) is not deep]
        if most:
            found["graphs"] = len(graphs)
            forward(example * rank).sum().backward()
            found["more graphs"] = len(graphs) - found["graphs"]
            # half of what the gradient of ones alone is, in both processes
            found["gradient"] = deep[2].bias.grad.mean().item(), deep[0].weight.grad.norm().item()
del processes, forward  # they hold gloo's threads, which have to end before Python does
print(json.dumps(found))
"""

FAILING = """
import os, signal, sys
from segfit.engine.distributed import joined
from segfit.errors import SegFitError

who, what = int(sys.argv[1]), sys.argv[2]
try:
    with joined("cpu") as processes:
        if who in (processes.rank, 2) and what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if who in (processes.rank, 2):
            raise {"input": SegFitError("a bad file"), "bug": ZeroDivisionError("a bug")}[what]
        processes.max(0)
except Exception as error:
    assert error.__cause__ is not error  # whoever follows the causes would never end
    text = str(error).partition(" without giving")[0]
    print(type(error).__name__, getattr(error, "exit_code", None), text, sep="|")
    sys.exit(3)
"""


def run_two(script: str, *arguments: str) -> "list[tuple[int, str, str]]":
    """Run a script in two processes as torchrun would start them; return exit code and outputs, by rank."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    environment = {**os.environ, **common, **agent, **place}
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "script.py", [Path(folder) / rank for rank in "01"]
        file.write_text(script)
        processes = [
            Forked(
                [str(file), *arguments],
                ROOT,
                {**environment, "RANK": error.name, "LOCAL_RANK": error.name},
                error,
            )
            for error in errors
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        codes = [process.wait() for process in processes]
        return list(zip(codes, outputs, [error.read_text() for error in errors], strict=True))


@pytest.fixture(scope="module")
def found() -> list[dict]:
    results = run_two(TOGETHER)
    assert [code for code, _, _ in results] == [0, 0], results
    return [json.loads(output) for _, output, _ in results]


def test_all_processes_get_the_same_of_all(found):
    for one in found:
        assert one["sum"] == [2.0, 10.0]
        assert one["max"] == [1, 0, 5]
        assert one["gather"] == [{"rank": 0}, {"rank": 1}]


def test_what_one_process_keeps_in_memory_is_everybodys(found):
    assert [one["shared"] for one in found] == [8, 8]


def test_lines_reach_the_main_process_once(found):
    assert found[0]["posted"] == [["a line", "Zeile zwei: ×"], []]


def test_gradients_are_averaged_but_where_they_are_accumulated(found):
    assert [one["weight"] for one in found] == [[[0.0, 0.0]]] * 2
    # Batch norm in evaluation: (inputs - 1) of the main process's mean, which came with its weights.
    assert [one["own"][0] for one in found] == [
        pytest.approx([0.0, -1.0], abs=1e-4),
        pytest.approx([1.0, -1.0], abs=1e-4),
    ]
    for one in found:  # twice the passes of each, averaged over the two
        assert one["common"][0] == pytest.approx([1.0, -2.0], abs=1e-4)


def test_buffers_are_averaged(found):
    assert [one["mean"] for one in found] == [[2.0, 2.0]] * 2


def test_the_compiler_cuts_the_backward_at_buckets_of_gradients(found):
    """With one graph every gradient would come at the end, and nothing of their exchange overlap."""
    for one in found:
        assert one["graphs"] > 1
        assert one["more graphs"] == 0
        assert one["gradient"] == found[0]["gradient"]


def test_where_one_process_cannot_compile_none_does(found):
    assert [one["compiled"] for one in found] == [[True, False]] * 2


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("who", "what", "first", "second"),
    [
        slow("0", "input", (3, "SegFitError|2|a bad file"), (2, "")),
        slow("1", "input", (3, "SegFitError|2|process 1 of 2 ended: a bad file"), (2, "")),
        slow("2", "input", (3, "SegFitError|2|a bad file"), (2, "")),
        (
            "1",
            "bug",
            (3, "SegFitError|1|process 1 of 2 ended: ZeroDivisionError: a bug"),
            (3, "ZeroDivisionError|None|a bug"),
        ),
        slow("2", "bug", (3, "ZeroDivisionError|None|a bug"), (1, "")),
        slow("1", "killed", (3, "SegFitError|1|another process of this training ended"), (-9, "")),
    ],
)
def test_a_failure_ends_all_and_is_reported_once(who, what, first, second):
    results = run_two(FAILING, who, what)
    assert [(code, output.strip()) for code, output, _ in results] == [first, second], results
    assert "Traceback" not in "".join(errors for _, _, errors in results)


def test_alone_nothing_is_shared():
    tensor, model = torch.ones(2), nn.BatchNorm1d(2)
    assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.sum(tensor) is tensor
    assert SINGLE_PROCESS.max(3, 4) == (3, 4)
    assert SINGLE_PROCESS.gather("x") == ["x"]
    assert SINGLE_PROCESS.once_a_machine(lambda: 5) == 5
    assert SINGLE_PROCESS.posted() == []
    assert SINGLE_PROCESS.wrap(model) is model
    before = model.state_dict()
    SINGLE_PROCESS.average_buffers(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Pretended(Distributed):
    """Three processes, of which the others' values are given."""

    size = 3

    def __init__(self, *others: dict) -> None:
        self.others = others

    def gather(self, value):
        return [value, *self.others]


def test_processes_that_differ_raise_with_what_differs_and_what_to_do():
    mine = {"hardware.name": "24gb", "batch_size": 32, "lr": 0.1}
    with pytest.raises(SegFitError) as error:
        refuse_differences(
            Pretended(mine, {"hardware.name": "8gb", "batch_size": 4, "lr": 0.1}), mine
        )
    assert len(error.value.problems) == 2
    assert "batch_size is 32 in process 0, 4 in process 2" in error.value.problems[0]
    assert "Give hardware= on the command line" in error.value.problems[1]


def test_processes_that_are_alike_or_alone_are_fine():
    refuse_differences(Pretended({"a": [1, 2]}, {"a": [1, 2]}), {"a": [1, 2]})
    refuse_differences(SINGLE_PROCESS, {"a": 1})


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.27.5\nLast error:\n{}"


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (PeerFailed(), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (RuntimeError(NCCL.format("remote process exited", "Connection closed by peer")), True),
        (RuntimeError(NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'")), False),
        (DistBackendError(NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)  # fmt: skip
def test_another_process_is_not_blamed_for_the_memory_of_this_one(error, blamed):
    assert _is_from_peer(error) == blamed
