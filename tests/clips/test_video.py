"""Videos of known frames and motion, written by OpenCV; rotation and damage are put into the files by hand."""

import importlib.util
import itertools
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.video import (
    DEFAULT_RATE,
    MAX_FRAMES,
    Stretch,
    choose_stretch,
    find_motion,
    frame_rate,
    read_video,
)
from mer_jax.errors import UserError

_spec = importlib.util.spec_from_file_location("face_videos", Path(__file__).parents[1] / "face_videos.py")
face_videos = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(face_videos)
RATE, bump, write_video = face_videos.RATE, face_videos.bump, face_videos.write_video


def grey_frame(number, height=48, width=64):
    """A frame that says its number by its brightness."""
    return np.full((height, width, 3), 40 + 5 * number, np.uint8)


@pytest.fixture
def counted(tmp_path):
    """40 frames of rising brightness, 25 a second."""
    return write_video(tmp_path / "counted.avi", map(grey_frame, range(40)))


@pytest.fixture(scope="module")
def detector():
    with FaceDetector() as detector:
        yield detector


class NoDetector:
    """Nobody may look for a face."""

    def detect(self, image):
        raise AssertionError("a face was looked for")


class NoFace:
    """Sees none."""

    def detect(self, image):
        return None


def numbers(frames):
    return [round((float(frame.mean()) - 40) / 5) for frame in frames]


def test_all_frames_come_in_order_as_rgb(tmp_path, counted):
    frames = list(read_video(counted))
    assert numbers(frames) == list(range(40))
    assert frames[0].shape == (48, 64, 3) and frames[0].dtype == np.uint8
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 200
    (frame,) = read_video(write_video(tmp_path / "red.avi", [red]))
    np.testing.assert_allclose(frame.mean(axis=(0, 1)), [200, 0, 0], atol=4)


@pytest.mark.parametrize(
    "start, stop, expected", [(5, 9, range(5, 9)), (38, None, (38, 39)), (38, 60, (38, 39)), (50, None, ()), (0, 0, ())]
)
def test_a_part_of_a_video_is_exact(counted, start, stop, expected):
    assert numbers(read_video(counted, start, stop)) == list(expected)


def test_frames_come_one_at_a_time(counted):
    frames = read_video(counted)
    assert numbers(itertools.islice(frames, 3)) == [0, 1, 2]
    frames.close()
    assert numbers(itertools.islice(read_video(counted), 2)) == [0, 1]


def test_codecs_that_predict_frames_are_read_too(tmp_path):
    path = write_video(tmp_path / "v.mp4", map(grey_frame, range(20)), codec="mp4v", rate=30.0)
    assert frame_rate(path) == pytest.approx(30.0)
    np.testing.assert_allclose([frame.mean() for frame in read_video(path)], 40 + 5 * np.arange(20), atol=5)


def test_a_camera_held_upright_gives_upright_frames(tmp_path):
    marked = np.zeros((48, 64, 3), np.uint8)
    marked[:24, :32] = 220  # upper left
    path = write_video(tmp_path / "v.mp4", [marked] * 5, codec="mp4v")
    assert next(read_video(path)).shape == (48, 64, 3)
    raw = bytearray(path.read_bytes())
    # The track header's matrix (a, b, u, c, d, v, x, y, w), 16.16 and for u, v, w 2.30: by 90 degrees clockwise.
    matrix = raw.index(b"tkhd") + 4 + 40
    one = (0x10000).to_bytes(4, "big")
    assert raw[matrix : matrix + 4] == one and raw[matrix + 16 : matrix + 20] == one
    turned = [0x10000 if place == 1 else 2**32 - 0x10000 if place == 3 else 0 for place in range(8)]
    raw[matrix : matrix + 32] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(raw)
    frame = next(read_video(path)).astype(int)
    assert frame.shape == (64, 48, 3)
    quarters = [
        frame[rows, columns].mean() for rows in (slice(32), slice(32, 64)) for columns in (slice(24), slice(24, 48))
    ]
    assert int(np.argmax(quarters)) == 1  # upper right


def test_a_truncated_video_gives_what_is_left(counted):
    raw = counted.read_bytes()
    counted.write_bytes(raw[: len(raw) // 2])
    told = numbers(read_video(counted))
    assert told == list(range(len(told))) and 3 < len(told) < 40


@pytest.mark.parametrize(
    "content", [b"", b"no video at all", b"RIFF\0\0\0\0AVI LIST", b"\0\0\0\x18ftypmp42" + b"\0" * 200]
)
@pytest.mark.parametrize("read", [frame_rate, lambda path: list(read_video(path))], ids=["rate", "frames"])
def test_what_is_no_video_is_one_line(tmp_path, content, read, capfd):
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"v\.mp4: (cannot be read as a video|holds no frame).*; choose") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # neither OpenCV nor FFmpeg adds its own


def test_a_name_that_is_not_utf8_is_one_line(counted):
    strange = counted.rename(counted.with_name(os.fsdecode(b"\xd0\xc2.avi")))
    with pytest.raises(UserError, match=r"\.avi: the path is not UTF-8; rename the file"):
        frame_rate(strange)


def test_a_missing_video_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"v\.mp4: no such video file"):
        list(read_video(tmp_path / "v.mp4"))
    with pytest.raises(UserError, match=r"no such video file"):
        frame_rate(tmp_path)  # a folder


def test_rates_that_no_camera_has_are_not_believed(counted):
    raw = counted.read_bytes()
    # The stream header's scale and rate, of which rate / scale is the frame rate.
    place = raw.index(b"strh") + 8 + 20
    counted.write_bytes(raw[:place] + (1).to_bytes(4, "little") + (90000).to_bytes(4, "little") + raw[place + 8 :])
    assert cv2.VideoCapture(str(counted)).get(cv2.CAP_PROP_FPS) == 90000
    assert frame_rate(counted) == DEFAULT_RATE
    stretch = choose_stretch(counted, NoDetector(), onset="0.2s", offset="10")
    assert stretch.onset == 6
    np.testing.assert_allclose(stretch.times, np.arange(6, 11) / DEFAULT_RATE)


@pytest.mark.parametrize(
    "onset, offset, expected",
    [
        ("3", "20", (3, 20)),
        ("0.2s", "1s", (5, 25)),
        ("0.2 s", "12", (5, 12)),
        ("10", None, (10, 21)),  # half a second: 12 frames
        (None, "30", (19, 30)),
        (None, "4", (0, 4)),
        ("35", None, (35, 39)),
        ("0", "39", (0, 39)),
    ],
)
def test_given_ends_are_taken(counted, onset, offset, expected):
    assert choose_stretch(counted, NoDetector(), onset=onset, offset=offset) == Stretch(*expected, RATE, "given")


def test_times_are_those_of_the_file(tmp_path, counted):
    # 20 frames of 40 ms, then 10 of 200 ms, as a phone in the dark: on average 10.7 a second.
    first, *others = (Image.fromarray(grey_frame(number)) for number in range(30))
    uneven = tmp_path / "uneven.gif"
    first.save(uneven, save_all=True, append_images=others, duration=[40] * 20 + [200] * 10)
    stretch = choose_stretch(uneven, NoDetector(), onset="1.2s", offset="1.85s")
    assert (stretch.onset, stretch.offset) == (22, 25)
    assert numbers(read_video(uneven, 22, 23)) == [22]
    np.testing.assert_allclose(stretch.times, [1.2, 1.4, 1.6, 1.8], atol=1e-6)
    with pytest.raises(UserError, match=r"--offset: frame \d+ is beyond the end of .*uneven\.gif, which has 30 frames"):
        choose_stretch(uneven, NoDetector(), onset="0", offset="4s")
    even = choose_stretch(counted, NoDetector(), onset="5", offset="0.3s")
    assert even.offset == 7  # of 7 and 8 the earlier
    np.testing.assert_allclose(even.times, [0.2, 0.24, 0.28], atol=1e-6)


@pytest.mark.parametrize(
    "onset, offset, told",
    [
        ("40", None, "--onset: frame 40 is beyond the end of .*counted.avi, which has 40 frames"),
        ("0", "2s", "--offset: frame 50 is beyond the end"),
        ("10", "11", "frames 10 to 11 are fewer than an onset, an apex and an offset; choose"),
        ("10", "5", "frames 10 to 5 are fewer"),
        ("39", None, "frames 39 to 39 are fewer"),
        ("1:02", None, "--onset='1:02': must be the number of a frame, such as 12, or a time, such as 0.4s"),
        ("0", "-3", "--offset='-3': must be"),
    ],
)
def test_ends_that_do_not_fit_are_one_line(counted, onset, offset, told):
    with pytest.raises(UserError, match=told) as caught:
        choose_stretch(counted, NoDetector(), onset=onset, offset=offset)
    assert "\n" not in str(caught.value)


def test_a_given_stretch_must_fit_into_memory(tmp_path):
    path = write_video(tmp_path / "v.avi", (grey_frame(t % 9, 16, 16) for t in range(MAX_FRAMES + 2)))
    with pytest.raises(UserError, match=rf"frames 0 to {MAX_FRAMES} are more than {MAX_FRAMES}; choose"):
        choose_stretch(path, NoDetector(), onset="0", offset=str(MAX_FRAMES))


@pytest.mark.parametrize("num_frames", [3, 12, 25])
def test_a_short_video_is_taken_whole(tmp_path, num_frames):
    path = write_video(tmp_path / "v.avi", map(grey_frame, range(num_frames)))
    assert choose_stretch(path, NoDetector()) == Stretch(0, num_frames - 1, RATE, "whole")


@pytest.mark.parametrize("num_frames, told", [(1, "has 1 frame;"), (2, "has 2 frames;")])
def test_one_or_two_frames_are_one_line(tmp_path, num_frames, told):
    path = write_video(tmp_path / "v.avi", map(grey_frame, range(num_frames)))
    with pytest.raises(UserError, match=rf"v\.avi: {told} an onset, an apex and an offset need at least 3"):
        choose_stretch(path, NoDetector())


def test_a_long_video_without_a_face_is_one_line(counted):
    with pytest.raises(
        UserError, match=r"counted\.avi: no face found in 14 frames looked at; choose a video of a face"
    ):
        choose_stretch(counted, NoFace())


def test_the_strongest_motion_that_returns_is_found(tmp_path, detector):
    """A raised mouth wins over a smaller one, over a jolt of the whole head and over one that stays raised."""

    def motion(frame):
        small, large = 1.5 * bump(frame, 20, 5), 3.0 * bump(frame, 63, 5)
        stays = 4.0 * np.clip((frame - 80) / 12, 0, 1)
        return {"raise_mouth": small + large + stays, "shift": 6.0 * bump(frame, 40, 4)}

    path = face_videos.face_video(tmp_path / "v.avi", 100, motion)
    first, last = find_motion(path, detector, RATE)
    assert last - first + 1 == 12  # half a second
    assert first <= 60 and last >= 66  # most of the motion, from before to after its peak at 63
    stretch = choose_stretch(path, detector)
    assert stretch == Stretch(first, last, RATE, "motion")


def test_a_still_video_gives_its_first_stretch(tmp_path, detector):
    path = face_videos.face_video(tmp_path / "v.avi", 40, lambda frame: {})
    assert find_motion(path, detector, RATE) == (0, 11)


def test_stretches_without_a_face_are_passed_over(tmp_path, detector):
    blank = np.full_like(face_videos.photograph(), 90)
    rng = np.random.default_rng(0)

    def frame(number):
        if number < 50:  # moves a lot, and is nobody
            return np.roll(blank + rng.integers(0, 60, blank.shape, np.uint8), number, axis=1)
        return face_videos.face_frame(raise_mouth=2.0 * bump(number, 70, 5))

    first, last = find_motion(write_video(tmp_path / "v.avi", map(frame, range(90))), detector, RATE)
    assert 50 <= first <= 70 <= last


def test_stretches_with_a_cut_are_passed_over(tmp_path, detector):
    """The same face held the other way round, or nobody, moves more than any expression."""
    mirrored = np.ascontiguousarray(face_videos.photograph()[:, ::-1])
    noise = np.random.default_rng(0).integers(0, 255, mirrored.shape, np.uint8)

    def frame(number):
        if number < 20 or number == 45:
            return mirrored if number < 20 else noise
        return face_videos.face_frame(raise_mouth=2.0 * bump(number, 70, 5))

    first, last = find_motion(write_video(tmp_path / "v.avi", map(frame, range(90))), detector, RATE)
    assert 55 <= first <= 70 <= last


def test_faces_that_are_never_seen_for_long_are_one_line(tmp_path, detector):
    noise = np.random.default_rng(0).integers(0, 255, face_videos.photograph().shape, np.uint8)
    frames = (noise if number % 5 else face_videos.photograph() for number in range(60))
    path = write_video(tmp_path / "v.avi", frames)
    with pytest.raises(UserError, match=r"v\.avi: shows no face for half a second without a break; choose --onset and"):
        find_motion(path, detector, RATE)
