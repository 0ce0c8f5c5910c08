"""Image and mask files, good and damaged, of which is known whether they may pass."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray
from PIL import Image

NUM_CLASSES = 3
# Suffix → format and the modes that it can hold.
IMAGE_KINDS = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")),
    ".jpg": ("JPEG", ("L", "RGB", "CMYK", "YCbCr")),
    ".tif": ("TIFF", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F")),
    ".bmp": ("BMP", ("1", "L", "P", "RGB", "RGBA")),
    ".webp": ("WEBP", ("RGB", "RGBA")),
}  # fmt: skip
MASK_KINDS = {
    ".png": ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I")),
    ".bmp": ("BMP", ("1", "L", "P", "RGB")),
    ".tif": ("TIFF", ("1", "L", "P", "RGB", "CMYK", "I;16", "I", "F")),
}
_DTYPES = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


@dataclass(frozen=True)
class Pair:
    """An image and its mask as files; `fine`: nothing is wrong with them, None: nobody knows."""

    image: bytes
    mask: bytes
    image_suffix: str
    mask_suffix: str
    image_mode: str
    fine: bool | None


def _encoded(pixels: NDArray[Any], mode: str, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if mode in _DTYPES:
        picture = Image.fromarray(pixels.astype(_DTYPES[mode]))
    elif mode == "P":
        picture = Image.fromarray(pixels.astype(np.uint8), "L")
        picture.putpalette(bytes(range(256)) * 3)
    else:
        picture = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@st.composite
def pictures(draw: Any, height: int, width: int) -> tuple[bytes, str]:
    """Return a photograph of some kind and its suffix."""
    suffix = draw(st.sampled_from(sorted(IMAGE_KINDS)))
    kind, modes = IMAGE_KINDS[suffix]
    mode = draw(st.sampled_from(modes))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    if mode in _DTYPES or mode == "P":
        high = {"I": 2**31 - 1 if kind == "TIFF" else 65536, "I;16": 65536, "F": 2}.get(mode, 256)
        pixels: NDArray[Any] = random.random((height, width)) * high
        if mode == "F" and draw(st.booleans()):
            pixels[0, 0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e38]))
    else:
        pixels = random.integers(0, 256, (height, width, 3))
    options: dict[str, Any] = {}
    if mode == "P" and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255) | st.binary(min_size=256, max_size=256))
    if kind == "TIFF" and mode in ("L", "RGB", "P", "I;16"):
        options["compression"] = draw(
            st.sampled_from([None, "tiff_lzw", "tiff_deflate", "packbits"])
        )
    return _encoded(pixels, mode, kind, **options), suffix


@st.composite
def masks(draw: Any, height: int, width: int, values: list[int]) -> tuple[bytes, str, str]:
    """Return a mask of some of the values, its suffix and mode."""
    suffix = draw(st.sampled_from(sorted(MASK_KINDS)))
    kind, modes = MASK_KINDS[suffix]
    mode = draw(st.sampled_from(modes))
    chosen = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    pixels = random.choice(np.array(chosen), (height, width))
    if mode == "1":
        pixels = (pixels > 0) * 255  # saved as 0 and 1
    if mode in ("RGB", "RGBA") and draw(st.booleans()):
        pixels = random.integers(0, 256, (height, width, 3))  # colours, not indices
        mode = "colours"
    return (
        _encoded(pixels, {"colours": "RGB"}.get(mode, mode), kind),
        suffix,
        mode,
    )


def _with_orientation(data: bytes, orientation: int) -> bytes:
    """Return a JPEG or PNG that says that it lies on its side, or something that is no orientation."""
    picture = Image.open(io.BytesIO(data))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, picture.format, exif=exif)
    return buffer.getvalue()


@st.composite
def good_pairs(draw: Any) -> Pair:
    """Return an image and a mask with which nothing is wrong."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    image, image_suffix = draw(pictures(height, width))
    if image_suffix in (".jpg", ".png") and draw(st.booleans()):
        orientation = draw(st.integers(0, 9))
        image = _with_orientation(image, orientation)
        if 5 <= orientation <= 8:
            height, width = width, height
    allowed = [0, 1, 2, 255]
    mask, mask_suffix, _ = draw(
        masks(height, width, allowed).filter(lambda m: m[2] not in ("F", "CMYK", "colours"))
    )
    image_mode = draw(st.sampled_from(["rgb", "gray"]))
    return Pair(image, mask, image_suffix, mask_suffix, image_mode, fine=True)


@st.composite
def bad_pairs(draw: Any) -> Pair:
    """Return a pair whose mask holds what is no class, has another size, or is no mask."""
    pair = draw(good_pairs())
    with Image.open(io.BytesIO(pair.image)) as picture:
        width, height = picture.size
        if picture.getexif().get(0x0112) in (5, 6, 7, 8):
            height, width = width, height
    fault = draw(st.sampled_from(["value", "size", "colours", "float", "nothing", "text"]))
    if fault == "value":
        mode = draw(st.sampled_from(["L", "I;16", "I", "P"]))
        high = {"L": 254, "P": 254, "I;16": 65535, "I": 2**31 - 1}[mode]
        pixels = np.zeros((height, width))
        pixels[-1, -1] = draw(st.integers(NUM_CLASSES, high).filter(lambda v: v != 255))
        suffix = ".png" if mode != "I" else ".tif"
        mask = _encoded(pixels, mode, "PNG" if mode != "I" else "TIFF")
    elif fault == "size":
        suffix, more = ".png", draw(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any))
        mask = _encoded(np.zeros((height + more[0], width + more[1])), "L", "PNG")
    elif fault == "colours":
        pixels = np.zeros((height, width, 3))
        pixels[0, 0] = draw(st.sampled_from([(0, 0, 1), (255, 0, 0), (1, 2, 3)]))
        suffix, mask = ".png", _encoded(pixels, "RGB", "PNG")
    elif fault == "float":
        suffix, mask = ".tif", _encoded(np.full((height, width), 0.5), "F", "TIFF")
    else:
        suffix, mask = ".png", b"" if fault == "nothing" else b"<svg></svg>"
    return Pair(pair.image, mask, pair.image_suffix, suffix, pair.image_mode, fine=False)


def _bomb(data: bytes, size: tuple[int, int]) -> bytes:
    """Return a PNG whose header promises another size, with the right check sum; else the data as they are."""
    if data[12:16] != b"IHDR":
        return data
    header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _damaged(data: bytes) -> SearchStrategy[bytes]:
    def patch(at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    anywhere = st.integers(0, max(len(data) - 1, 0))
    head = st.integers(0, min(64, max(len(data) - 1, 0)))
    size = st.integers(0, 2**31)
    return st.one_of(
        anywhere.map(lambda end: data[:end]),
        st.builds(patch, head, st.binary(min_size=1, max_size=4)),
        st.builds(patch, anywhere, st.binary(min_size=1, max_size=8)),
        st.builds(patch, head, st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff"])),
        st.tuples(size, size).map(lambda wanted: _bomb(data, wanted)),
        st.tuples(st.integers(1, 3000), st.integers(1, 3000)).map(
            lambda wanted: _bomb(data, wanted)
        ),
        st.binary(max_size=200),
        st.binary(max_size=20).map(lambda more: data + more),
    )


@st.composite
def damaged_pairs(draw: Any) -> Pair:
    """Return a pair of which one file or both are damaged, or called what they are not."""
    pair = draw(good_pairs())
    which = draw(st.sampled_from(["image", "mask", "both"]))
    image = draw(_damaged(pair.image)) if which != "mask" else pair.image
    mask = draw(_damaged(pair.mask)) if which != "image" else pair.mask
    suffix = (
        pair.image_suffix if draw(st.integers(0, 3)) else draw(st.sampled_from(sorted(IMAGE_KINDS)))
    )
    return Pair(image, mask, suffix, pair.mask_suffix, pair.image_mode, fine=None)


# ---------------------------------------------------------------------------------------- tables

_NUMBERS = st.integers(-5, 200) | st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**40])
_CELLS = st.sampled_from([
    "", "a", "b", "cell", "wall", "background", "nan", "1 5", "1 5 9 2", "1", "x y", "1.5 2", "1 5 ", "\u0661 5", "1_0 5",
    "0 5", "1 0", "1 -5", "143 2", "144 1", "145 1", '"', "\0", "\udcff", "é", "a,b", "1\n5", "=1+1", " ",
]) | st.lists(_NUMBERS, max_size=6).map(lambda runs: " ".join(map(str, runs)))  # fmt: skip


def tables() -> SearchStrategy[bytes]:
    """Return a CSV of run-lengths for the images a and b, 12×12 pixels, right or wrong."""
    row = st.lists(_CELLS, max_size=4).map(",".join)
    true_row = st.tuples(
        st.sampled_from(["a", "b"]), st.sampled_from(["cell", "wall"]), _CELLS
    ).map(",".join)
    header = st.sampled_from(
        ["id,class,segmentation"] * 6 + ["segmentation,id,class,more", "id,class", "", "id;class;x"]
    )
    text = st.tuples(header, st.lists(true_row | true_row | row, max_size=6)).map(
        lambda parts: "\n".join([parts[0], "a,cell,1 5", "b,wall,", *parts[1]])
    )
    encoding = st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])
    encoded = st.builds(lambda t, e: t.encode(e, "surrogatepass"), text, encoding)
    return encoded | encoded | st.binary(max_size=60)
