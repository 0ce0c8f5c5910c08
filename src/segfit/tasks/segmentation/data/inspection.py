"""What a look at one image and its mask found: made by sources, remembered and worded by the pre-flight."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class ItemReport:
    """What was found about one item; plain numbers and text, so that they can be stored as JSON.

    Args:
        unreadable: the message of what could not be read, or "".
        size: "image 640×480, mask 320×240" where they differ, or "".
        values: mask values that are no class and not ignored; at most 16 of them.
        only_0_255: the mask holds 255 and, perhaps, 0, and nothing else.
        orientation: EXIF orientation that was applied to the image; 1: none.
        frames: of the image's file; the first one is used.
        pixels: pixels of each class.
        ignored: pixels that are ignored.
    """

    unreadable: str = ""
    size: str = ""
    values: list[int] = field(default_factory=list)
    only_0_255: bool = False
    orientation: int = 1
    frames: int = 1
    pixels: list[int] = field(default_factory=list)
    ignored: int = 0

    def to_json(self) -> str:
        """Return one line of JSON, without what is at its default."""
        default = ItemReport()
        items = asdict(self).items()
        return json.dumps({key: value for key, value in items if value != getattr(default, key)})

    @classmethod
    def from_json(cls, text: str) -> ItemReport:
        """Return the report that `to_json` wrote."""
        return cls(**json.loads(text))
