"""Which settings benchmark=optimize tries."""

import pytest

from segfit.tuning.settings import Setting, best_micro_batch, micro_batches, worker_settings


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
def test_micro_batches_are_tried_while_images_a_second_rise(
    rates: dict[int, float], start: int, best: tuple[int, float] | None, tried: list[int]
) -> None:
    asked: list[int] = []

    def attempt(setting: Setting) -> float | None:
        asked.append(setting.changes["batch_size"])
        assert setting.changes["batch_size"] * setting.changes["accumulate"] == 8
        return rates.get(asked[-1])

    assert best_micro_batch([1, 2, 4, 8], start, 8, attempt) == best
    assert asked == tried


def test_workers_that_run_already_are_not_tried() -> None:
    numbers = [setting.changes["loader.workers"] for setting in worker_settings(4, 4)]
    assert numbers == [2, 0]
    assert [s.changes["loader.workers"] for s in worker_settings(4, 1)] == [1, 0]
