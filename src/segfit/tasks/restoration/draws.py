"""Random numbers on the device, each a function of its sample's seed and its own place alone.

torch's generators draw for a whole batch, so that a sample's numbers depend on who else is in it, and to seed one for
each sample would make the host wait. Here a counter is hashed (SplitMix64, Steele et al., OOPSLA 2014): the device
computes all numbers of a batch at once, the same in whatever batch, and nothing waits.
"""

import math

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """Return what int64 holds for an unsigned number of 64 bits."""
    return number - (1 << 64) if number >> 63 else number


_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
_BITS = 24  # of a float32's mantissa
_MASK = (1 << _BITS) - 1


def _mix(state: Tensor) -> Tensor:
    """Hash int64 numbers in place."""
    for shift, factor in _ROUNDS:
        # int64 shifts copies of the sign in from the left, which the mask takes away
        state ^= (state >> shift).bitwise_and_((1 << 64 - shift) - 1)
        state *= factor
    return state


def bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` int64 of 64 random bits each for `(B,)` int64 seeds; another stream, other numbers."""
    start = _mix(seeds + _signed(_STEP * (stream + 1) % 2**64))
    return _mix(start[:, None] + _signed(_STEP) * torch.arange(count, device=seeds.device))


def uniforms(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` float32, uniform in (0, 1]; arguments as for `bits`."""
    return (bits(seeds, count, stream) & _MASK).float().add_(0.5).mul_(2.0**-_BITS)


def normals(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` float32, normal with mean 0 and variance 1; arguments as for `bits`.

    By Box and Muller: a hash gives two uniform numbers, and these two normal ones.
    """
    drawn = bits(seeds, -(-count // 2), stream)
    angle = (drawn & _MASK).float().mul_(2 * math.pi * 2.0**-_BITS)
    radius = (drawn >> 64 - _BITS).bitwise_and_(_MASK).float().add_(0.5).mul_(2.0**-_BITS)
    radius = radius.log_().mul_(-2).sqrt_()
    return torch.cat((radius * angle.cos(), angle.sin_().mul_(radius)), 1)[:, :count]
