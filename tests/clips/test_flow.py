import importlib.util
import multiprocessing
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from mer_jax.clips import demo
from mer_jax.clips.flow import (
    CHANNELS,
    FlowConfig,
    dense_flow,
    flow_channels,
    optical_strain,
    resize_flow,
    to_grey,
)
from mer_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FACE = skimage.data.astronaut()[20:244, 120:344]
CONFIGS = {
    "farneback": FlowConfig(),
    "farneback, jax": FlowConfig(backend="jax"),
    "tvl1": FlowConfig(method="tvl1", warps=2),
}
each_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_flow", ROOT / "benchmarks" / "flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    return demo.make_demo_clips(tmp_path_factory.mktemp("flow") / "clips", num_train=1, num_test=1, seed=5, workers=2)


def small_face(height=48, width=56):
    return cv2.resize(to_grey(FACE), (width, height), interpolation=cv2.INTER_AREA)


def shifted(picture, right, down):
    return cv2.warpAffine(
        picture,
        np.float64([[1, 0, right], [0, 1, down]]),
        picture.shape[::-1],
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )


def test_grey_levels_are_luma():
    colours = np.uint8([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [10, 200, 90]]])
    # .299 R + .587 G + .114 B
    np.testing.assert_array_equal(to_grey(colours), [[76, 150, 29], [255, 0, 131]])
    clip = np.stack([FACE, FACE[::-1]])[None]
    grey = to_grey(clip)
    assert grey.shape == (1, 2, 224, 224) and grey.dtype == np.uint8
    np.testing.assert_array_equal(grey[0, 1], cv2.cvtColor(np.ascontiguousarray(FACE[::-1]), cv2.COLOR_RGB2GRAY))
    assert to_grey(clip[:, :0]).shape == (1, 0, 224, 224)


@pytest.mark.parametrize("frames", [FACE / 255.0, FACE[..., 0], FACE[0], np.zeros((4, 4, 4), np.uint8)])
def test_frames_that_are_not_rgb_are_refused(frames):
    with pytest.raises(UserError, match="must be uint8 RGB"):
        to_grey(frames)


@each_method
def test_u_points_right_and_v_down(config):
    face = small_face(64, 64)
    for right, down in ((1.5, 0), (0, -1)):
        flow = dense_flow(face, shifted(face, right, down), config)
        assert flow.shape == (64, 64, 2) and flow.dtype == np.float32
        np.testing.assert_allclose(np.median(flow[10:-10, 10:-10], axis=(0, 1)), (right, down), atol=0.15)


@each_method
def test_leading_axes_broadcast_and_no_pair_knows_of_another(config):
    face = small_face()
    frames = np.stack([shifted(face, step / 3, -step / 4) for step in range(5)])
    flow = dense_flow(face, frames, config)
    assert flow.shape == (5, 48, 56, 2)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(dense_flow(face, frame, config), flow[index])
    np.testing.assert_array_equal(dense_flow(face, frames[::-1], config), flow[::-1])
    grid = dense_flow(frames[:2, None], frames[None, 2:], config)
    assert grid.shape == (2, 3, 48, 56, 2)
    np.testing.assert_array_equal(grid[0], flow[2:])
    assert dense_flow(face, frames[:0], config).shape == (0, 48, 56, 2)


@each_method
def test_a_worker_process_computes_the_same_without_threads(config, monkeypatch):
    face = small_face()
    frames = np.stack([shifted(face, step / 3, 0) for step in range(1, 4)])
    expected = dense_flow(face, frames, config)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr("mer_jax.clips.flow.ThreadPoolExecutor", None)
    np.testing.assert_array_equal(dense_flow(face, frames, config), expected)


@each_method
def test_still_pictures_have_no_flow_at_all(config):
    face, constant = small_face(), np.full((48, 56), 90, np.uint8)
    # OpenCV alone would move this still face by tenths of a pixel along its edges.
    assert np.abs(cv2.calcOpticalFlowFarneback(face, face, None, 0.5, 3, 15, 3, 5, 1.2, 0)).max() > 0.1
    assert not dense_flow(face, face, config).any()
    assert not dense_flow(constant, constant, config).any()
    assert not dense_flow(constant, np.full_like(constant, 140), config).any()
    mixed = dense_flow(face, np.stack([face, shifted(face, 1, 0), face]), config)
    assert not mixed[[0, 2]].any() and mixed[1].any()


@each_method
def test_floats_are_grey_levels_too(config):
    face = small_face()
    other = shifted(face, 0.8, 0.3)
    floats = dense_flow(face.astype(np.float32), other.astype(np.float32), config)
    # TV-L1 iterates until little changes; a rounding of 1 / 255 may move that.
    np.testing.assert_allclose(floats, dense_flow(face, other, config), atol=1e-3 if config.method == "tvl1" else 0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pyr_scale": 0.7},
        {"levels": 0},
        {"winsize": 9},
        {"iterations": 1},
        {"poly_n": 7},
        {"poly_sigma": 1.5},
        {"gaussian_window": True},
    ],
    ids=str,
)
def test_every_setting_of_farneback_reaches_opencv(settings):
    face = small_face(70, 64)
    other = shifted(face, 1.2, -0.4)
    arguments = dict(pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2) | settings
    flags = 256 if arguments.pop("gaussian_window", False) else 0
    expected = cv2.calcOpticalFlowFarneback(face, other, None, flags=flags, **arguments)
    found = dense_flow(face, other, FlowConfig(**settings))
    np.testing.assert_array_equal(found, expected)
    assert not settings or not np.array_equal(found, dense_flow(face, other, FlowConfig()))


@pytest.mark.parametrize(
    ("name", "value", "setter"),
    [
        ("tau", 0.125, "Tau"),
        ("lambda_", 0.05, "Lambda"),
        ("theta", 0.2, "Theta"),
        ("scales", 1, "ScalesNumber"),
        ("scale_step", 0.5, "ScaleStep"),
        ("warps", 2, "WarpingsNumber"),
        ("epsilon", 0.3, "Epsilon"),
        ("inner_iterations", 3, "InnerIterations"),
        ("outer_iterations", 2, "OuterIterations"),
        ("gamma", 0.5, "Gamma"),
        ("median_filtering", 1, "MedianFiltering"),
    ],
)
def test_every_setting_of_tvl1_reaches_opencv(name, value, setter):
    face = small_face(32, 36)
    other = shifted(face, 1.2, -0.4)
    default = cv2.optflow.createOptFlow_DualTVL1().calc(face, other, None)
    np.testing.assert_array_equal(dense_flow(face, other, FlowConfig(method="tvl1")), default)
    method = cv2.optflow.createOptFlow_DualTVL1()
    assert getattr(method, f"get{setter}")() == getattr(FlowConfig(), name)
    getattr(method, f"set{setter}")(value)
    expected = method.calc(face, other, None)
    assert not np.array_equal(expected, default)
    np.testing.assert_array_equal(dense_flow(face, other, FlowConfig(method="tvl1", **{name: value})), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dis"}, "method 'dis' is unknown; choose one of farneback, tvl1"),
        ({"backend": "torch"}, "backend 'torch' is unknown; choose one of opencv, jax"),
        ({"method": "tvl1", "backend": "jax"}, "'tvl1' has no backend 'jax'; take backend 'opencv'"),
        ({"pyr_scale": 1.0}, "pyr_scale 1.0: must lie between 0 and 1"),
        ({"pyr_scale": 0.0}, "pyr_scale"),
        ({"levels": -1}, "levels -1: must be a whole number of at least 0"),
        ({"winsize": 1}, "winsize 1: must be a whole number of at least 2"),
        ({"winsize": 15.0}, "winsize 15.0: must be a whole number"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": True}, "iterations True"),
        ({"poly_n": 0}, "poly_n"),
        ({"poly_sigma": -0.1}, "poly_sigma -0.1: must be a number of at least 0"),
        ({"poly_sigma": float("nan")}, "poly_sigma"),
        ({"tau": 0.0}, "tau 0.0: must be a positive number"),
        ({"lambda_": -1.0}, "lambda_"),
        ({"theta": float("inf")}, "theta"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"scales": 0}, "scales"),
        ({"scale_step": 1.5}, "scale_step"),
        ({"warps": 0}, "warps"),
        ({"inner_iterations": 0}, "inner_iterations"),
        ({"outer_iterations": 0}, "outer_iterations"),
        ({"gamma": -1.0}, "gamma"),
        ({"median_filtering": 4}, "median_filtering 4: must be 1"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        FlowConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((20, 20), np.uint8), np.zeros((20, 24), np.uint8), "20 x 20 px, the second 24 x 20"),
        (np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.float32), "first picture is uint8, the second float32"),
        (np.zeros((20, 20)), np.zeros((20, 20)), "type float64; give grey levels"),
        (np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint16), "the second picture has type uint16"),
        (np.zeros(20, np.uint8), np.zeros(20, np.uint8), r"shape \(20,\); it must be grey"),
        (np.zeros((9, 20), np.uint8), np.zeros((9, 20), np.uint8), "20 x 9 px are too small.*at least 10 px"),
        (np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20, 3), np.uint8), "3 x 20 px are too small"),
        (np.zeros((2, 20, 20), np.uint8), np.zeros((3, 20, 20), np.uint8), "do not broadcast"),
        (np.zeros((20, 20), np.float32), np.full((20, 20), np.nan, np.float32), "the second picture .* not finite"),
    ],
)
@each_method
def test_pictures_that_do_not_belong_together_are_refused(first, second, message, config):
    with pytest.raises(UserError, match=message) as caught:
        dense_flow(first, second, config)
    assert "\n" not in str(caught.value)


def affine_flow(u_x, u_y, v_x, v_y, height=6, width=7):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([u_x * columns + u_y * rows, v_x * columns + v_y * rows], axis=-1).astype(np.float32)


def test_strain_of_affine_fields_by_hand():
    stretch = affine_flow(0.3, 0, 0, 0)  # exx = 0.3
    both_ways = affine_flow(0.3, 0, 0, -0.4)  # exx = 0.3, eyy = -0.4
    shear = affine_flow(0, 0.2, 0, 0)  # exy = 0.1
    pure_shear = affine_flow(0, 0.1, 0.1, 0)  # exy = 0.1
    shift = affine_flow(0, 0, 0, 0) + np.float32([3, -2])
    angle = 0.01
    turn = affine_flow(np.cos(angle) - 1, -np.sin(angle), np.sin(angle), np.cos(angle) - 1)
    fields = np.stack([stretch, both_ways, shear, pure_shear, shift])
    for strain, expected in zip(optical_strain(fields), (0.3, 0.5, np.sqrt(2) * 0.1, np.sqrt(2) * 0.1, 0), strict=True):
        np.testing.assert_allclose(strain, expected, atol=1e-6)
    # A rotation strains by the square of its angle only.
    np.testing.assert_allclose(optical_strain(turn), np.sqrt(2) * (1 - np.cos(angle)), atol=1e-6)
    assert optical_strain(turn).max() < angle**2


def test_strain_is_that_of_differences(rng):
    flow = rng.normal(size=(3, 5, 6, 2)).astype(np.float32)
    strain = optical_strain(flow)
    assert strain.shape == (3, 5, 6) and strain.dtype == np.float32
    u, v = flow[1, ..., 0], flow[1, ..., 1]
    central = [(u[2, 4] - u[2, 2]) / 2, (v[3, 3] - v[1, 3]) / 2, (u[3, 3] - u[1, 3]) / 2 + (v[2, 4] - v[2, 2]) / 2]
    one_sided = [u[0, 1] - u[0, 0], v[1, 0] - v[0, 0], u[1, 0] - u[0, 0] + v[0, 1] - v[0, 0]]
    for (exx, eyy, twice_exy), found in ((central, strain[1, 2, 3]), (one_sided, strain[1, 0, 0])):
        tensor = np.array([[exx, twice_exy / 2], [twice_exy / 2, eyy]])
        assert found == pytest.approx(np.linalg.norm(tensor), rel=1e-5)


def test_channels_come_in_the_order_asked_for(rng):
    flow = rng.normal(size=(2, 5, 6, 2)).astype(np.float32)
    channels = flow_channels(flow, ("strain", "v", "u", "m"))
    assert channels.shape == (2, 5, 6, 4) and channels.dtype == np.float32
    np.testing.assert_array_equal(channels[..., 0], optical_strain(flow))
    np.testing.assert_array_equal(channels[..., 1], flow[..., 1])
    np.testing.assert_array_equal(channels[..., 2], flow[..., 0])
    np.testing.assert_allclose(channels[..., 3], np.linalg.norm(flow, axis=-1), rtol=1e-6)
    assert flow_channels(np.zeros((3, 3, 2)), CHANNELS).any() == np.False_
    assert flow_channels(np.float32([[[3, -4]]]), ["m"]) == 5


def test_what_has_no_channels_is_refused():
    flow = np.zeros((5, 6, 2), np.float32)
    for names in ((), ("u", "w")):
        with pytest.raises(UserError, match="choose from u, v, m, strain"):
            flow_channels(flow, names)
    for wrong in (flow[0], flow[..., :1], np.zeros((5, 6, 3))):
        with pytest.raises(UserError, match=r"must be \(\.\.\., H, W, 2\)"):
            flow_channels(wrong, ("u",))
    with pytest.raises(UserError, match="at least 2 px"):
        flow_channels(flow[:1], ("strain",))


def test_a_field_is_resized_by_means_over_areas(rng):
    field = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
    np.testing.assert_allclose(
        resize_flow(field, 4), field.reshape(2, 4, 2, 4, 3, 3).mean(axis=(2, 4)), atol=1e-6
    )  # (2, 4, 2, 4, 3, C) -> (2, 4, 4, C)
    # 3 px to 2: each takes one pixel and half of the middle one. To 6: every pixel twice.
    row = np.float32([[[3.0], [6.0], [12.0]]])
    np.testing.assert_allclose(resize_flow(np.repeat(row, 3, axis=0), 2)[..., 0], [[4, 10], [4, 10]], rtol=1e-6)
    np.testing.assert_allclose(resize_flow(row, 6)[2, :, 0], [3, 3, 6, 6, 12, 12], rtol=1e-6)
    # As OpenCV shrinks.
    large = rng.normal(size=(224, 224, 2)).astype(np.float32)
    for size in (28, 50, 224):
        resized = resize_flow(large, size)
        assert resized.shape == (size, size, 2) and resized.dtype == np.float32
        expected = cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)
        np.testing.assert_allclose(resized, expected, atol=1e-6)
    # px stay px: a shift by 2 px of the original grid is a shift by 2 px.
    np.testing.assert_allclose(resize_flow(np.full((30, 40, 2), 2.0), 7), 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [((8, 8, 2), 0, "ask for at least 1"), ((8, 8), 4, "must be"), ((8, 0, 2), 4, "must be")],
)
def test_what_cannot_be_resized_is_refused(shape, size, message):
    with pytest.raises(UserError, match=message):
        resize_flow(np.zeros(shape), size)


def test_opencv_users_need_no_jax():
    code = "import sys, mer_jax.clips.flow; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def test_both_backends_are_equally_near_the_true_displacement(benchmark, demo_dir):
    configs = {"opencv": FlowConfig(), "jax": FlowConfig(backend="jax")}
    errors = benchmark.end_point_errors(demo_dir, configs, limit=2)
    assert errors["displacement"] > 0.5
    assert errors["opencv"] < 0.4 * errors["displacement"]
    assert errors["jax"] == pytest.approx(errors["opencv"], rel=0.01)


def test_the_benchmark_tells_speed_agreement_and_truth(benchmark, demo_dir, capsys):
    benchmark.main(["--pairs", "2", "--size", "64", "--repeats", "1", "--clips", str(demo_dir), "--limit", "1"])
    told = capsys.readouterr().out
    for words in ("2 pairs of 64 x 64 px", "OpenCV's time over ours", "box window: median", "Gaussian window: median"):
        assert words in told
    assert "TV-L1, OpenCV:" in told and "JAX over OpenCV: 1.0000" in told
    first, second = benchmark.face_pairs(2, 64)
    found = benchmark.agreement(first, second, FlowConfig())
    assert found["median"] < 1e-6 and found["interior_p99"] < 1e-3 and found["border_share"] < 0.02
    for wrong in (["--pairs", "0"], ["--size", "48"], ["--repeats", "0"], ["--limit", "0"]):
        with pytest.raises(UserError, match=f"{wrong[0]} {wrong[1]}: must be at least"):
            benchmark.main(wrong)
    with pytest.raises(UserError):
        benchmark.end_point_errors(demo_dir / "nowhere", {}, 1)
