"""Faces as MediaPipe sees them: the only module that touches MediaPipe.

The models are those inside the ``mediapipe`` wheel (BlazeFace and the 468-point face mesh, by Google,
Apache-2.0). MediaPipe is imported when the first graph is opened, not before, because that takes about a
second. Its graphs write start-up notes to the process's stderr from their own C++ threads, which no
environment variable or logger silences; they are kept off the terminal here, whereas errors still get
through.

Open a detector or a mesh in a ``with`` statement, in the process that uses it: a graph does not survive a
fork.
"""

import contextlib
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mer_jax.errors import UserError

LICENCE = "Apache-2.0"
NUM_LANDMARKS = 468

# Informations and warnings, but not errors, in the formats of TensorFlow Lite and of absl's C++ log.
_CHATTER = re.compile(rb"INFO: |WARNING: |[IW]\d{4,8} ")
_stderr_lock = threading.Lock()


@dataclass(frozen=True)
class Detection:
    """A detected face.

    Attributes:
        box: (x, y, width, height) of the face relative to the image's width and height; x and y are those of
            the upper left corner. A face at the border may reach outside [0, 1].
        score: Confidence in [0, 1].
    """

    box: tuple[float, float, float, float]
    score: float


class FaceDetector:
    """MediaPipe's full-range face detector (up to about 5 m), for independent images.

    Args:
        min_confidence: Lowest score in [0, 1] that counts as a face. MediaPipe's graph itself drops faces
            below 0.6 and ignores the threshold that it is given (google-ai-edge/mediapipe issue 3896), so
            lower values, such as the released code's 0.005, all mean 0.6 here as they do there.
    """

    def __init__(self, min_confidence: float = 0.005):
        self._min_confidence = min_confidence
        self._graph = _Graph("face_detection", "FaceDetection", model_selection=1)

    def __enter__(self) -> "FaceDetector":
        self._graph.open()
        return self

    def __exit__(self, *exception) -> None:
        self._graph.close()

    def detect(self, image: np.ndarray) -> Detection | None:
        """Finds the face with the highest score.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            That face, or None where none reaches the minimum confidence.
        """
        detections = self._graph.process(image).detections
        if not detections:
            return None
        best = max(detections, key=lambda detection: detection.score[0])
        if best.score[0] < self._min_confidence:
            return None
        box = best.location_data.relative_bounding_box
        return Detection((box.xmin, box.ymin, box.width, box.height), best.score[0])


class FaceMesh:
    """MediaPipe's face mesh: 468 points in three dimensions for one face per image.

    Each ``with`` block has a graph of its own, so the same images in the same order give the same landmarks.
    With tracking this makes one block per clip a must; without, it costs a tenth of a second at most.

    Args:
        tracking: False detects the face anew in every image, which makes the images independent. True takes
            the images as consecutive frames: the face is followed from the last frame and the points are
            smoothed over time, which is calmer but delays small motions.
        min_confidence: Lowest score in [0, 1] of the face detector in front of the mesh and, with tracking,
            of the tracked face.
    """

    def __init__(self, tracking: bool = False, min_confidence: float = 0.5):
        self._graph = _Graph(
            "face_mesh",
            "FaceMesh",
            static_image_mode=not tracking,
            max_num_faces=1,
            min_detection_confidence=min_confidence,
            min_tracking_confidence=min_confidence,
        )

    def __enter__(self) -> "FaceMesh":
        self._graph.open()
        return self

    def __exit__(self, *exception) -> None:
        self._graph.close()

    def landmarks(self, image: np.ndarray) -> np.ndarray | None:
        """Finds the landmarks of the most prominent face.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            (468, 3) float32: x to the right and y downwards in pixels from the upper left corner of the
            image, z away from the camera in the same scale, 0 at the head's centre. None where no face is
            found.
        """
        faces = self._graph.process(image).multi_face_landmarks
        if not faces:
            return None
        height, width = image.shape[:2]
        points = np.array([(point.x, point.y, point.z) for point in faces[0].landmark], np.float32)
        # MediaPipe normalises z by the image's width, like x.
        return points * np.array([[width, height, width]], np.float32)


class _Graph:
    """One of MediaPipe's ready-made graphs, opened and closed in silence."""

    def __init__(self, module: str, name: str, **options):
        self._module, self._name, self._options = module, name, options
        self._solution = None

    def open(self) -> None:
        with _quiet():
            # The protobuf that MediaPipe is pinned to announces the end of a call that MediaPipe makes, and, when it is
            # loaded by Python 3.12, of its own compiled part.
            warnings.filterwarnings("ignore", message=r"SymbolDatabase\.GetPrototype", category=UserWarning)
            warnings.filterwarnings("ignore", message=r"Type google\._upb\._message", category=DeprecationWarning)
            try:
                from mediapipe import solutions
            except ImportError as error:
                raise UserError(
                    f"MediaPipe cannot be loaded ({error}); install the version in requirements.txt and the "
                    "system libraries that the README names"
                ) from error
            self._solution = getattr(getattr(solutions, self._module), self._name)(**self._options)
            # The graph's threads load the models, and talk about it, in their own time. A first image makes
            # them finish; without a face it leaves no trace in a tracking graph.
            self._solution.process(np.zeros((64, 64, 3), np.uint8))

    def close(self) -> None:
        solution, self._solution = self._solution, None
        if solution is not None:
            solution.close()

    def process(self, image: np.ndarray):
        if self._solution is None:
            raise RuntimeError(f"{self._name} is closed; use it inside a with statement")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"expected an (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
        return self._solution.process(image)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what is written to stderr, and passes it on afterwards without the start-up chatter."""
    with _stderr_lock, tempfile.TemporaryFile() as held:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            terminal = os.dup(2)
        except OSError:  # a process without stderr
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if not _CHATTER.match(line):
                    os.write(2, line)
