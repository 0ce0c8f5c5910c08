"""What a look at one image and its mask found: made by sources, remembered and worded by the pre-flight."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class ItemReport:
    """What was found about one item; plain numbers and text, so that they can be stored as JSON."""

    unreadable: str = ""  # the message of what could not be read
    size: str = ""  # "image 640×480, mask 320×240" where they differ
    values: list[int] = field(default_factory=list)  # no class and not ignored; at most 16
    only_0_255: bool = False  # the mask holds 255 and, perhaps, 0, and nothing else
    orientation: int = 1  # EXIF orientation that was applied to the image; 1: none
    frames: int = 1  # of the image's file; the first one is used
    pixels: list[int] = field(default_factory=list)  # of each class
    ignored: int = 0  # pixels

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ItemReport:
        """Return the report that `to_json` wrote."""
        return cls(**json.loads(text))
