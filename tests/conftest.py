"""Strict surroundings for every test: four CPU devices, rank promotion raises, warnings are errors."""

import os

# Before JAX is first imported: the tests of sharding need several devices, and none may touch an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
# Some third-party modules read absl flags at import; pytest is no absl app and never parses them.
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def rng(request):
    """A NumPy generator whose seed is the test's own name, so that no test depends on another."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
