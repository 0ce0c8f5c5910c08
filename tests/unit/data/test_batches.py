import numpy as np
import pytest

from segfit.data.batches import EpochSampler, sample_seed


def batches(length=20, size=4, seed=0, epoch=0, **start):
    sampler = EpochSampler(length, size, seed)
    sampler.set_epoch(epoch, **start)
    found = list(sampler)
    assert len(sampler) == len(found)
    return found


def flat(found):
    return [item for batch in found for item in batch]


def indices(found):
    return [index for index, _ in flat(found)]


def test_an_epoch_has_every_image_once():
    assert sorted(indices(batches())) == list(range(20))


def test_it_is_a_pure_function():
    assert batches(epoch=3) == batches(epoch=3)
    assert indices(batches(epoch=3)) != indices(batches(epoch=4))
    assert indices(batches(seed=1)) != indices(batches(seed=2))


def test_no_epoch_disturbs_another():
    sampler = EpochSampler(20, 4, 0)
    first = iter(sampler)
    begun = [next(first)]
    sampler.set_epoch(1)
    assert begun + list(first) == batches(epoch=0)


def test_it_can_start_at_any_batch():
    whole = batches(epoch=2)
    for start in range(6):
        assert batches(epoch=2, start_sample=4 * start) == whole[start:]


def test_it_goes_on_with_another_batch_size_where_it_stopped():
    whole = batches(size=4, epoch=1)
    rest = batches(size=2, epoch=1, start_sample=8)
    assert flat(rest) == flat(whole[2:])
    assert [len(batch) for batch in rest] == [2] * 6


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (10, 4, [4, 4]),
        (9, 4, [4, 4]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
        (4, 4, [4]),
    ],
)
def test_an_incomplete_batch_is_dropped_unless_it_is_all_there_is(length, size, expected):
    assert [len(batch) for batch in batches(length, size)] == expected


def test_nothing_is_left_after_the_last_batch():
    assert batches(3, 4, start_sample=3) == []
    assert batches(10, 4, start_sample=8) == []


def test_dropped_images_differ_between_epochs():
    missing = [set(range(10)) - set(indices(batches(10, 4, epoch=e))) for e in range(5)]
    assert len({frozenset(m) for m in missing}) > 1


def test_seeds_are_spread_and_fit_torch():
    seeds = {sample_seed(s, e, i) for s in range(10) for e in range(10) for i in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 1000 for seed in seeds}) > 990


def test_seeds_of_an_image_do_not_depend_on_its_batch():
    by_four, by_two = dict(flat(batches(size=4))), dict(flat(batches(size=2)))
    assert by_four == by_two


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_each_batch_of_their_sizes_together(world):
    whole = batches(20, 2 * world, epoch=1, start_sample=2 * world)
    shares = []
    for rank in range(world):
        sampler = EpochSampler(20, 2, 0, rank=rank, world_size=world)
        sampler.set_epoch(1, start_sample=2 * world)
        shares.append(list(sampler))
    assert [flat(parts) for parts in zip(*shares, strict=True)] == whole


def test_processes_share_alike_what_is_less_than_a_batch_for_each():
    shares = [list(EpochSampler(5, 4, 0, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batch) for share in shares for batch in share] == [2, 2]
    assert len(set(indices(shares[0]) + indices(shares[1]))) == 4


WEIGHTS = np.array([0, 1, 1, 2, 6, 0.5, 0.25, 1, 1, 7.25])


@pytest.mark.parametrize("repeats", [1, 3])
def test_weights_say_how_often_an_index_comes(repeats):
    sampler = EpochSampler(10, 5, seed=3, weights=WEIGHTS, repeats=repeats)
    expected, total = WEIGHTS / WEIGHTS.sum() * 10, np.zeros(10)
    for epoch in range(200):
        sampler.set_epoch(epoch)
        found = indices(list(sampler))
        assert len({seed for batch in sampler for _, seed in batch}) == len(found) == 10 * repeats
        times = np.bincount(found, minlength=10) / repeats
        assert (np.floor(expected) <= times).all()
        assert (times <= np.ceil(expected)).all()
        total += times
    np.testing.assert_allclose(total / 200, expected, atol=0.1)


def test_weighted_epochs_go_on_where_they_stopped_and_are_shared_by_processes():
    def found(start, **options):
        sampler = EpochSampler(12, 2, seed=3, weights=np.arange(12.0), **options)
        sampler.set_epoch(2, start_sample=start)
        return list(sampler)

    whole = found(0)
    assert found(4) == whole[2:]
    shares = [found(0, rank=rank, world_size=2) for rank in range(2)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == whole
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == 12
