"""Patches are a function of picture and seed, and a picture is read once for all of them."""

import itertools

import numpy as np
import torch

from segfit.data.batches import EpochSampler
from segfit.data.loader import collate
from segfit.tasks.restoration.data.dataset import HeldOutDataset, TrainDataset
from tests.unit.data.files import noise


class Pictures:
    """Noise; as many arrays a picture as are asked for."""

    def __init__(self, *seeds: int, deep: bool = False) -> None:
        self.seeds, self.deep, self.reads = seeds, deep, 0

    def __len__(self):
        return 3

    def id(self, index):
        return str(index)

    def files(self, index):
        return []

    def read(self, index):
        self.reads += 1
        dtype = "uint16" if self.deep else "uint8"
        return tuple(noise(40, 30, 3, seed=seed, high=256, dtype=dtype) for seed in self.seeds)


def test_the_seed_decides_the_patch():
    dataset = TrainDataset(Pictures(0), 16)
    one, again, other = dataset[0, 5], dataset[0, 5], dataset[0, 6]
    assert one["target"].shape == (3, 16, 16)
    assert torch.equal(one["target"], again["target"])
    assert not torch.equal(one["target"], other["target"])
    assert (one["seed"], one["index"]) == (5, 0)


def test_patches_are_parts_of_the_picture_in_all_eight_turns():
    picture = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30, 1)
    source = Pictures(0)
    source.read = lambda index: (picture,)
    seen = set()
    for seed in range(64):
        patch = TrainDataset(source, 16)[0, seed]["target"][0].numpy().astype(int)
        steps = tuple(int(np.diff(patch, axis=axis).flat[0]) for axis in (0, 1))
        assert len(np.unique(patch)) == 16 * 16
        seen.add(steps)
    assert seen == {
        pair for a, b in itertools.product((-1, 1), (-30, 30)) for pair in ((a, b), (b, a))
    }


def test_both_pictures_of_a_pair_are_cut_alike():
    sample = TrainDataset(Pictures(0, 0), 16)[1, 3]
    assert torch.equal(sample["input"], sample["target"])


def test_a_picture_is_read_once_for_its_patches():
    source = Pictures(0)
    dataset, sampler = TrainDataset(source, 16), EpochSampler(3, 4, seed=1, repeats=4)
    batches = [[dataset[key] for key in batch] for batch in sampler]
    assert source.reads == len(batches) == 3
    assert all(len({sample["index"] for sample in batch}) == 1 for batch in batches)
    assert len({sample["seed"] for batch in batches for sample in batch}) == 12


def test_one_repeat_is_the_order_that_was():
    plain, repeated = EpochSampler(10, 4, seed=3), EpochSampler(10, 4, seed=3, repeats=1)
    assert list(plain) == list(repeated)


def test_a_batch_of_two_depths_has_the_deeper_one():
    batch = collate([TrainDataset(Pictures(0, deep=deep), 16)[0, 1] for deep in (False, True)])
    assert batch["target"].dtype == torch.uint16
    shallow, deep = batch["target"].float().unbind()
    torch.testing.assert_close(shallow, deep * 257)


def test_held_out_pictures_are_degraded_as_floats():
    sample = HeldOutDataset(Pictures(0), lambda clean: clean + 2)[0]
    assert sample["input"].dtype == torch.float32
    torch.testing.assert_close(
        sample["input"] - 2, sample["target"].float() / 255, atol=1e-6, rtol=0
    )
    pair = HeldOutDataset(Pictures(0, 1), lambda clean: clean + 2)[0]
    assert pair["input"].dtype == torch.uint8
