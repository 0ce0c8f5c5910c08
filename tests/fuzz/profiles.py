"""How much is generated: the same examples every time, SEGFIT_FUZZ times as many as a test asks for.

SEGFIT_FUZZ=10 pytest tests/fuzz        5,000 of each and more, in minutes
"""

import os
import tempfile

from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

FACTOR = int(os.environ.get("SEGFIT_FUZZ", "1"))
_HOME = tempfile.TemporaryDirectory(prefix="segfit-fuzz-")
set_hypothesis_home_dir(_HOME.name)


def examples(count: int) -> settings:
    return settings(
        max_examples=count * FACTOR,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
