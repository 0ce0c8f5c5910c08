import pytest

from segfit.system import cards


@pytest.fixture(autouse=True)
def _no_nvml_of_other_tests():
    cards.nvml.cache_clear()
    yield
    cards.nvml.cache_clear()
