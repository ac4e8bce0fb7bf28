"""Features from elsewhere: every layout is read, every kind of misfit is one line that names the file."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mer_jax.errors import UserError
from mer_jax.extractors.feature_files import (
    read_feature_file,
    read_feature_folder,
    read_sample_features,
)


def test_one_file_per_sample(tmp_path, rng):
    features = rng.normal(size=(5, 8)).astype(np.float32)
    np.save(tmp_path / "7_l.npy", features)
    torch.save(torch.from_numpy(features), tmp_path / "7_r.pt")
    for sample in ("7_l", "7_r"):
        np.testing.assert_array_equal(read_sample_features(tmp_path, sample, dim=8, num_frames=5), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("rows", [True, False])
def test_published_2d_bundle(tmp_path, dtype, rows):
    """One tensor (1, D) or (D,) per frame; the order is the number's, not the name's."""
    tensors = (torch.arange(12 * 6).reshape(12, 6) - 30).to(dtype)
    (tmp_path / "7_l").mkdir()
    for index, tensor in enumerate(tensors):
        torch.save(tensor[None] if rows else tensor, tmp_path / "7_l" / f"f_{index}.pt")
    read = read_sample_features(tmp_path, "7_l", num_frames=12)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensors.float().numpy())


@pytest.mark.parametrize("shape", [(1, 621), (621,)])
def test_published_3d_bundle(tmp_path, rng, shape):
    coeffs = rng.normal(size=(4, 621)).astype(np.float32)
    (tmp_path / "7_r").mkdir()
    for index, row in enumerate(coeffs):
        np.save(tmp_path / "7_r" / f"f_{index:06d}.npy", {"coeffs": row.reshape(shape)}, allow_pickle=True)
    read = read_sample_features(tmp_path, "7_r", dim=171)
    np.testing.assert_array_equal(read, coeffs[:, 156:327])


def test_other_files_in_a_folder_are_ignored(tmp_path):
    np.save(tmp_path / "f_0.npy", np.ones(3))
    (tmp_path / "notes.txt").write_text("x")
    assert read_feature_folder(tmp_path).shape == (1, 3)


def test_torch_is_not_needed(tmp_path):
    torch.save(torch.ones(2, 3), tmp_path / "a.pt")
    program = (
        "import sys; from mer_jax.extractors.feature_files import read_feature_file\n"
        f"print(read_feature_file({str(tmp_path / 'a.pt')!r}).sum(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6.0", "False"]


@pytest.mark.parametrize(
    "value, message",
    [
        (np.ones((5, 7)), "7 features per frame, the others have 8"),
        (np.ones((4, 8)), "4 frames, but 5 frames expected"),
        (np.ones(8), r"shape \(8,\); \(frames, features\) is expected"),
        (np.ones((5, 1, 8)), r"shape \(5, 1, 8\)"),
        (np.ones((0, 8)), r"shape \(0, 8\)"),
        (np.ones((5, 8), complex), "values of type complex128; real numbers are expected"),
        (np.full((5, 8), "x"), "values of type <U1"),
        (np.ones((5, 8), bool), "values of type bool"),
        (np.array([["a"] * 8] * 5, object), "values of type object"),
        ({"coefs": np.ones(3), "id": 1}, "a dict of coefs, id; an array or a dict with 'coeffs' is expected"),
        ({"coeffs": np.ones((1, 620))}, r"'coeffs' has shape \(1, 620\), expected \(1, 621\)"),
    ],
)
def test_misfits_name_the_file(tmp_path, value, message):
    np.save(tmp_path / "7_l.npy", value, allow_pickle=True)
    with pytest.raises(UserError, match=rf"7_l\.npy: .*{message}"):
        read_sample_features(tmp_path, "7_l", dim=8, num_frames=5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_not_finite(tmp_path, bad):
    features = np.ones((5, 8))
    features[3, 2] = bad
    np.save(tmp_path / "a.npy", features)
    with pytest.raises(UserError, match=r"a\.npy: NaN or Inf in row 3, column 2; compute these features again"):
        read_feature_file(tmp_path / "a.npy")


def test_pt_of_several_tensors(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds a list; an array of numbers is expected"):
        read_feature_file(tmp_path / "a.pt")


def test_folder_misfits(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        read_feature_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no \.npy or \.pt file inside"):
        read_feature_folder(tmp_path)
    np.save(tmp_path / "f_0.npy", np.ones(3))
    np.save(tmp_path / "f_1.npy", np.ones(3))
    with pytest.raises(UserError, match="2 feature files, but the clip has 3 frames"):
        read_feature_folder(tmp_path, num_frames=3)
    with pytest.raises(UserError, match=r"f_0\.npy: 3 features per frame, the others have 4"):
        read_feature_folder(tmp_path, dim=4)
    np.save(tmp_path / "f_1.npy", np.ones(2))
    with pytest.raises(UserError, match=r"f_1\.npy: 2 features per frame, the others have 3"):
        read_feature_folder(tmp_path)
    np.save(tmp_path / "f_1.npy", np.ones((2, 3)))
    with pytest.raises(UserError, match=r"f_1\.npy: 2 frames, but 1 frame expected"):
        read_feature_folder(tmp_path)
    torch.save(torch.ones(3), tmp_path / "f_2.pt")
    with pytest.raises(UserError, match=r"both \.npy and \.pt files"):
        read_feature_folder(tmp_path)


def test_missing_and_double_samples(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder of features"):
        read_sample_features(tmp_path / "absent", "7_l")
    with pytest.raises(UserError, match=r"no features of '7_l': neither 7_l\.npy nor a folder 7_l"):
        read_sample_features(tmp_path, "7_l")
    np.save(tmp_path / "7_l.npy", np.ones((1, 3)))
    (tmp_path / "7_l").mkdir()
    with pytest.raises(UserError, match=r"features of '7_l' twice, 7_l\.npy and 7_l; keep one"):
        read_sample_features(tmp_path, "7_l")


def test_other_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"a\.csv: features are \.npy or \.pt files"):
        read_feature_file(tmp_path / "a.csv")
