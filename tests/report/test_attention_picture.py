"""The picture of what was attended to: shares over the pixels that they are of, and what is drawn where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.extractors.vit import Architecture, VisionTransformer
from mer_jax.extractors.vit_networks import transformer_network
from mer_jax.report.attention_picture import (
    AttentionPicture,
    HeatMap,
    draw_picture,
    heat_colours,
    heat_scale,
    overlay,
    save_picture,
)

GREEN, PURPLE, ORANGE, BLUE = (0, 122, 90), (154, 79, 134), (198, 81, 0), (0, 114, 178)
WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture
def picture():
    shares = np.zeros((3, 2, 2))
    shares[:, 0, 1] = (0.5, 0.8, 0.2)
    return AttentionPicture(
        title="clip_003",
        note="Labels: Positive.",
        crops=np.stack([np.full((40, 40, 3), value, np.uint8) for value in (40, 120, 200)]),
        crop_names=["0", "4", "8"],
        places=np.array([0, 2, 4]),
        heat_maps=[HeatMap("vit", shares, WHOLE)],
        lacking="there are no maps",
        attention={
            "appearance": np.array([[0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1]]),
            "geometry": np.array([[0.2] * 5, [0.2] * 5]),
        },
        marks={},
        label_names=["Negative", "Positive"],
        truth=np.array([0, 1]),
        mean=np.array([0.75, 0.25]),
        spread=np.zeros(2),
        thresholds=np.array([0.5, 0.5]),
        decisions=np.array([True, False]),
        gate={"appearance": 0.75, "geometry": 0.25},
    )


def pixels(picture):
    return np.asarray(draw_picture(picture)).astype(int)


def near(image, colour, tolerance=3):
    return (np.abs(image - np.array(colour)) <= tolerance).all(axis=-1)


def test_colours_are_viridis():
    # Its ends and its middle, as published by van der Walt and Smith (2015).
    expected = [(68, 1, 84), (33, 145, 140), (253, 231, 37)]
    np.testing.assert_allclose(heat_colours(np.array([0.0, 0.5, 1.0])), expected, atol=1)
    np.testing.assert_array_equal(heat_colours(np.array([[-1.0, 7.0]])), heat_colours(np.array([[0.0, 1.0]])))


def test_the_scale_ignores_the_largest_hundredth_and_is_never_0():
    shares = np.full((10, 10, 10), 0.005, np.float16)
    shares[0, 0, 0] = 0.5
    assert heat_scale(shares) == pytest.approx(0.005, rel=1e-3)
    assert heat_scale(np.zeros((1, 2, 2))) > 0


def test_an_overlay_by_hand():
    crop = np.full((8, 8, 3), 100, np.uint8)
    shares = np.array([[0.0, 0.0], [0.0, 0.5]])
    image = overlay(crop, shares, (0.25, 0.0, 0.75, 0.5), 0.5)
    low, high = (0.6 * np.array(heat_colours(np.array(value))) + 40 for value in (0.0, 1.0))
    np.testing.assert_array_equal(image[4:6, 2:4], np.broadcast_to(np.round(high), (2, 2, 3)))
    for rows, columns in ((slice(2, 4), slice(0, 4)), (slice(4, 6), slice(0, 2))):
        np.testing.assert_array_equal(image[rows, columns], np.broadcast_to(np.round(low), image[rows, columns].shape))
    outside = np.ones((8, 8), bool)
    outside[2:6, 0:4] = False
    assert (image[outside] == round(30 + 0.7 * 255)).all()


@pytest.mark.parametrize("shortest_edge, corner, patch", [(20, (10, 15), (20, 20)), (0, (0, 0), (25, 25))])
def test_a_network_s_share_appears_over_the_pixels_that_it_is_of(shortest_edge, corner, patch):
    """From a crop through resizing, centre and patches to a map and back: who looks for red finds the red square."""
    architecture = Architecture(4, 32, 1, 1, 48, (4, 6), "gelu_tanh", "fixed")
    network = transformer_network("red", architecture, (16, 24), load=None, licence="", preprocessing="",
                                  how="bilinear", shortest_edge=shortest_edge)  # fmt: skip
    images = jax.ShapeDtypeStruct((1, 16, 24, 3), jnp.uint8)
    shapes = jax.eval_shape(VisionTransformer(architecture).init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = variables["params"]
    params["embed"]["kernel"] = jnp.zeros((4, 4, 3, 32)).at[:, :, 0, 0].set(1.0).reshape(48, 32)
    params["norm"]["scale"], params["head"]["probe"] = jnp.ones(32), jnp.ones(32)
    params["head"]["query"]["bias"] = jnp.zeros(32).at[0].set(10.0)
    params["head"]["key_value"]["kernel"] = jnp.zeros((32, 64)).at[0, 0].set(1.0)
    variables["constants"] = {"mean": jnp.zeros(3), "std": jnp.ones(3)}

    crop = np.zeros((100, 150, 3), np.uint8)
    top, left = corner[0] + patch[0], corner[1] + 2 * patch[1]  # of the patch in row 1, column 2
    crop[top + 7 : top + patch[0] - 7, left + 7 : left + patch[1] - 7, 0] = 255  # resizing blurs it by 7 pixels
    images, _ = network.prepare(crop[None])
    shares = np.asarray(jax.jit(network.attention)(variables, images))[0]
    assert shares.shape == network.attention_grid == (4, 6)
    assert shares.sum() <= 1 + 1e-5 and shares[1, 2] > 0.9
    area = np.array(network.attention_area((100, 150))) / np.array([100, 150, 100, 150])
    image = overlay(np.zeros_like(crop), shares, area, float(shares.max()))
    expected = np.zeros((100, 150), bool)
    expected[top : top + patch[0], left : left + patch[1]] = True
    np.testing.assert_array_equal(near(image.astype(int), 0.6 * np.array([253, 231, 37])), expected)


def test_frames_and_maps_stand_above_their_positions(picture):
    image = pixels(picture)
    assert image.shape[1] == 1080
    columns = [160, 569, 978]  # middles: 132 wide from 94 to 1044
    for x, value in zip(columns, (40, 120, 200), strict=True):
        assert (image[130:230, x - 60 : x + 60] == value).all()
        high = 0.6 * np.array([253, 231, 37]) + 0.4 * value
        low = 0.6 * np.array([68, 1, 84]) + 0.4 * value
        tile = image[305:345]
        assert near(tile[:, x - 55 : x - 8], low).all()
        if value == 120:
            assert near(tile[:, x + 8 : x + 55], high).all()
    # The curve's peak of 60 % is over the third of five positions, its foot over the first.
    green = near(image[470:640], GREEN, 12)
    rows = {x: np.flatnonzero(green[:, x]) for x in columns}
    assert rows[569].min() < rows[160].min() - 80 and rows[569].size


def test_the_gate_shares_a_bar(picture):
    image = pixels(picture)[-80:, 600:]
    widths = [near(image, colour).any(axis=0).sum() for colour in (GREEN, PURPLE)]
    assert widths[0] / sum(widths) == pytest.approx(0.75, abs=0.02)
    without = pixels(dataclasses.replace(picture, gate={}))[-80:, 600:]
    assert (without == 255).all()


def test_known_phases_are_marked_between_positions(picture):
    marked = dataclasses.replace(picture, marks={"onset": 0.0, "apex": 2.5, "offset": 4.0})
    below = [np.abs(pixels(each)[455:690] - np.array(ORANGE)).sum(axis=-1) < 60 for each in (picture, marked)]
    assert not below[0].any()
    columns = np.flatnonzero(below[1].sum(axis=0) > 80)
    assert [int(part.mean()) for part in np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)] == pytest.approx(
        [160, 671, 978], abs=2
    )


def test_without_maps_their_place_is_one_line(picture):
    with_maps, without = pixels(picture), pixels(dataclasses.replace(picture, heat_maps=[]))
    assert with_maps.shape[0] - without.shape[0] == 22 + 132 + 44 - 30
    assert (without[:250] == with_maps[:250]).all()


def test_one_frame_and_one_member_and_long_words_are_drawn(picture):
    one = dataclasses.replace(
        picture, crops=picture.crops[:1], crop_names=["0"], places=np.array([0]), heat_maps=[],
        attention={"fused": np.ones((1, 1))}, gate={}, marks={"onset": 0.0}, title="name " * 80, note="words " * 90,
        thresholds=None,
    )  # fmt: skip
    image = pixels(one)
    assert (image[:80, -30:] == 255).all()  # the margin stays free


def test_many_positions_leave_the_frames_apart(picture):
    many = dataclasses.replace(
        picture, crops=np.repeat(picture.crops, 3, axis=0), crop_names=[str(2 * place) for place in range(9)],
        places=np.arange(0, 18, 2), heat_maps=[], attention={"appearance": np.full((2, 18), 1 / 18)},
    )  # fmt: skip
    row = (pixels(many)[160] < 210).all(axis=-1)
    starts = np.flatnonzero(np.diff(row.astype(int)) == 1)
    assert len(starts) == 9 and np.ptp(np.diff(starts)) <= 1


def test_it_is_written_as_png(picture, tmp_path):
    from PIL import Image

    save_picture(tmp_path / "new" / "p.png", picture)
    with Image.open(tmp_path / "new" / "p.png") as image:
        assert image.format == "PNG" and image.size[0] == 2160
