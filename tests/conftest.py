"""What every test stands on: no network, no caches but its own, few threads."""

import gc
import os
import signal
import sys
import tempfile

import pytest

# Before anything imports huggingface_hub, which reads them once. Child processes inherit them.
_CACHE = tempfile.TemporaryDirectory(prefix="segfit-tests-", ignore_cleanup_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(_CACHE.name, "huggingface")  # noqa: PTH118
os.environ["XDG_CACHE_HOME"] = os.path.join(_CACHE.name, "xdg")  # noqa: PTH118
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Obey Ctrl-C, and let the processes that tests start obey it, where a job in the background would not."""
    # Of files with few tests, xdist would leave those that run whole commands to the end, and to one process.
    config.option.loadscopereorder = False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what collecting made out of garbage collections: composing a config sets off many, each a look at it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Only where torch is there already: importing it would cost tests seconds that do not need it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
