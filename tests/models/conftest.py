"""What tests of the models share."""

import pytest

from mer_jax.models import cpu_blocks


@pytest.fixture
def compiled():
    """A CPU's own convolutions. Where there is a C++ compiler they must be had; without one there are none to test."""
    if not cpu_blocks._compiler():
        pytest.skip("no C++ compiler here")
    assert cpu_blocks.available()
