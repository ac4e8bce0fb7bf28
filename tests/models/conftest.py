"""What tests of the models share."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def textbook():
    """Blocks by XLA's convolution and JAX's gradients."""
    spec = importlib.util.spec_from_file_location("plain_blocks", Path(__file__).parents[1] / "plain_blocks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.IMPLEMENTATION
