import pytest

from segfit.engine.agreement import refuse_differences
from segfit.engine.distributed import ALONE, World
from segfit.errors import SegFitError


class Pretended(World):
    """Three processes, of which the others' values are given."""

    size = 3

    def __init__(self, *others: dict) -> None:
        self.others = others

    def gather(self, value):
        return [value, *self.others]


def test_processes_that_differ_are_told_what_in_and_what_to_do():
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
    refuse_differences(ALONE, {"a": 1})
