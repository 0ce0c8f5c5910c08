"""Arrays as one run of bytes, and back without a copy."""

from __future__ import annotations

import json
import math

import numpy as np
from numpy.typing import NDArray

from segfit.data.source import Arrays

_ALIGNMENT = 64  # bytes; every array starts at a multiple, counted from the first byte


def pack(arrays: Arrays) -> NDArray[np.uint8]:
    """Return the arrays (any dtype but object, any shape) as uint8 (N,), N a multiple of 64.

    The length of a header (4 bytes, little endian), the header (dtypes and shapes as JSON), then the arrays.
    """
    header = json.dumps([[array.dtype.str, array.shape] for array in arrays]).encode()
    places = [0, _aligned(4 + len(header))]
    for array in arrays:
        places.append(_aligned(places[-1] + array.nbytes))
    content = np.zeros(places[-1], np.uint8)
    content[:4] = np.frombuffer(len(header).to_bytes(4, "little"), np.uint8)
    content[4 : 4 + len(header)] = np.frombuffer(header, np.uint8)
    for array, start in zip(arrays, places[1:], strict=False):
        flat = np.ascontiguousarray(array).reshape(-1)
        content[start : start + array.nbytes] = flat.view(np.uint8)
    return content


def unpack(content: NDArray[np.uint8]) -> Arrays:
    """Return the arrays that `pack` made `content` (N,) of: views of it.

    Raises:
        ValueError, TypeError: if it is nothing that `pack` returns.
    """
    end = 4 + int.from_bytes(content[:4].tobytes(), "little")
    start, arrays = _aligned(end), []
    for dtype, shape in json.loads(content[4:end].tobytes()):
        stop = start + np.dtype(dtype).itemsize * math.prod(shape)
        arrays.append(content[start:stop].view(dtype).reshape(shape))
        start = _aligned(stop)
    return tuple(arrays)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
