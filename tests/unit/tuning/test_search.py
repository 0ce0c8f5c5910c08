"""Which settings benchmark=optimize tries."""

import pytest

from segfit.tuning.change import Change
from segfit.tuning.search import best_micro_batch, micro_batches


@pytest.mark.parametrize(
    ("effective", "most", "expected"),
    [
        (8, 8, [1, 2, 4, 8]),
        (12, 12, [1, 2, 3, 6, 12]),
        (12, 5, [1, 2, 3]),
        (7, 7, [1, 7]),
        (8, 0, []),
    ],
)
def test_micro_batches_divide_the_effective_batch(
    effective: int, most: int, expected: list[int]
) -> None:
    assert micro_batches(effective, most) == expected


@pytest.mark.parametrize(
    ("rates", "start", "best", "tried"),
    [
        ({1: 1.0, 2: 2.0, 4: 3.0, 8: 2.9}, 1, (4, 3.0), [1, 2, 4, 8]),
        (
            {1: 1.0, 2: 2.0, 4: 1.9, 8: 9.0},
            2,
            (2, 2.0),
            [2, 4, 1],
        ),  # what is past a fall is not seen
        ({1: 5.0, 2: 4.0, 4: 3.0, 8: 2.0}, 4, (1, 5.0), [4, 8, 2, 1]),
        ({1: 1.0, 2: 2.0}, 8, (2, 2.0), [8, 4, 2, 1]),  # the larger ones do not fit
        ({}, 2, None, [2, 1]),
    ],
)
def test_micro_batches_are_tried_while_samples_per_second_rise(
    rates: dict[int, float], start: int, best: tuple[int, float] | None, tried: list[int]
) -> None:
    asked: list[int] = []

    def attempt(change: Change) -> float | None:
        asked.append(change.options["batch_size"])
        assert change.options["batch_size"] * change.options["accumulate"] == 8
        return rates.get(asked[-1])

    assert best_micro_batch([1, 2, 4, 8], start, 8, attempt) == best
    assert asked == tried
