"""Study data: what is fitted is fitted on training folds only."""

import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from mer_jax.study.data import StudyData, fit_feature_map, fixed_steps, prepare_features, prepare_flow

STEP = {"reference": "none", "normalise": "standard", "reduce": 0}


def make_data(rng, clips=12, frames=5, width=7, test=3):
    samples = np.repeat(np.arange(clips), 2)
    return StudyData(
        clip_name=np.array([f"{index:03d}" for index in range(clips)]),
        clip_id=np.arange(clips),
        clip_subject=np.array(["a"] * clips),
        clip_split=np.array(["train"] * (clips - test) + ["test"] * test),
        clip_database=np.array([""] * clips),
        clip_labels=rng.integers(0, 2, (clips, 5)).astype(np.int8),
        sample_clip=samples.astype(np.int32),
        sample_view=np.array(["l", "r"] * clips),
        sample_phase=np.array([""] * (2 * clips)),
        face_found=np.ones(2 * clips, bool),
        features={"x": (rng.normal(size=(2 * clips, frames, width)) * 3 + 1).astype(np.float32)},
        frame_mask=np.ones((2 * clips, frames), bool),
        label_names=("a", "b", "c", "d", "e"),
        task="multi_label",
    )


@pytest.fixture
def data(rng):
    return make_data(rng)


FOLDS = np.array([0, 1, 2] * 3 + [-1] * 3)


@pytest.mark.parametrize("reduce", [0, 4])
def test_held_out_and_test_clips_change_no_constant(data, reduce, rng):
    steps = {"x": STEP | {"reduce": reduce}}
    before, _ = prepare_features(data, FOLDS, 3, steps)
    outside = (FOLDS == 1) | (FOLDS == -1)  # of fold 1's training
    features = data.features["x"].copy()
    rows = outside[data.sample_clip]
    features[rows] = 100 * rng.normal(size=features[rows].shape)
    after, _ = prepare_features(dataclasses.replace(data, features={"x": features}), FOLDS, 3, steps)
    np.testing.assert_array_equal(after["x"][1][~rows], before["x"][1][~rows])
    assert (after["x"][0][~rows] != before["x"][0][~rows]).any()  # for fold 0 some of these are training clips


def test_labels_change_no_feature(data):
    before, _ = prepare_features(data, FOLDS, 3, {"x": STEP})
    after, _ = prepare_features(dataclasses.replace(data, clip_labels=1 - data.clip_labels), FOLDS, 3, {"x": STEP})
    np.testing.assert_array_equal(before["x"], after["x"])


def test_standardisation_equals_scikit_learn(data):
    prepared, _ = prepare_features(data, FOLDS, 3, {"x": STEP})
    train = np.isin(FOLDS, (0, 2))[data.sample_clip]
    scaler = StandardScaler().fit(data.features["x"][train].reshape(-1, 7))
    expected = scaler.transform(data.features["x"].reshape(-1, 7)).reshape(data.features["x"].shape)
    np.testing.assert_allclose(prepared["x"][1], expected, rtol=1e-4, atol=1e-5)


def test_reduction_spans_the_principal_components(data):
    prepared, maps = prepare_features(data, FOLDS, 3, {"x": STEP | {"reduce": 3}})
    assert prepared["x"].shape == (3, 24, 5, 3)
    train = np.isin(FOLDS, (0, 1))[data.sample_clip]
    frames = data.features["x"][train].reshape(-1, 7)
    pca = PCA(3, svd_solver="full").fit(frames)
    ours = maps["x"][2].projection
    np.testing.assert_allclose(ours @ ours.T, pca.components_.T @ pca.components_, atol=1e-5)
    np.testing.assert_allclose(prepared["x"][2][train].reshape(-1, 3).var(axis=0, ddof=1).mean(), 1.0, rtol=1e-4)


def test_nothing_fitted_is_shared_by_all_folds(data):
    prepared, maps = prepare_features(data, FOLDS, 3, {"x": STEP | {"normalise": "l2"}})
    assert prepared["x"].shape[0] == 1
    assert maps["x"] is None
    np.testing.assert_allclose(np.linalg.norm(prepared["x"], axis=-1), 1.0, rtol=1e-5)


def test_constant_features_become_zero(data):
    features = data.features["x"].copy()
    features[..., 2] = 5.0
    prepared, _ = prepare_features(dataclasses.replace(data, features={"x": features}), FOLDS, 3, {"x": STEP})
    np.testing.assert_array_equal(prepared["x"][..., 2], 0.0)
    assert np.isfinite(prepared["x"]).all()


def test_padding_enters_no_constant_and_stays_zero(data, rng):
    mask = data.frame_mask.copy()
    mask[:, 3:] = False
    features = data.features["x"].copy()
    features[:, 3:] = 1e3 * rng.normal(size=features[:, 3:].shape)
    short = dataclasses.replace(data, features={"x": data.features["x"][:, :3]}, frame_mask=mask[:, :3])
    padded = dataclasses.replace(data, features={"x": features}, frame_mask=mask)
    ours, _ = prepare_features(padded, FOLDS, 3, {"x": STEP})
    np.testing.assert_array_equal(ours["x"][:, :, 3:], 0.0)
    np.testing.assert_allclose(ours["x"][:, :, :3], prepare_features(short, FOLDS, 3, {"x": STEP})[0]["x"], rtol=1e-5)


def test_onset_reference_starts_at_zero(data):
    features = fixed_steps(data.features["x"], data.frame_mask, reference="onset", normalise="none")
    np.testing.assert_array_equal(features[:, 0], 0.0)
    np.testing.assert_allclose(features[:, 3], data.features["x"][:, 3] - data.features["x"][:, 0], rtol=1e-6)


def test_reduction_keeps_at_most_what_the_frames_span(data):
    feature_map = fit_feature_map(data.features["x"], data.frame_mask, [0], standardise=True, reduce=50)
    assert feature_map.projection.shape == (7, 4)  # five frames span four dimensions around their mean


# --- flow ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow_data(data, rng):
    shape = (len(data.sample_clip), 6, 5, 3)
    flow = (rng.normal(size=shape) * (1, 2, 5) + (0.5, -1, 3)).astype(np.float32)
    return dataclasses.replace(data, features={"flow": flow}, frame_mask=None)


@pytest.mark.parametrize("normalise", ["standard", "scale"])
def test_constants_of_flow_are_of_the_training_folds_alone(flow_data, normalise):
    kept, fitted = prepare_flow(flow_data, FOLDS, 3, normalise)
    np.testing.assert_array_equal(kept, flow_data.features["flow"])  # the device applies the constants
    for fold in range(3):
        train = ((FOLDS >= 0) & (fold != FOLDS))[flow_data.sample_clip]
        values = fitted["flow"][fold](kept[train])
        if normalise == "standard":
            np.testing.assert_allclose(values.mean(axis=(0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose((values**2).mean(axis=(0, 1, 2)), 1, rtol=1e-5)
        assert normalise == "standard" or not fitted["flow"][fold].mean.any()  # no motion stays 0


@pytest.mark.parametrize("normalise", ["standard", "scale"])
def test_held_out_flow_changes_no_constant(flow_data, normalise):
    _, before = prepare_flow(flow_data, FOLDS, 3, normalise)
    flow = flow_data.features["flow"].copy()
    flow[((FOLDS == 1) | (FOLDS == -1))[flow_data.sample_clip]] *= 100
    _, after = prepare_flow(dataclasses.replace(flow_data, features={"flow": flow}), FOLDS, 3, normalise)
    np.testing.assert_array_equal(after["flow"][1].scale, before["flow"][1].scale)
    np.testing.assert_array_equal(after["flow"][1].mean, before["flow"][1].mean)
    assert (after["flow"][0].scale != before["flow"][0].scale).all()


def test_a_sample_by_itself_keeps_the_proportions_of_its_channels(flow_data):
    flow, fitted = prepare_flow(flow_data, FOLDS, 3, "sample")
    assert fitted == {"flow": None}
    np.testing.assert_allclose((flow**2).mean(axis=(1, 2, 3)), 1, rtol=1e-5)
    ratio = flow / flow_data.features["flow"]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-4)


def test_stretching_an_image_changes_no_instance(flow_data, rng):
    """Undoes what was done to every channel of every image by itself; a constant image becomes 0."""
    flow = flow_data.features["flow"]
    flow[0] = 7.0
    gain, offset = rng.uniform(0.5, 2, (len(flow), 1, 1, 3)), rng.normal(size=(len(flow), 1, 1, 3))
    stretched = dataclasses.replace(flow_data, features={"flow": (flow * gain + offset).astype(np.float32)})
    found, _ = prepare_flow(flow_data, FOLDS, 3, "instance")
    again, _ = prepare_flow(stretched, FOLDS, 3, "instance")
    np.testing.assert_allclose(again[1:], found[1:], atol=1e-4)
    np.testing.assert_allclose(found[1:].std(axis=(1, 2)), 1, rtol=1e-5)
    assert not found[0].any()
