"""What a stranger's pickle would run."""

import os
from pathlib import Path


class Payload:
    """Makes a folder when it is unpickled, as any other command could be run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)
