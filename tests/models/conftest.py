"""What tests of the models share."""

import importlib.util
from pathlib import Path

import pytest

from mer_jax import compiled as compiled_code
from mer_jax.models import cpu_blocks


@pytest.fixture
def compiled():
    """A CPU's own convolutions. Where there is a C++ compiler they must be had; without one there are none to test."""
    if not compiled_code._compiler():
        pytest.skip("no C++ compiler here")
    assert cpu_blocks.version()


@pytest.fixture(scope="session")
def textbook():
    """Blocks by XLA's convolution and JAX's gradients."""
    spec = importlib.util.spec_from_file_location("plain_blocks", Path(__file__).parents[1] / "plain_blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IMPLEMENTATION
