"""The largest batch that fits, from as few trials as can be."""

from collections.abc import Callable, Iterable

_GUESSES_IN_A_ROW = 3  # then a step whose gain is sure
_LEAP = 8  # a guess is followed no further than so many times what is known to fit


def largest_that_fits(
    fits: Callable[[int], bool],
    *,
    start: int,
    cap: int,
    guess: Callable[[], int | None] = lambda: None,
) -> int:
    """Return the largest batch of 1 … `cap` that fits, 0 if none does.

    `start` is tried first, or a quarter of it, if that is more than an image, to know what is no longer faster than
    it; from there it doubles while it fits and bisects once something did not. The answer is that of an exhaustive scan
    wherever a smaller batch than one that fits does fit.

    Args:
        fits: tries a batch; asked once for each.
        start: a batch of 1 … `cap` that may be near the answer.
        cap: nothing larger is tried.
        guess: what the trials so far make likely, or None: replaces doubling and bisecting, but never for long.
    """
    low, high = 0, cap + 1  # the largest that fits, the smallest that does not
    batch, guesses = start // 4 if start >= 8 else start, 0
    while high - low > 1:
        if fits(batch):
            low = batch
        else:
            high = batch
        guessed = guess() if guesses < _GUESSES_IN_A_ROW else None
        if low < start < high:
            batch = start
        elif guessed is not None and low > 0:
            batch, guesses = min(max(guessed, low + 1), high - 1, _LEAP * low), guesses + 1
        else:
            batch, guesses = _sure_step(low, high, cap), 0
    return low


def _sure_step(low: int, high: int, cap: int) -> int:
    if high > cap and low > 0:
        return min(2 * low, cap)
    return max(1, (low + high) // 2)


def extrapolated(peaks: Iterable[tuple[int, float]], limit: float) -> int | None:
    """Return the batch whose peak meets `limit`, along the line through the two largest batches.

    Args:
        peaks: (batch, bytes) of batches that fit.
        limit: bytes.

    Returns:
        None with less than two batches, or where more images do not take more bytes.
    """
    largest = sorted(dict(peaks).items())[-2:]
    if len(largest) < 2:
        return None
    (less, less_bytes), (more, more_bytes) = largest
    slope = (more_bytes - less_bytes) / (more - less)
    return int(more + (limit - more_bytes) // slope) if slope > 0 else None
