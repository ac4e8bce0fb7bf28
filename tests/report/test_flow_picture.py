"""The picture of a prediction: colours by hand, and what is drawn where."""

import colorsys
import dataclasses

import numpy as np
import pytest
from PIL import Image

from mer_jax.errors import UserError
from mer_jax.report.flow_picture import FlowPicture, draw_picture, flow_colours, flow_scale, save_picture

BLUE, PALE, ORANGE, GREEN = (0, 114, 178), (156, 195, 220), (198, 81, 0), (0, 122, 90)


@pytest.fixture
def picture():
    right = np.zeros((2, 8, 8, 2), np.float32)
    right[0, ..., 0], right[1, ..., 0] = 2.0, -2.0
    return FlowPicture(
        title="face.mp4",
        note="frames 10 to 14",
        frames=[np.full((8, 8, 3), value, np.uint8) for value in (40, 120, 200)],
        frame_names=["onset", "apex", "offset"],
        flows=right,
        flow_names=["onset to apex", "apex to offset"],
        intensity=np.array([0.0, 1.0, 4.0, 2.0, 0.0]),
        apex=2,
        times=np.arange(5) / 25,
        label_names=["Negative", "Positive"],
        mean=np.array([0.75, 0.25]),
        spread=np.zeros(2),
        thresholds=np.array([0.5, 0.5]),
        decisions=np.array([True, False]),
        stream_names=["u", "v", "m"],
        streams=np.array([[0.5, 0.25, 0.25]]),
        stream_rows=["block 1"],
    )


def pixels(picture):
    return np.asarray(draw_picture(picture)).astype(int)


def is_orange(image):
    """Also where a line is blended with what is beside it; of all that is drawn below the flows only this is so red."""
    return image[..., 0] - image[..., 2] > 60


def near(image, colour, tolerance=3):
    return (np.abs(image - np.array(colour)) <= tolerance).all(axis=-1)


def test_colours_of_the_axes_by_hand():
    flow = np.array([[0, 0], [2, 0], [-2, 0], [0, 2], [0, -2], [1, 0], [9, 0]], float)
    expected = [(255, 255, 255), (255, 0, 0), (0, 255, 255), (128, 255, 0), (128, 0, 255), (255, 128, 128), (255, 0, 0)]
    np.testing.assert_array_equal(flow_colours(flow, 2.0), expected)


def test_colours_are_those_of_hsv(rng):
    flow = rng.normal(size=(50, 2))
    for vector, colour in zip(flow, flow_colours(flow, 3.0), strict=True):
        hue = np.arctan2(vector[1], vector[0]) / (2 * np.pi) % 1.0
        hsv = colorsys.hsv_to_rgb(hue, min(np.hypot(*vector) / 3.0, 1.0), 1.0)
        np.testing.assert_allclose(colour, np.array(hsv) * 255, atol=0.51)


def test_the_scale_ignores_the_largest_hundredth_and_is_never_0():
    flow = np.zeros((1, 20, 20, 2))
    flow[..., 0] = 1.5
    flow[0, 0, 0] = 100.0
    assert flow_scale(flow) == pytest.approx(1.5)
    assert flow_scale(np.zeros((2, 4, 4, 2))) > 0


def test_frames_and_flows_are_shown(picture):
    image = pixels(picture)
    assert image.shape[1] == 1080
    panel = image[120:400]
    for column, value in enumerate((40, 120, 200)):
        left = 36 + column * 342
        assert (panel[:, left + 20 : left + 300] == value).all()
    flows = image[500:700]
    assert near(flows[:, 60:330], (255, 0, 0)).all()  # to the right
    assert near(flows[:, 400:680], (0, 255, 255)).all()  # to the left


def test_bars_are_as_long_as_the_probabilities(picture):
    image = pixels(picture)
    for colour, probability in ((BLUE, 0.75), (PALE, 0.25)):
        columns = np.flatnonzero(near(image[-120:, 150:430], colour).any(axis=0))
        assert np.ptp(columns) + 1 == pytest.approx(probability * 270, abs=3)
    assert 1 <= is_orange(image[-120:, 150:430]).any(axis=0).sum() <= 4  # thresholds
    without = pixels(dataclasses.replace(picture, thresholds=None))
    assert not is_orange(without[-120:, 150:430]).any()


def test_streams_share_their_bar(picture):
    image = pixels(picture)[-120:, 560:]
    widths = [near(image, colour).any(axis=0).sum() for colour in (BLUE, ORANGE, GREEN)]
    total = sum(widths)
    assert [width / total for width in widths] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)


def test_a_stream_without_weight_takes_no_room(picture):
    one = dataclasses.replace(
        picture, streams=np.array([[1.0, 0.0, 0.0], [0.9996, 0.0, 0.0004]]), stream_rows=["1", "2"]
    )
    image = pixels(one)[-120:, 560:]
    assert near(image, BLUE).any() and not near(image, ORANGE).any() and not near(image, GREEN).any()


def test_the_apex_is_marked_where_it_is(picture):
    image = pixels(picture)
    curve = image[790:930]
    marked = np.flatnonzero(is_orange(curve).sum(axis=0) > 60)
    assert marked.mean() == pytest.approx(92 + (1080 - 92 - 36) / 2, abs=2)
    for frame, value in ((0, 0), (1, 1), (3, 2), (4, 0)):  # of 4 px, which are 110 pixels high
        assert near(image[976 - round(110 * value / 4), 92 + 238 * frame], BLUE, 30)


def test_what_the_apex_is_the_largest_of_is_told(picture):
    plain, smoothed = (pixels(dataclasses.replace(picture, smooth=smooth))[836:856] for smooth in (0.0, 1.0))
    differing = np.flatnonzero((plain != smoothed).any(axis=(0, 2)))
    assert 300 < differing[0] < 320 and differing[-1] < 700


def test_what_a_study_lacks_is_left_out(picture):
    short = dataclasses.replace(
        picture, flows=np.zeros((0, 8, 8, 2)), flow_names=[], intensity=None, stream_names=(), streams=None,
        stream_rows=(),
    )  # fmt: skip
    assert pixels(short).shape[0] < pixels(picture).shape[0] - 400
    one = dataclasses.replace(picture, flows=picture.flows[:1], flow_names=picture.flow_names[:1])
    assert pixels(one).shape == pixels(picture).shape


def test_constant_and_long_content_is_drawn(picture):
    still = dataclasses.replace(
        picture, flows=np.zeros((2, 8, 8, 2)), intensity=np.zeros(5), title="name " * 80, note="words " * 90
    )
    image = pixels(still)
    assert near(image[500:700, 60:330], (255, 255, 255)).all()
    assert (image[:80, -30:] == 255).all()  # the margin stays free


def test_it_is_written_as_png_or_refused_in_one_line(picture, tmp_path):
    save_picture(tmp_path / "new" / "p.png", picture)
    with Image.open(tmp_path / "new" / "p.png") as image:
        assert (
            image.format == "PNG" and image.size[0] == 2160 and image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        )
        halved = np.asarray(image.reduce(2)).astype(int)
    assert np.abs(halved - pixels(picture)).mean() < 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"p\.png: cannot be written"):
        save_picture(tmp_path / "file" / "p.png", picture)
