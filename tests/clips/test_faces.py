import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from skimage.data import astronaut

from mer_jax.clips import faces
from mer_jax.clips.faces import FaceDetector, FaceMesh

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def picture():
    return astronaut()


@pytest.fixture(scope="module")
def moving(picture):
    """Six frames of a face that moves to the lower right by 2 px per frame."""
    return [np.roll(picture, (2 * step, 2 * step), axis=(0, 1)) for step in range(6)]


def meshes(frames, **options):
    with FaceMesh(**options) as mesh:
        return np.stack([mesh.landmarks(frame) for frame in frames])


def test_detection(picture):
    with FaceDetector() as detector:
        detection = detector.detect(picture)
        again = detector.detect(picture)
        # Another view of the memory is the same image.
        view = detector.detect(np.ascontiguousarray(picture[:, ::-1])[:, ::-1])
    # Measured beforehand with the same model outside of this library.
    np.testing.assert_allclose(np.array(detection.box) * 512, [173.7, 67.8, 103.9, 103.9], atol=0.2)
    assert detection.score == pytest.approx(0.9121, abs=1e-3)
    assert detection == again == view


def test_detection_is_relative_to_each_side(picture):
    wide = np.pad(picture, ((0, 0), (0, 512), (0, 0)))
    with FaceDetector() as detector:
        x, y, width, height = detector.detect(wide).box
    np.testing.assert_allclose([x * 1024, y * 512, width * 1024, height * 512], [174, 68, 104, 104], atol=8)


def test_highest_score_wins(monkeypatch):
    """MediaPipe lists faces by its own lights."""

    class Face:
        def __init__(self, score, xmin):
            box = type("Box", (), {"xmin": xmin, "ymin": 0.2, "width": 0.3, "height": 0.4})()
            self.score = [score]
            self.location_data = type("Location", (), {"relative_bounding_box": box})()

    found = type("Result", (), {"detections": [Face(0.3, 0.0), Face(0.8, 0.1), Face(0.5, 0.2)]})()
    monkeypatch.setattr(faces._Graph, "process", lambda self, image: found)
    assert FaceDetector().detect(np.zeros((4, 4, 3), np.uint8)) == faces.Detection((0.1, 0.2, 0.3, 0.4), 0.8)


def test_no_face():
    empty = np.zeros((120, 90, 3), np.uint8)
    with FaceDetector() as detector, FaceMesh() as mesh:
        assert detector.detect(empty) is None
        assert mesh.landmarks(empty) is None


def test_minimum_confidence(picture):
    for min_confidence, seen in ((0.005, True), (0.9, True), (0.95, False)):
        with FaceDetector(min_confidence) as detector:
            assert (detector.detect(picture) is not None) == seen
    for min_confidence, seen in ((0.5, True), (0.99, False)):
        with FaceMesh(min_confidence=min_confidence) as mesh:
            assert (mesh.landmarks(picture) is not None) == seen


@pytest.mark.parametrize("tracking", [False, True])
def test_landmarks(picture, tracking):
    (points,) = meshes([picture], tracking=tracking)
    assert points.shape == (faces.NUM_LANDMARKS, 3)
    assert points.dtype == np.float32
    # Measured beforehand: the tip of the nose (1) in the photograph.
    np.testing.assert_allclose(points[1, :2], [224.1, 131.2], atol=0.3)
    # The outer corners of the subject's right eye (33) and left eye (263), the mouth between nose and chin.
    assert points[33, 0] < points[1, 0] < points[263, 0]
    assert points[33, 1] < points[1, 1] < points[13, 1] < points[152, 1]
    # The nose is in front of the head's centre, the ears behind: z grows away from the camera.
    assert points[1, 2] < 0 < points[[234, 454], 2].min()


def test_depth_has_the_scale_of_the_picture(picture):
    """In pixels, neither position nor depth depends on how much empty space surrounds the face."""
    (plain,) = meshes([picture])
    size = np.ptp(plain, axis=0)
    for height, width in ((0, 200), (200, 0)):
        (padded,) = meshes([np.pad(picture, ((0, height), (0, width), (0, 0)))])
        np.testing.assert_allclose(padded[:, :2], plain[:, :2], atol=3)
        np.testing.assert_allclose(np.ptp(padded, axis=0), size, rtol=0.05)


def test_a_graph_per_clip_is_deterministic(moving):
    for tracking in (False, True):
        first = meshes(moving, tracking=tracking)
        np.testing.assert_array_equal(first, meshes(moving, tracking=tracking))
        motion = (first[-1] - first[0])[:, :2].mean(axis=0)
        np.testing.assert_allclose(motion, [10, 10], atol=1.5)


def test_static_images_are_independent_and_tracked_ones_are_not(moving):
    (last,) = meshes(moving[-1:])
    np.testing.assert_array_equal(meshes(moving)[-1], last)
    assert (meshes(moving, tracking=True)[-1] != last).any()


@pytest.mark.filterwarnings("ignore:SymbolDatabase.GetPrototype")
def test_tracking_as_mediapipe_alone(moving):
    """The image that warms the graph up leaves no trace in it."""
    with faces._quiet():
        from mediapipe import solutions

        with solutions.face_mesh.FaceMesh(static_image_mode=False, max_num_faces=1) as mesh:
            found = [mesh.process(frame).multi_face_landmarks[0].landmark for frame in moving]
    reference = np.array([[(p.x, p.y, p.z) for p in face] for face in found], np.float32) * 512
    np.testing.assert_array_equal(meshes(moving, tracking=True), reference)


@pytest.mark.parametrize("open_", [FaceDetector, FaceMesh])
def test_closed_and_malformed(open_):
    graph = open_()
    use = graph.detect if open_ is FaceDetector else graph.landmarks
    image = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(RuntimeError, match="inside a with statement"):
        use(image)
    with graph:
        for wrong in (image[..., 0], image[..., :2], image.astype(np.float32), image[:0]):
            with pytest.raises(ValueError, match=r"expected an \(H, W, 3\) uint8 image"):
                use(wrong)
        use(image)
    with pytest.raises(RuntimeError, match="inside a with statement"):
        use(image)
    with graph:  # a second clip
        use(image)


def test_quiet_holds_back_chatter_only(capfd):
    with pytest.raises(ZeroDivisionError), faces._quiet():
        os.write(2, b"W0000 00:00:1795254483.051110 4570 some_calculator.cc:114] chatter\n")
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        os.write(2, b"E0000 00:00:1795254483.051110 4570 some_calculator.cc:114] a real error\n")
        os.write(2, b"a line of the user's own\n")
        raise ZeroDivisionError
    os.write(2, b"afterwards\n")
    lines = capfd.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["E0000", "a lin", "after"]


def test_nothing_is_imported_before_it_is_needed():
    """The doors' help must be quick."""
    script = "import sys, mer_jax.clips.crops, mer_jax.clips.layouts; print('mediapipe' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_the_terminal_stays_clean():
    script = (
        "from skimage.data import astronaut\n"
        "from mer_jax.clips.faces import FaceDetector, FaceMesh\n"
        "for _ in range(3):\n"
        "    with FaceDetector() as d, FaceMesh() as m, FaceMesh(tracking=True) as t:\n"
        "        for _ in range(2):\n"
        "            d.detect(astronaut()), m.landmarks(astronaut()[:300]), t.landmarks(astronaut())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_no_warnings_escape(picture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FaceDetector() as detector, FaceMesh() as mesh:
            assert detector.detect(picture) is not None
            assert mesh.landmarks(picture) is not None


def test_broken_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with (
        pytest.raises(faces.UserError, match=r"MediaPipe cannot be loaded .*requirements\.txt"),
        FaceDetector(),
    ):
        pass
