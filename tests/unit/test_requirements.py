"""What requirements-min.txt pins is the oldest of each range."""

import re

from packaging.version import Version

from tests.integration.training import ROOT


def lines(name: str, sign: str) -> dict[str, Version]:
    found = re.findall(rf"^([\w-]+){sign}([\d.]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {package: Version(version) for package, version in found}


def test_the_oldest_of_every_range_is_pinned():
    oldest = lines("requirements.txt", ">=") | lines("requirements-dev.txt", ">=")
    pinned = lines("requirements-min.txt", "={2,3}")
    tools = {"ruff", "mypy"}  # lint alone
    assert pinned == {name: version for name, version in oldest.items() if name not in tools}
