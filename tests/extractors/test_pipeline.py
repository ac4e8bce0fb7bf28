"""One program for all batches: every place gets its features, and they depend on nothing but the image."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.extractors import pipeline
from mer_jax.extractors.pipeline import compile_network, device_memory, local_devices, run

_spec = importlib.util.spec_from_file_location("tiny_networks", Path(__file__).parents[1] / "tiny_networks.py")
tiny_networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_networks)
TINY, SIZE, DIM = tiny_networks.TINY, tiny_networks.SIZE, tiny_networks.DIM
IMAGE = jax.ShapeDtypeStruct((SIZE, SIZE, 3), np.uint8)


@pytest.fixture
def variables():
    return {"params": tiny_networks.random_state()}


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (40, SIZE, SIZE, 3), np.uint8)


def compiled(variables, devices=1, **options):
    return compile_network(TINY, variables, IMAGE, jax.local_devices()[:devices], **options)


def collected(program, arrivals):
    """Place to features; each place once and in order."""
    pairs = [(place + row, rows[row]) for place, rows in run(program, arrivals) for row in range(len(rows))]
    assert [place for place, _ in pairs] == sorted({place for place, _ in pairs})
    return dict(pairs)


@pytest.mark.parametrize("devices", [1, 3])
def test_every_place_gets_the_features_of_its_image(variables, images, devices):
    # Runs of several lengths with gaps between: over a group's edge, a whole group left out, a part of the last one.
    arrivals = [(0, images[:3]), (3, images[3:11]), (13, images[13:14]), (29, images[29:38])]
    found = collected(compiled(variables, devices, batch_size=4), arrivals)
    assert list(found) == [*range(11), 13, *range(29, 38)]
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(TINY.apply)(variables, images))
    for place, features in found.items():
        assert features.shape == (DIM,) and features.dtype == np.float32
        np.testing.assert_allclose(features, expected[place], rtol=1e-5, atol=1e-6)


def test_nothing_arrives(variables):
    assert collected(compiled(variables, batch_size=4), []) == {}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_features_depend_neither_on_the_slot_nor_on_the_neighbours(variables, images, rng, batch_size):
    program = compiled(variables, batch_size=batch_size)
    whole = collected(program, [(0, images)])
    for _ in range(3):
        order = rng.permutation(len(images))
        shuffled = collected(program, [(0, images[order])])
        for place, index in enumerate(order):
            assert shuffled[place].tobytes() == whole[index].tobytes()
    alone = collected(program, [(index, images[index : index + 1]) for index in range(1, len(images), 9)])
    for index, features in alone.items():
        assert features.tobytes() == whole[index].tobytes()


def test_any_number_of_devices_gives_the_same_bits(variables, images):
    one, two, four = (collected(compiled(variables, count, batch_size=4), [(2, images)]) for count in (1, 2, 4))
    for place, features in one.items():
        assert features.tobytes() == two[place].tobytes() == four[place].tobytes()


def test_the_program_is_traced_once_and_images_are_asked_for_as_they_are_needed(variables, images):
    traces, asked = [], []

    def apply(variables, batch):
        traces.append(batch.shape)
        return TINY.apply(variables, batch)

    def arrivals():
        for place, image in enumerate(images):
            asked.append(place)
            yield place, image[None]

    network = dataclasses.replace(TINY, apply=apply)
    program = compile_network(network, variables, IMAGE, jax.local_devices()[:2], batch_size=4)
    results = run(program, arrivals())
    assert next(results)[0] == 0
    # Two steps of two devices, and the image that ended the second.
    assert len(asked) == 2 * 2 * 4 + 1
    assert sum(len(rows) for _, rows in results) == len(images) - 4
    assert traces == [(4, SIZE, SIZE, 3)]


def test_bfloat16_is_close_and_float32_is_exact(variables, images):
    exact = collected(compiled(variables, batch_size=8), [(0, images)])
    close = collected(compiled(variables, batch_size=8, dtype="bfloat16"), [(0, images)])
    exact, close = np.stack(list(exact.values())), np.stack(list(close.values()))
    difference = np.abs(exact - close).max() / np.abs(exact).max()
    assert close.dtype == np.float32 and 1e-5 < difference < 3e-2


def test_float32_multiplies_in_full_precision_where_the_default_is_less(variables, images):
    asked = []

    def apply(variables, batch):
        asked.append(jax.config.jax_default_matmul_precision)
        return TINY.apply(variables, batch)

    network = dataclasses.replace(TINY, apply=apply)
    for dtype in ("float32", "bfloat16"):
        compile_network(network, variables, IMAGE, jax.local_devices()[:1], batch_size=1, dtype=dtype)
    assert asked == ["highest", "default"]


def test_the_batch_is_as_large_as_memory_allows(variables):
    programs = {memory: compiled(variables, memory=memory) for memory in (1, 10**12)}
    assert {memory: program.batch_size for memory, program in programs.items()} == {1: 1, 10**12: 8}
    four = compiled(variables, batch_size=4, memory=1)  # what was asked for is not lessened
    assert four.batch_size == 4
    assert programs[1].bytes_per_device < four.bytes_per_device < programs[10**12].bytes_per_device
    assert compiled(variables, memory=four.bytes_per_device).batch_size == 4
    assert compiled(variables, memory=four.bytes_per_device - 1).batch_size == 2


def test_memory_of_the_machine_is_shared_among_its_processors():
    devices = local_devices()
    assert len(devices) == 4
    one, four = device_memory(devices[0], 1), device_memory(devices[0], 4)
    assert 2**28 < one < 2**50 and four == one // 4


def test_memory_of_an_accelerator_is_its_own():
    class Accelerator:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1000}

    assert device_memory(Accelerator(), 8) == 800


def test_exhausted_memory_is_one_line(variables, images):
    def exhausted(batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes")

    program = dataclasses.replace(compiled(variables, batch_size=4), call=exhausted)
    message = r"^tiny: the device's memory does not suffice for 4 images at once; take --batch_size below 4, or --dtype"
    with pytest.raises(UserError, match=message):
        collected(program, [(0, images)])

    def broken(batch):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        collected(dataclasses.replace(program, call=broken), [(0, images)])


def test_no_device_is_one_line(monkeypatch):
    def absent():
        raise RuntimeError("Unable to initialize backend 'tpu': no chip\nmore")

    monkeypatch.setattr(pipeline.jax, "local_devices", absent)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS='tpu': no such device on this machine \(.*no chip\); install"):
        local_devices()


def test_the_tiny_network_tells_images_apart(variables, images):
    """Otherwise nothing above would show anything."""
    features = np.asarray(TINY.apply(jax.tree.map(jnp.asarray, variables), images))
    assert np.linalg.matrix_rank(features - features.mean(axis=0), tol=1e-3) == DIM
