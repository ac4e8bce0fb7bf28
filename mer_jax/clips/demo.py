"""Demo clips: a small stand-in for 4DMR that anyone may make, rendered from one public-domain photograph.

A clip shows one of 24 virtual subjects (:mod:`mer_jax.clips.demo_face`) from two sides while one or more
action units (:mod:`mer_jax.clips.demo_actions`, which says what tells which label) rise from rest to an apex
and fall again, by 0.5 to 3 px at a face height of 224 px, amid head sway, blinks, flicker and sensor noise.
The label statistics are those that 4DMR is known or thought to have: imbalanced, one clip in four with two
labels. **Numbers obtained on these clips are no benchmark**: they show
that a pipeline works, not how good a model is.

The test clips show subjects that no training clip shows. 4DMR does not say whether its own do; the stricter
reading is the one from which nothing can leak.

A clip is a pure function of (seed, split, position in its split): neither the other clips, nor their order,
nor the number of workers has any influence on its bytes.
"""

import csv
import io
import itertools
import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mer_jax.clips import demo_actions as actions
from mer_jax.clips.demo_face import CAMERA_YAW, VIEW_SIZE, Camera, HeadPose, base_face, make_subject, sample
from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.files import atomic_write_text
from mer_jax.parallel import available_processors
from mer_jax.progress import progress

VERSION = 2  # of the rendering; to be raised whenever any pixel changes
NUM_TRAIN_SUBJECTS, NUM_TEST_SUBJECTS = 19, 5  # 24 as in 4DMR, in proportion to 100 and 28 clips
VIEWS = ("l", "r")
MANIFEST = "demo.json"
_UNFINISHED = ".unfinished"  # beside the splits, where no reader looks

# How often each combination of labels occurs in 40 clips: Negative 18, Positive 8, Repression 6, Surprise 10,
# Others 8; two labels in 10 of 40.
_MIX = {
    ("Negative",): 11,
    ("Positive",): 5,
    ("Repression",): 3,
    ("Surprise",): 5,
    ("Others",): 6,
    ("Negative", "Surprise"): 3,
    ("Negative", "Repression"): 2,
    ("Negative", "Others"): 2,
    ("Positive", "Surprise"): 2,
    ("Positive", "Repression"): 1,
}

# What makes the task easy or hard. Amplitudes are px at a face height of 224 px.
_NUM_FRAMES = (14, 32)  # 4DMR clips are trimmed to the active interval, a few hundred milliseconds
_AMPLITUDE = (1.0, 3.0)  # of an expression's first action unit; below, sway and noise rule
_MIN_AMPLITUDE = 0.5  # of its other ones, which take 60 to 100 % of the first
_REST_DEGREES = 2.5  # greatest yaw, pitch and roll of the head at the start; people face the camera
_SWAY_DEGREES = 0.25  # sd of yaw, pitch and roll; enough to move the nose by as much as a faint AU
_SWAY_SHIFT = 0.6  # px, sd; a head held as still as the task asks for
_NOISE = 1.6  # grey levels, sd, at mid grey: a machine-vision camera in room light
_FLICKER = 0.006  # relative, sd
# Movements without a meaning: share of clips that show them, range of their amplitude.
_BLINK = (0.3, (3.0, 7.0))
_GAZE = (0.35, (0.5, 2.0))
_MOUTH_DRIFT = (0.5, (0.2, 0.7))
_JAW_DRIFT = (0.4, (0.2, 0.7))
_JPEG_QUALITY = 95

# Keep the random numbers apart from each other and from those of a subject.
_CLIP_STREAM, _NOISE_STREAM, _MIX_STREAM, _HABIT_STREAM = 2, 3, 4, 5

_NOTICE = """# Demo clips of mer_jax

Rendered from the photograph of the astronaut Eileen Collins that scikit-image ships as
`skimage.data.astronaut()` (NASA, Great Images collection; no known copyright restrictions, public domain).
The 24 "subjects" are smooth random deformations of it, not people, and the expressions are computed. These
clips may be used for any purpose; mentioning NASA as the source of the photograph is asked for by NASA's
media guidelines, and nothing here implies its endorsement.

**Numbers obtained on these clips are no benchmark.** They show that a pipeline works. They say nothing about
micro-expressions of real people and must not be compared with results on 4DME or any other data set.

- `train/`, `test/`: one folder per clip, frames named by number, two views side by side (left: `l`, right:
  `r`).
- `train.csv`: labels and subjects of the training clips. The subjects of the test clips are others.
- `ground_truth/`: apex, action units per frame (px at a face height of 224 px), and the labels of the test
  clips. It is there to test software with; a study that reads it is void.
"""


@dataclass(frozen=True)
class GroundTruth:
    """What happens in a clip of T frames.

    Attributes:
        apex: Index of the frame at which the sum of all action units is largest.
        aus: Action unit, e.g. ``'AU12'``, to (T,) float64: peak length of its motion in px at a face height
            of 224 px.
        labels: (5,) int8 of 0 and 1, in the order of ``LABELS``.
    """

    apex: int
    aus: dict[str, np.ndarray]
    labels: np.ndarray


def make_demo_clips(
    out_dir: str | os.PathLike,
    *,
    num_train: int = 100,
    num_test: int = 28,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Makes the demo clips in the layout of the 4DMR challenge; what is there already is kept.

    Writes ``train/clip_<id>/`` and ``test/clip_<id>/`` (frames ``0000.jpg`` ... of 640 x 320 px),
    ``train.csv`` (Id, the five labels, subject), ``ground_truth/`` and a README with the licence. Ids count
    from 1 through the training clips and on through the test clips. Every clip appears whole or not at all,
    so a killed run goes on where it stopped.

    Args:
        out_dir: Folder to fill; made if need be. It must be empty or hold the same demo clips.
        num_train: Number of training clips, at least 1.
        num_test: Number of test clips.
        seed: Non-negative; everything follows from it.
        workers: Number of clips rendered at a time; one per available processor by default.

    Returns:
        ``out_dir``.

    Raises:
        UserError: The folder holds something else or demo clips of other settings, a number is out of range,
            or the disk refuses.
    """
    out_dir = Path(out_dir)
    workers = available_processors() if workers is None else workers
    for name, value, least in (
        ("num_train", num_train, 1),
        ("num_test", num_test, 0),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    _claim(out_dir, {"version": VERSION, "seed": seed, "num_train": num_train, "num_test": num_test})
    clips = _all_clips(seed, num_train, num_test)
    missing = [clip for clip in clips if not (out_dir / clip.split / clip.name).is_dir()]
    if missing:
        _make_all(out_dir, missing, workers)
    for clip in clips:
        path = _truth_path(out_dir, clip.name)
        if not path.is_file():
            atomic_write_text(path, _truth_json(clip))
    atomic_write_text(out_dir / "ground_truth" / "test_labels.csv", _labels_csv(clips, "test"))
    atomic_write_text(out_dir / "README.md", _NOTICE)
    # Last, because a reader takes the set for whole when it is there.
    atomic_write_text(out_dir / "train.csv", _labels_csv(clips, "train"))
    return out_dir


def load_ground_truth(out_dir: str | os.PathLike, clip_name: str) -> GroundTruth:
    """What happens in the clip ``clip_name`` of the demo clips in ``out_dir``.

    Raises:
        UserError: There is no such clip.
    """
    path = _truth_path(Path(out_dir), clip_name)
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: no ground truth ({error.strerror}); make the demo clips first") from error
    return GroundTruth(
        apex=stored["apex"],
        aus={name: np.array(values) for name, values in stored["aus"].items()},
        labels=np.array(stored["labels"], np.int8),
    )


def displacement_field(out_dir: str | os.PathLike, clip_name: str, view: str, frame: int) -> np.ndarray:
    """The true optical flow from the first frame of a clip to another one, from the renderer itself.

    It holds all that moves: action units, meaningless movements and head sway.

    Args:
        out_dir: Folder of demo clips.
        clip_name: Name of the clip's folder.
        view: ``'l'`` or ``'r'``.
        frame: Index of the other frame.

    Returns:
        (H, W, 2) float32 px: what the first frame shows at (x, y), the other one shows at (x, y) + field[y,
        x].

    Raises:
        UserError: There is no such clip, view or frame.
    """
    out_dir = Path(out_dir)
    settings = _read_manifest(out_dir)
    if settings is None:
        raise UserError(f"{out_dir}: holds no demo clips ({MANIFEST} is missing); make them first")
    _check_version(out_dir, settings)
    clips = _all_clips(settings["seed"], settings["num_train"], settings["num_test"])
    clip = next((clip for clip in clips if clip.name == clip_name), None)
    if clip is None:
        raise UserError(f"{out_dir}: has no clip {clip_name!r}; its clips are {clips[0].name} to {clips[-1].name}")
    if view not in VIEWS:
        raise UserError(f"view {view!r}: must be one of {', '.join(VIEWS)}")
    plan = _plan(clip)
    if not 0 <= frame < plan.num_frames:
        raise UserError(f"{clip_name}: has no frame {frame}; its frames are 0 to {plan.num_frames - 1}")
    return _View(plan, view).displacement(frame)


@dataclass(frozen=True)
class _DemoClip:
    """Which clip: all that the rest of it follows from."""

    seed: int
    split: str
    position: int
    name: str
    id: int
    subject: int
    labels: tuple[str, ...]

    def generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self.split == "test"), self.position, *stream])

    @property
    def label_vector(self) -> list[int]:
        return [int(label in self.labels) for label in LABELS]


@dataclass(frozen=True)
class _Movement:
    """An action over time: (T,) px, and the share of it on either side of the face (right, left)."""

    name: str
    intensity: np.ndarray
    sides: tuple[float, float]


@dataclass(frozen=True)
class _Plan:
    """Everything that happens in a clip of T frames.

    Attributes:
        clip: Which clip.
        num_frames: T.
        aus: Action units; their intensities are 0 in the first frame.
        others: Movements without a meaning; likewise 0 in the first frame.
        rest: Pose of the head in the first frame.
        sway: T poses of the head since then.
        brightness: (T,) factor of the light.
    """

    clip: _DemoClip
    num_frames: int
    aus: tuple[_Movement, ...]
    others: tuple[_Movement, ...]
    rest: HeadPose
    sway: tuple[HeadPose, ...]
    brightness: np.ndarray

    @property
    def apex(self) -> int:
        return int(np.argmax(np.sum([movement.intensity for movement in self.aus], axis=0)))


class _View:
    """One view of a planned clip, ready to render any frame."""

    def __init__(self, plan: _Plan, view: str):
        self._plan = plan
        clip = plan.clip
        subject = make_subject(clip.seed, clip.subject)
        yaw = {"l": -CAMERA_YAW, "r": CAMERA_YAW}[view]
        self._camera = Camera(subject, yaw, plan.rest)
        self._texture = subject.texture
        self._movements = []
        for movement in (*plan.aus, *plan.others):
            motion, height = actions.action(movement.name).mixed(movement.sides)
            shade = actions.shading(motion, height, subject.light, subject.furrows)
            points = self._camera.canvas_points
            self._movements.append((movement.intensity, sample(motion, points), sample(shade, points)))

    def displacement(self, frame: int) -> np.ndarray:
        """(H, W, 2) float32 px, the flow from the first frame."""
        motion = np.zeros((VIEW_SIZE, VIEW_SIZE, 3), np.float32)
        for intensity, unit_motion, _ in self._movements:
            motion += np.float32(intensity[frame]) * unit_motion
        return self._camera.displacement(motion, self._plan.sway[frame])

    def render(self, frame: int) -> np.ndarray:
        """(H, W, 3) float32 grey levels, free of noise."""
        change = np.zeros((VIEW_SIZE, VIEW_SIZE), np.float32)
        for intensity, _, unit_shade in self._movements:
            change += np.float32(intensity[frame]) * unit_shade
        gain = np.exp(change) * np.float32(self._plan.brightness[frame])
        return self._camera.render(self._texture, gain, self.displacement(frame))


class _Stopped(Exception):
    """Another clip failed or the user wants to stop."""


def _all_clips(seed: int, num_train: int, num_test: int) -> list[_DemoClip]:
    clips = []
    for split, count in (("train", num_train), ("test", num_test)):
        for position, labels in enumerate(_label_sequence(seed, split, count)):
            number = len(clips) + 1
            subject = (
                position % NUM_TRAIN_SUBJECTS if split == "train" else NUM_TRAIN_SUBJECTS + position % NUM_TEST_SUBJECTS
            )
            clips.append(_DemoClip(seed, split, position, f"clip_{number:03d}", number, subject, labels))
    return clips


def _label_sequence(seed: int, split: str, count: int) -> list[tuple[str, ...]]:
    """Labels of the first ``count`` clips: random, yet at any length close to the shares of ``_MIX``."""
    rng = np.random.default_rng([seed, int(split == "test"), _MIX_STREAM])
    combinations, share = list(_MIX), np.array(list(_MIX.values())) / sum(_MIX.values())
    drawn = np.zeros(len(share))
    sequence = []
    for position in range(count):
        # Who is furthest behind comes next; the random part keeps the order from repeating.
        behind = share * (position + 1) - drawn + 0.5 * rng.random(len(share))
        chosen = int(np.argmax(behind))
        drawn[chosen] += 1
        sequence.append(combinations[chosen])
    return sequence


def _plan(clip: _DemoClip) -> _Plan:
    rng = clip.generator(_CLIP_STREAM)
    num_frames = int(rng.integers(_NUM_FRAMES[0], _NUM_FRAMES[1] + 1))
    last = num_frames - 1
    onset = rng.uniform(0, 0.2) * last
    apex = round(rng.uniform(0.3, 0.7) * last)
    offset = rng.uniform(apex + 0.5 * (last - apex), last + 2)

    habit = np.random.default_rng([clip.seed, clip.subject, _HABIT_STREAM]).uniform(-0.3, 0.3)
    aus = []
    for rank, prototype in enumerate(_draw_prototypes(rng, clip.labels)):
        strongest = rng.uniform(*_AMPLITUDE)
        # The parts of one expression move together, those of two expressions nearly so.
        lag = int(rng.integers(-1, 2)) if rank else 0
        for name in prototype:
            share = 1.0 if name == prototype[0] else rng.uniform(0.6, 1.0)
            peak = max(_MIN_AMPLITUDE, share * strongest)
            residual = rng.uniform(0, 0.4)
            course = actions.envelope(num_frames, onset, apex + lag, offset + max(lag, 0), residual)
            # An expression leans to the subject's stronger side, and a little to either.
            aus.append(_Movement(name, np.round(peak * course, 4), _sides(habit + rng.normal(0, 0.12))))
    return _Plan(
        clip=clip,
        num_frames=num_frames,
        aus=tuple(aus),
        others=_meaningless(rng, num_frames),
        rest=HeadPose(*rng.uniform(-1, 1, 3) * _REST_DEGREES, shift=tuple(rng.normal((0, -5, 0), (3, 2, 5)))),
        sway=_sway(rng, num_frames),
        brightness=_flicker(rng, num_frames),
    )


def _draw_prototypes(rng: np.random.Generator, labels: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """One prototype per label, such that no action unit undoes or repeats another's."""
    possible, weights = [], []
    for choice in itertools.product(*(actions.PROTOTYPES[label] for label in labels)):
        prototypes = tuple(prototype for prototype, _ in choice)
        shown = [name for prototype in prototypes for name in prototype]
        if len(set(shown)) == len(shown) and not any(pair <= set(shown) for pair in actions.CLASHES):
            possible.append(prototypes)
            weights.append(math.prod(weight for _, weight in choice))
    return possible[rng.choice(len(possible), p=np.array(weights) / sum(weights))]


def _sides(lean: float) -> tuple[float, float]:
    """Strengths (right, left), the greater one 1, so that an intensity is a peak length."""
    lean = float(np.clip(lean, -0.6, 0.6))
    return (1.0, 1.0 - lean) if lean > 0 else (1.0 + lean, 1.0)


def _meaningless(rng: np.random.Generator, num_frames: int) -> tuple[_Movement, ...]:
    """Movements that every label may show, with random numbers drawn whether they occur or not."""
    last = num_frames - 1
    movements = []
    for name, (share, amplitude) in (
        ("blink", _BLINK),
        ("gaze", _GAZE),
        ("mouth_drift", _MOUTH_DRIFT),
        ("jaw_drift", _JAW_DRIFT),
    ):
        occurs = rng.random() < share
        peak, apex, residual = rng.uniform(*amplitude), int(rng.integers(3, last - 1)), rng.uniform(0.3, 0.95)
        sign, lean = rng.choice([-1.0, 1.0]), rng.uniform(-0.6, 0.6)
        if name == "blink":
            course, sides = actions.envelope(num_frames, apex - 3, apex, apex + 4, 0.0), (1.0, 1.0)
        elif name == "gaze":
            # Both eyes turn to the same side of the picture, not away from the midline; and they stay there.
            course, sides = actions.envelope(num_frames, apex - 2, apex, last + 9, residual), (sign, -sign)
        else:
            course = actions.envelope(num_frames, 0, apex, last + 4, residual)
            sides = tuple(sign * side for side in _sides(lean))
        if occurs:
            movements.append(_Movement(name, peak * course, sides))
    return tuple(movements)


def _slow_walk(rng: np.random.Generator, num_frames: int, channels: int) -> np.ndarray:
    """(T, channels) smooth random courses of unit variance, 0 at the first frame."""
    time = np.arange(num_frames)[:, None, None] / 30
    frequency = rng.uniform(0.2, 1.6, (1, channels, 3))
    waves = np.sin(2 * np.pi * (frequency * time + rng.random((1, channels, 3))))
    course = np.sum(waves * rng.normal(0, np.sqrt(2 / 3), (1, channels, 3)), axis=-1)
    return course - course[:1]


def _sway(rng: np.random.Generator, num_frames: int) -> tuple[HeadPose, ...]:
    courses = _slow_walk(rng, num_frames, 6) * ([_SWAY_DEGREES] * 3 + [_SWAY_SHIFT] * 3)
    return tuple(HeadPose(*course[:3], shift=tuple(course[3:])) for course in courses)


def _flicker(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    drift = _slow_walk(rng, num_frames, 1)[:, 0]
    return np.exp(_FLICKER * (rng.standard_normal(num_frames) + drift))


def _make_all(out_dir: Path, clips: list[_DemoClip], workers: int) -> None:
    """Renders ``clips`` on threads: OpenCV and NumPy do the work and let go of the interpreter's lock."""
    base_face()  # before the threads start, each of which would otherwise make its own
    stop = threading.Event()
    for split in ("train", "test"):
        (out_dir / split).mkdir(exist_ok=True)
    with (
        ThreadPoolExecutor(min(workers, len(clips)), thread_name_prefix="demo-clips") as pool,
        progress(total=len(clips), desc="demo clips", unit="clip") as bar,
    ):
        try:
            for done in as_completed([pool.submit(_make_clip, out_dir, clip, stop) for clip in clips]):
                done.result()
                bar.update(1)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    shutil.rmtree(out_dir / _UNFINISHED, ignore_errors=True)


def _make_clip(out_dir: Path, clip: _DemoClip, stop: threading.Event) -> None:
    final = out_dir / clip.split / clip.name
    working = out_dir / _UNFINISHED / f"{clip.name}-{os.getpid()}"
    try:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
        for frame, image in enumerate(_frames(clip)):
            if stop.is_set():
                raise _Stopped
            quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
            _, encoded = cv2.imencode(".jpg", image[..., ::-1], quality)
            (working / f"{frame:04d}.jpg").write_bytes(encoded.tobytes())
        os.replace(working, final)
    except OSError as error:
        # Someone else who fills the same folder may have been quicker; the clip is the same.
        if not final.is_dir():
            raise UserError(
                f"{final}: cannot be written ({error.strerror or error}); free space or choose another "
                "folder, then run the same command again"
            ) from error


def _frames(clip: _DemoClip):
    """Yields the T frames (H, 2 W, 3) uint8 RGB, both views side by side."""
    plan = _plan(clip)
    views = [_View(plan, view) for view in VIEWS]
    for frame in range(plan.num_frames):
        image = np.concatenate([view.render(frame) for view in views], axis=1)
        rng = clip.generator(_NOISE_STREAM, frame)
        noise = rng.standard_normal(image.shape, np.float32)
        # Photon noise grows with the root of the light; the two are equal at mid grey.
        image += noise * np.float32(_NOISE) * np.sqrt(np.clip(image, 8, 255) / 128)
        yield np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _claim(out_dir: Path, settings: dict) -> None:
    """Marks ``out_dir`` as demo clips of these settings, or refuses."""
    found = _read_manifest(out_dir)
    if found is None:
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise UserError(f"{out_dir}: holds something else than demo clips; choose an empty or a new folder")
        atomic_write_text(out_dir / MANIFEST, json.dumps(settings, indent=2) + "\n")
        return
    _check_version(out_dir, found)
    differing = ", ".join(f"{key}={found.get(key)}" for key in settings if found.get(key) != settings[key])
    if differing:
        raise UserError(
            f"{out_dir}: holds demo clips made with {differing}; ask for the same, choose another folder or delete it"
        )


def _check_version(out_dir: Path, settings: dict) -> None:
    if settings.get("version") != VERSION:
        raise UserError(
            f"{out_dir}: holds demo clips of version {settings.get('version')}, this is version {VERSION}; "
            "delete the folder or choose another one"
        )


def _read_manifest(out_dir: Path) -> dict | None:
    path = out_dir / MANIFEST
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete the folder and make the demo clips anew") from error


def _truth_path(out_dir: Path, clip_name: str) -> Path:
    return out_dir / "ground_truth" / f"{clip_name}.json"


def _truth_json(clip: _DemoClip) -> str:
    plan = _plan(clip)
    aus = {movement.name: movement.intensity.tolist() for movement in plan.aus}
    return json.dumps({"apex": plan.apex, "labels": clip.label_vector, "aus": aus}) + "\n"


def _labels_csv(clips: list[_DemoClip], split: str) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["Id", *LABELS, "subject"])
    for clip in clips:
        if clip.split == split:
            writer.writerow([clip.id, *clip.label_vector, f"s{clip.subject:02d}"])
    return table.getvalue()
