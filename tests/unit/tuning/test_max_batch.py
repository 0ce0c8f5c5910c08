"""The search finds what an exhaustive scan finds, whatever the guesses are worth."""

import random
from itertools import product

import pytest

from segfit.tuning.max_batch import extrapolated, largest_that_fits


class Machine:
    """Fits batches up to `limit`, and counts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[int] = []

    def __call__(self, batch: int) -> bool:
        self.asked.append(batch)
        return batch <= self.limit


@pytest.mark.parametrize(
    ("limit", "start", "cap"), list(product([0, 1, 2, 3, 7, 8, 33, 99], [1, 2, 8, 31], [1, 5, 40]))
)
def test_the_answer_is_that_of_a_scan(limit: int, start: int, cap: int) -> None:
    machine = Machine(limit)
    assert largest_that_fits(machine, start=min(start, cap), cap=cap) == min(limit, cap)
    assert len(set(machine.asked)) == len(machine.asked)  # nothing is tried twice
    assert all(1 <= batch <= cap for batch in machine.asked)


def test_wrong_guesses_cost_little_and_change_nothing() -> None:
    numbers = random.Random(0)
    for limit, start in product([0, 1, 5, 100, 999], [1, 16, 700]):
        machine = Machine(limit)
        answer = largest_that_fits(
            machine, start=start, cap=1000, guess=lambda: numbers.choice([None, -5, 3, 500, 10**6])
        )
        assert answer == limit
        assert len(machine.asked) <= 60  # four times what doubling and bisecting need


def test_right_guesses_save_trials() -> None:
    for limit in (8, 37, 411, 999):
        machine = Machine(limit)

        def guess(machine: Machine = machine) -> int | None:
            fitting = {batch: 10 + 3 * batch for batch in machine.asked if batch <= machine.limit}
            return extrapolated(fitting, 12 + 3 * machine.limit)

        assert largest_that_fits(machine, start=8, cap=1000, guess=guess) == limit
        assert len(machine.asked) <= 7  # doubling up to 1000 and bisecting takes twice as many
        assert max(machine.asked) <= limit + 1  # little memory is asked for in vain


def test_a_quarter_of_the_start_comes_first() -> None:
    machine = Machine(40)
    largest_that_fits(machine, start=32, cap=1000)
    assert machine.asked[:4] == [8, 32, 64, 48]


def test_extrapolation() -> None:
    assert extrapolated({2: 30.0, 4: 50.0, 1: 0.0}, 100) == 9
    assert extrapolated({4: 50.0, 2: 30.0}, 99.9) == 8
    assert extrapolated({4: 50.0, 8: 50.0}, 100) is None
    assert extrapolated({4: 50.0}, 100) is None
    assert extrapolated({}, 100) is None
