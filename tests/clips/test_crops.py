import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.data import astronaut

from mer_jax.clips.crops import Box, CropConfig, FaceSearch, crop_clip, face_box
from mer_jax.clips.faces import Detection, FaceDetector
from mer_jax.errors import UserError


class FixedDetector:
    """Sees the same face in every image and keeps what it was shown."""

    def __init__(self, detection):
        self.detection = detection
        self.shown = []

    def detect(self, image):
        self.shown.append(image)
        return self.detection


def box_of(relative_box, height, width, **config):
    detector = FixedDetector(None if relative_box is None else Detection(relative_box, 0.75))
    return face_box([np.zeros((height, width, 3), np.uint8)], CropConfig(**config), detector)


def edges(box):
    return box.left, box.top, box.left + box.width, box.top + box.height


@pytest.mark.parametrize(
    ("relative_box", "expected"),
    [
        # In a view 200 wide, 100 high. x 20.74 -> 20, y 20.3 -> 20, width 70.98 -> 70, height 45.7 -> 45;
        # centre 20 + 35, 20 + 22; scaled 105, 67.5 -> 67; halves 52 and 33.
        ((0.1037, 0.203, 0.3549, 0.457), (3, 9, 107, 75)),
        # x -1.9 -> -1 (towards zero), y 50.9 -> 50, width 41.9 -> 41, height 39.9 -> 39; centre -1 + 20, 50 +
        # 19; scaled 61.5 -> 61, 58.5 -> 58; halves 30 and 29; left 19 - 30 is cut to 0.
        ((-0.0095, 0.509, 0.2095, 0.399), (0, 40, 49, 98)),
        # x 160, y 70, width 50, height 40; centre 185, 90; halves 37, 30; right 222 and bottom 120 are cut.
        ((0.8, 0.7, 0.25, 0.4), (148, 60, 200, 100)),
    ],
)
def test_released_box_by_hand(relative_box, expected):
    box = box_of(relative_box, 100, 200, square=False)
    assert edges(box) == expected
    assert (box.found, box.score) == (True, 0.75)


@pytest.mark.parametrize(
    ("relative_box", "expected"),
    [
        # 20 .. 60 by 30 .. 60 in 200 x 100: side 1.5 * 40 = 60 about (40, 45).
        ((0.1, 0.3, 0.2, 0.3), (10, 15, 70, 75)),
        # About (20, 45) the square leaves the image on the left, about (190, 90) on the lower right: it is
        # moved.
        ((0.0, 0.3, 0.2, 0.3), (0, 15, 60, 75)),
        ((0.9, 0.8, 0.1, 0.2), (170, 70, 200, 100)),
        # 1.5 * 80 = 120 is more than the height.
        ((0.1, 0.1, 0.3, 0.8), (0, 0, 100, 100)),
    ],
)
def test_square_box_by_hand(relative_box, expected):
    assert edges(box_of(relative_box, 100, 200)) == expected


relative = st.floats(-0.5, 1.5)


@settings(deadline=None)
@given(
    relative_box=st.tuples(relative, relative, st.floats(-0.1, 2), st.floats(-0.1, 2)),
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    scale=st.floats(0.2, 4),
    square=st.booleans(),
)
def test_box_is_inside_the_image(relative_box, height, width, scale, square):
    box = box_of(relative_box, height, width, square=square, scale=scale)
    left, top, right, bottom = edges(box)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert all(isinstance(edge, int) for edge in edges(box))
    if square:
        assert box.width == box.height
    x, y, w, h = relative_box
    if box.found and square:
        side = scale * max(w * width, h * height)
        assert box.width == pytest.approx(np.clip(side, 1, min(height, width)), abs=0.5)
        # The centre stays unless the square would leave the image, and then it moves no further than needed.
        for low, length, centre, extent in (
            (left, box.width, (x + w / 2) * width, width),
            (top, box.height, (y + h / 2) * height, height),
        ):
            assert low == pytest.approx(np.clip(centre - length / 2, 0, extent - length), abs=0.51)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize(
    "relative_box",
    [None, (1.2, 0.1, 0.3, 0.3), (-0.9, 0.1, 0.3, 0.3), (0.2, 0.2, 0.0, 0.4), (0.2, 0.2, 0.4, -0.1)],
)
def test_no_face_or_none_in_the_image(relative_box, square):
    assert box_of(relative_box, 60, 100, square=square) == Box(20, 0, 60, 60, found=False, score=0.0)
    assert box_of(relative_box, 101, 60, square=square) == Box(0, 20, 60, 60, found=False, score=0.0)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1600, 1200, (0, 400, 1200, 1600)),
        (2000, 1500, (0, 400, 1200, 1600)),
        (1000, 700, (0, 400, 700, 1000)),
    ],
)
def test_released_fallback(height, width, expected):
    box = box_of(None, height, width, fallback="released")
    assert edges(box) == expected
    assert not box.found


def test_released_fallback_outside_the_image():
    with pytest.raises(UserError, match=r"200 x 400 pixels; use crop fallback 'centre'"):
        box_of(None, 400, 200, fallback="released")


@pytest.mark.parametrize("bgr", [False, True])
def test_what_the_detector_is_shown(rng, bgr):
    view = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    detector = FixedDetector(None)
    face_box([view], CropConfig(bgr=bgr), detector)
    (shown,) = detector.shown
    np.testing.assert_array_equal(shown, cv2.cvtColor(view, cv2.COLOR_RGB2BGR) if bgr else view)


def test_box_of_a_real_face():
    """The photograph's face is where a human sees it, and is missing where there is none."""
    picture = astronaut()
    with FaceDetector() as detector:
        square = face_box([picture], CropConfig(), detector)
        released = face_box([picture], CropConfig(square=False), detector)
        bgr = face_box([picture], CropConfig(bgr=True), detector)
        none = face_box([np.zeros_like(picture)], CropConfig(), detector)
    # The detector's box is (173.7, 67.8) and 103.9 each way.
    assert edges(square) == (148, 42, 304, 198)
    # Ints 173, 67, 103, 103; centre 224, 118; 154 each way.
    assert edges(released) == (147, 41, 301, 195)
    assert square.found and released.found and bgr.found
    assert square.score == pytest.approx(0.912, abs=2e-3)
    assert bgr.score != square.score
    assert none == Box(0, 0, 512, 512, found=False, score=0.0)


class ScriptedDetector:
    """Sees a given face, or none, in each image in turn."""

    def __init__(self, *detections):
        self.detections = iter(detections)

    def detect(self, image):
        return next(self.detections)


def views(count, height=100, width=200):
    return (np.zeros((height, width, 3), np.uint8) for _ in range(count))


SMALL, LARGE = Detection((0.1, 0.3, 0.2, 0.3), 0.9), Detection((0.2, 0.3, 0.2, 0.4), 0.7)


def test_the_largest_face_of_all_frames_is_kept():
    # 40 .. 80 by 30 .. 70 in 200 x 100: side 1.5 * 40 = 60 about (60, 50). The wide one is longer (a side of 90
    # after it has grown) but smaller: 60 x 20 against 40 x 40.
    wide = Detection((0.1, 0.3, 0.3, 0.2), 0.95)
    config = CropConfig(rule="largest")
    box = face_box(views(5), config, ScriptedDetector(SMALL, None, LARGE, wide, None))
    assert (edges(box), box.found, box.score) == ((30, 20, 90, 80), True, 0.7)
    # Of two faces of one size the earlier, and a face outside the frame is none.
    outside, later = Detection((1.5, 0.1, 0.9, 0.9), 0.99), Detection((0.4, 0.3, 0.2, 0.4), 0.8)
    assert face_box(views(3), config, ScriptedDetector(outside, LARGE, later)) == box
    assert face_box(views(1), config, ScriptedDetector(SMALL)) == face_box(views(1), CropConfig(), FixedDetector(SMALL))


def test_no_face_in_any_frame_is_the_fallback():
    box = face_box(views(2), CropConfig(rule="largest"), ScriptedDetector(None, Detection((1.2, 0.1, 0.3, 0.3), 0.9)))
    assert box == Box(50, 0, 100, 100, found=False, score=0.0)


def test_the_first_frame_alone_is_asked_for():
    frames = views(3)
    assert face_box(frames, CropConfig(), ScriptedDetector(SMALL)).score == SMALL.score
    assert len(list(frames)) == 2
    search = FaceSearch(CropConfig(), ScriptedDetector(SMALL))
    for view in views(3):
        search.look(view)
    assert search.box().score == SMALL.score


@pytest.mark.parametrize("rule", ["first", "largest"])
def test_no_frames_to_search(rule):
    with pytest.raises(UserError, match="no frames to look for a face in"):
        face_box([], CropConfig(rule=rule), FixedDetector(None))


def test_settings_of_the_first_rule_are_those_of_older_data_sets():
    older = {"scale": 1.5, "square": True, "size": 1024, "min_confidence": 0.005, "fallback": "centre", "bgr": False}
    assert CropConfig().settings() == older
    assert CropConfig(rule="largest").settings() == older | {"rule": "largest"}


@pytest.mark.parametrize("size", [17, 64, 300])
def test_crop_as_pillow_crops(size):
    frames = [np.ascontiguousarray(astronaut()[:, ::step]) for step in (1, -1)]
    box = Box(140, 30, 160, 121, found=True, score=1.0)
    crops = crop_clip(iter(frames), box, size)
    assert crops.shape == (2, size, size, 3)
    assert crops.dtype == np.uint8
    for frame, crop in zip(frames, crops, strict=True):
        reference = Image.fromarray(frame).crop((140, 30, 300, 151)).resize((size, size), Image.LANCZOS)
        np.testing.assert_array_equal(crop, np.asarray(reference))


def test_crop_keeps_geometry():
    """A linear ramp stays linear: pixel centres, not pixel corners, are what the resize aligns."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    (crop,) = crop_clip([ramp], Box(40, 10, 80, 80, found=True, score=1.0), 160)
    expected = 40 + (np.arange(160) + 0.5) / 2 - 0.5
    # Away from the crop's border, where Lanczos sees only one side.
    np.testing.assert_allclose(crop[80, 8:-8, 0], expected[8:-8], atol=1)


def test_nothing_outside_the_box_enters():
    frame = np.full((60, 60, 3), 255, np.uint8)
    frame[20:40, 20:40] = 100
    assert (crop_clip([frame], Box(20, 20, 20, 20, found=True, score=1.0), 64) == 100).all()


def test_view_without_copy_is_cropped_alike():
    picture = astronaut()
    box = Box(10, 20, 50, 60, found=True, score=1.0)
    np.testing.assert_array_equal(crop_clip([picture[:, 256:]], box, 32), crop_clip([picture[:, 256:].copy()], box, 32))


def test_bad_clips():
    box = Box(0, 0, 10, 10, found=True, score=1.0)
    with pytest.raises(UserError, match="no frames to crop"):
        crop_clip([], box, 8)
    frames = [np.zeros((20, 20, 3), np.uint8), np.zeros((20, 30, 3), np.uint8)]
    with pytest.raises(UserError, match="frame 1 of the clip is 30 x 20 pixels while frame 0 is 20 x 20"):
        crop_clip(frames, box, 8)
    for outside in (
        Box(15, 0, 10, 10, True, 1.0),
        Box(-1, 0, 10, 10, True, 1.0),
        Box(0, 11, 10, 10, True, 1.0),
    ):
        with pytest.raises(ValueError, match="not inside a frame of 20 x 20"):
            crop_clip(frames[:1], outside, 8)


def test_one_frame_is_a_legal_crop():
    box = Box(0, 0, 10, 10, found=True, score=1.0)
    assert crop_clip([np.zeros((20, 20, 3), np.uint8)], box, 8).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fallback", "center"),
        ("rule", "biggest"),
        ("scale", 0.0),
        ("scale", float("inf")),
        ("scale", float("nan")),
        ("size", 0),
        ("min_confidence", 1.5),
        ("min_confidence", float("nan")),
    ],
)
def test_bad_config_field_is_named(field, value):
    with pytest.raises(UserError, match=f"crop {field}"):
        CropConfig(**{field: value})
