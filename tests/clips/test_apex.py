"""The apex by hand, and what may not be taken for it: the head's motion, a jolt, a blink, noise."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.clips.apex import ApexConfig, find_apex, flow_intensity, motion_intensity, subtract_head_motion
from mer_jax.clips.flow import FlowConfig, dense_flow, to_grey
from mer_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIDE = 112
FACE = cv2.resize(to_grey(skimage.data.astronaut()[30:210, 135:315]), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
PLAIN = ApexConfig(compensate="none", blink=0, smooth=0.0)


def bump(x, y, width):
    """(SIDE, SIDE) Gaussian about (x, y), in shares of the side."""
    rows, columns = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2))


MOUTH, EYES = bump(0.5, 0.72, 0.08), bump(0.36, 0.4, 0.05) + bump(0.64, 0.4, 0.05)


def face_clip(expression, lids=None, head=None, turn=None):
    """Frames of a face whose mouth goes up, whose lids go down and whose head moves to the right, px a frame.

    Args:
        expression: (T,) px.
        lids: (T,) px.
        head: (T,) px.
        turn: (T,) radians, about the middle of the picture.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    still = np.zeros(len(expression))
    lids, head, turn = (still if given is None else np.asarray(given) for given in (lids, head, turn))
    frames = []
    for up, down, right, angle in zip(expression, lids, head, turn, strict=True):
        x, y = columns - SIDE / 2, rows - SIDE / 2
        x, y = np.cos(angle) * x + np.sin(angle) * y - right, np.cos(angle) * y - np.sin(angle) * x
        y = y + up * MOUTH - down * EYES
        places = [(each + SIDE / 2).astype(np.float32) for each in (x, y)]
        frames.append(cv2.remap(FACE, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(frames)


def rise_and_fall(count, apex, height):
    """(count,) from 0 to ``height`` at ``apex`` and back to 0."""
    return height * np.interp(np.arange(count), [0, apex, count - 1], [0, 1, 0])


def apex_of(frames, config):
    intensity = motion_intensity(frames, FlowConfig(), config.compensate, config.blink)
    assert intensity.shape == (len(frames),) and intensity.dtype == np.float64
    return find_apex(intensity, config.smooth)


# --- by hand ----------------------------------------------------------------------------------------------


def test_the_plain_sum_is_that_of_lengths():
    fields = np.zeros((3, 12, 14, 2), np.float32)
    fields[1, 2, 3] = (3, 4)
    fields[1, 5, 5] = (-6, 8)
    fields[2, ..., 1] = -0.5
    np.testing.assert_allclose(flow_intensity([fields]), [0, 5 + 10, 0.5 * 12 * 14], rtol=1e-6)
    np.testing.assert_array_equal(flow_intensity([fields[:2], fields[2:]]), flow_intensity([fields]))


def test_brief_motion_of_a_place_counts_little_by_hand():
    # On the grid of 56 x 56 of a field of that size, each pixel is a place.
    fields = np.zeros((7, 56, 56, 2), np.float32)
    fields[3, 10, 10] = (0, 4)  # one frame, which a running median of 3 takes away
    fields[2:5, 40, 40, 0] = (2, 3, 2)  # of the greatest length 3, 2 is left: (2 / 3)^2 remain
    share = (2 / 3) ** 2
    expected = 56**2 * np.sqrt(np.array([0, 0, 2 * share, 3 * share, 2 * share, 0, 0]) ** 2 / 56**2)
    np.testing.assert_allclose(flow_intensity([fields], blink=3), expected, rtol=1e-6)
    np.testing.assert_allclose(flow_intensity(iter(np.split(fields, 7)), blink=3), expected, rtol=1e-6)
    assert np.argmax(flow_intensity([fields])) == 3 and flow_intensity([fields])[3] == 7


@pytest.mark.parametrize(
    ("intensity", "smooth", "expected"),
    [
        ([0, 1, 3, 2, 1], 0, 2),
        ([0, 1, 2, 5], 0, 2),  # the last frame is the offset, which leaves no second phase
        ([0, 3, 3, 1], 0, 1),  # the earlier of equals
        ([0, 7], 0, 1),
        ([0, 7], 1.5, 1),
        ([0, 4, 1], 0, 1),
        ([0, 0, 0, 0, 0, 0], 0, 3),  # nothing moves: the middle
        ([0, 0, 0], 1.0, 1),
        ([0, 0], 0, 1),
        # 5 alone keeps 0.399 of itself and gets 3 x 0.054 from two frames on, 2.16; the middle of three times 3 gets
        # 3 x (0.399 + 2 x 0.242) and 5 x 0.004 from three frames back, 2.67.
        ([0, 0, 5, 0, 3, 3, 3, 0, 0, 0], 0, 2),
        ([0, 0, 5, 0, 3, 3, 3, 0, 0, 0], 1.0, 5),
    ],
)
def test_the_largest_sum_by_hand(intensity, smooth, expected):
    assert find_apex(np.array(intensity, float), smooth) == expected


@settings(deadline=None)
@given(
    intensity=st.lists(st.floats(0, 1e6), min_size=2, max_size=40),
    smooth=st.sampled_from([0.0, 0.7, 3.0]),
    factor=st.sampled_from([0.25, 4.0]),
)
def test_both_phases_have_a_frame_and_units_do_not_matter(intensity, smooth, factor):
    intensity = np.array(intensity)
    apex = find_apex(intensity, smooth)
    assert 1 <= apex <= max(1, len(intensity) - 2)
    assert find_apex(intensity * factor, smooth) == apex


def test_a_clip_without_two_frames_has_none():
    with pytest.raises(UserError, match=r"a clip of 1 frame has no apex; at least 2 are needed"):
        find_apex(np.zeros(1))
    with pytest.raises(UserError, match=r"a clip of 0 frames has no apex"):
        find_apex(np.zeros(0))
    with pytest.raises(UserError, match=r"a clip without frames has no apex; restore its files or remove it"):
        motion_intensity(np.zeros((0, 20, 20), np.uint8), FlowConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compensate": "affine"}, r"apex compensate 'affine': must be one of none, rigid"),
        ({"blink": -1}, r"apex blink -1: must be a whole number of frames, 0 for off"),
        ({"blink": 1.5}, r"apex blink 1\.5"),
        ({"blink": True}, r"apex blink True"),
        ({"smooth": -0.1}, r"apex smooth -0\.1: must be a number of frames of at least 0"),
        ({"smooth": float("nan")}, r"apex smooth nan"),
        ({"smooth": float("inf")}, r"apex smooth inf"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ApexConfig(**fields)


# --- the motion of the head ----------------------------------------------------------------------------


def in_disc(side):
    """(side, side) bool: where compensation is made to fit."""
    y, x = (2 * np.mgrid[:side, :side] + 1 - side) / side
    return x**2 + y**2 < 0.55**2


def test_what_is_smooth_over_the_face_is_taken_out_exactly(rng):
    y, x = (2 * np.mgrid[:56, :56] + 1 - 56) / 56
    powers = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)  # (56, 56, 6)
    fields = powers @ rng.normal(size=(4, 1, 6, 2))  # a shift, a turn, a zoom and what relief adds
    np.testing.assert_allclose(subtract_head_motion(fields)[:, in_disc(56)], 0, atol=1e-9)
    # A field is fitted by itself.
    np.testing.assert_allclose(subtract_head_motion(fields[2:3])[0], subtract_head_motion(fields)[2], atol=1e-12)


def test_what_a_part_of_the_face_does_by_itself_is_left():
    y, x = (2 * np.mgrid[:56, :56] + 1 - 56) / 56
    alone = np.stack([0 * x, -np.exp(-(x**2 + (y - 0.35) ** 2) / 0.01)], axis=-1)
    turned = alone + np.stack([2 - 0.3 * y, 0.3 * x - 1], axis=-1)
    left = subtract_head_motion(np.stack([alone, turned]))[:, in_disc(56)]
    np.testing.assert_allclose(left, np.stack([alone, alone])[:, in_disc(56)], atol=0.05)
    np.testing.assert_allclose(left[0], left[1], atol=1e-9)


def test_nothing_is_exactly_nothing():
    frames = np.stack([FACE] * 5)
    for compensate in ("none", "rigid"):
        for blink in (0, 3):
            intensity = motion_intensity(frames, FlowConfig(), compensate, blink)
            np.testing.assert_array_equal(intensity, np.zeros(5))
            assert find_apex(intensity, 1.0) == 2
    blank = np.full((4, 32, 32), 130, np.uint8)
    assert not motion_intensity(blank, FlowConfig(), "rigid", 7).any()


# --- clips whose apex is known -------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, ApexConfig()], ids=["plain", "default"])
def test_the_apex_of_a_face_that_does_nothing_else(config):
    assert abs(apex_of(face_clip(rise_and_fall(19, 11, 3.0)), config) - 11) <= 1
    assert apex_of(face_clip([0, 3.0]), config) == 1
    assert apex_of(face_clip([0, 3.0, 1.0]), config) == 1


def test_a_jolt_of_the_head_in_one_frame_does_not_win():
    head = np.zeros(19)
    head[4] = 4
    frames = face_clip(rise_and_fall(19, 11, 3.0), head=head)
    assert apex_of(frames, PLAIN) == 4
    assert abs(apex_of(frames, ApexConfig(blink=0, smooth=0.0)) - 11) <= 1
    assert abs(apex_of(frames, ApexConfig()) - 11) <= 1


def test_a_head_that_turns_and_sways_does_not_win():
    time = np.arange(19) / 18
    frames = face_clip(rise_and_fall(19, 8, 3.0), head=3 * time, turn=0.04 * time)
    assert apex_of(frames, PLAIN) >= 15
    assert abs(apex_of(frames, ApexConfig()) - 8) <= 1


def test_a_blink_does_not_win():
    lids = np.zeros(25)
    lids[5:8] = (3, 5, 3)
    frames = face_clip(rise_and_fall(25, 15, 2.5), lids=lids)
    for config in (PLAIN, ApexConfig(blink=0)):
        assert apex_of(frames, config) in (5, 6, 7)
    assert abs(apex_of(frames, ApexConfig()) - 15) <= 1


def test_smoothing_helps_against_noise(rng):
    """What noise does to the sums of frames near the apex is smoothed away, on average over many courses."""
    clean = rise_and_fall(41, 20, 10.0)
    noisy = clean + rng.normal(scale=1.0, size=(300, 41))
    errors = {smooth: np.mean([abs(find_apex(row, smooth) - 20) for row in noisy]) for smooth in (0.0, 1.0)}
    assert errors[1.0] < 0.8 * errors[0.0]


def test_long_clips_are_taken_in_parts():
    frames = face_clip(rise_and_fall(37, 20, 3.0), head=np.linspace(0, 2, 37))
    fields = dense_flow(frames[0], frames, FlowConfig())
    for compensate, blink in (("none", 0), ("rigid", 7)):
        at_once = flow_intensity([fields], compensate, blink)
        np.testing.assert_allclose(motion_intensity(frames, FlowConfig(), compensate, blink), at_once, rtol=1e-9)


def test_the_benchmark_finds_the_true_apex_of_demo_clips(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_of_apex", ROOT / "benchmarks" / "apex.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--clips", str(tmp_path / "clips"), "--seed", "5", "--num", "1", "1", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["apex.py", *arguments])
    module.main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {tuple(cell.strip() for cell in line[:4]): [cell.strip() for cell in line[4:]] for line in lines[1:]}
    assert len(rows) == 4 * 2 * 2
    for view in "lr":
        assert rows["rigid", "7", "1", view][2] == "100%"  # within 3 frames
