"""Features on a cluster: the bits of one machine, whoever did what and whatever became of them."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from data_builders import four_dme
from data_builders.four_dme import feature_building, feature_store
from data_builders.four_dme.feature_building import share_out
from mer_jax.clips.crops import CropConfig
from mer_jax.cluster import connect
from mer_jax.errors import UserError

COLUMNS = {"Negative": "neg"}
CROP = CropConfig(size=96)
pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def small_shares(monkeypatch):
    monkeypatch.setattr(feature_building, "_SHARE_BATCHES", 1)


def features(data_dir):
    """Content of the files of all features, of their records and of their maps."""
    root = data_dir / "features"
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.suffix in (".npz", ".json")}


def records(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_data_set_built_there_is_the_one_built_here(cluster, challenge, tmp_path, capfd):
    options = dict(source=challenge, columns=COLUMNS, crop=CROP)
    here = four_dme.build("challenge", data_dir=tmp_path / "here", workers=1, **options)
    capfd.readouterr()
    there = four_dme.build("challenge", data_dir=tmp_path / "data", workers=cluster, **options)
    assert "extracting features: 4/4 clip [" in capfd.readouterr().err
    assert records(here) == records(there) and len(records(here)) > 4
    # What a worker finished is found again without a cluster.
    shutil.rmtree(there)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "work").rglob("seq_*.npz")}
    assert len(finished) == 4
    four_dme.build("challenge", data_dir=tmp_path / "data", workers=1, **options)
    assert records(here) == records(there)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_bad_clip_is_told_as_here(cluster, challenge, tmp_path):
    (challenge / "train" / "seq_7" / "img2.png").write_bytes(b"no image")
    options = dict(source=challenge, columns=COLUMNS, crop=CROP, extractors=("hog",))
    told = []
    for workers, name in ((1, "here"), (cluster, "data")):
        with pytest.raises(
            UserError, match=r"^1 of 4 clips cannot be prepared \(clip seq_7: .*img2\.png.*others are fin"
        ) as e:
            four_dme.build("challenge", data_dir=tmp_path / name, workers=workers, **options)
        told.append(str(e.value))
    assert told[0] == told[1]


@pytest.mark.slow
def test_features_and_maps_from_there_are_those_from_here(cluster, built, extract, tmp_path, small_shares, capfd):
    options = dict(extractor="tiny_attentive", attention=True, batch_size=1)
    extract(data_dir=tmp_path / "here", **options)
    capfd.readouterr()
    extract(workers=cluster, **options)
    told = capfd.readouterr().err
    assert "tiny_attentive, 1 at once per device: 30/30 img [" in told, told
    assert "tiny_attentive, attention, 1 at once per device: 30/30 img [" in told and "Traceback" not in told
    assert features(tmp_path / "data") == features(tmp_path / "here")
    assert len(features(tmp_path / "data")) == 10

    # What is lost of it is made again, here or there, but not by other machines.
    (lost,) = (tmp_path / "data").glob("features/*/*/*/seq_7.npz")
    options |= dict(attention=False, batch_size=None)
    for workers in (1, cluster):
        lost.unlink()
        extract(workers=workers, **options)
        assert features(tmp_path / "data") == features(tmp_path / "here")
    lost.unlink()
    record = feature_store.read_record(lost.parent)
    other = dataclasses.replace(record, made_with=record.made_with | {"device": "TPU v9"})
    feature_store.write_record(lost.parent, other)
    with pytest.raises(UserError, match=r"begun with device TPU v9, now cpu, and 1 of 4 clips are left; go on with"):
        extract(workers=cluster, **options)


def test_a_worker_of_another_kind_is_refused(tmp_path):
    recipe = feature_store.Recipe("tiny", "", "", CROP.settings(), "float32", "float32")
    record = feature_store.Record(recipe, "appearance", 12, "", "", 1, {"device": "TPU v9"})
    job = feature_building._Job(None, None, record, [], np.zeros(0), None, tmp_path, 1, 1)
    with pytest.raises(UserError, match=r"^a worker on .* has device cpu instead of TPU v9, so that its features wou"):
        feature_building._extract_share(job)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_clip_that_kills_is_named_and_the_others_are_finished(
    make_cluster, num_workers, built, challenge, extract, tmp_path
):
    """One worker has processes of its own that read frames, where the machine has more than one core."""
    for path in (challenge / "train" / "seq_10").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    message = r"^1 of 4 clips cannot be extracted \(clip seq_10: .* died .*\); the others are finished and kept: repair"
    started = make_cluster()
    for _ in range(num_workers):
        started.start_worker()
    shutil.rmtree(tmp_path / "data")
    with (
        connect(started.address, tmp_path / "data") as cluster,
        pytest.raises(UserError, match=message),
    ):
        extract("tiny_deadly", workers=cluster)
    assert {path.stem for path in (tmp_path / "data").glob("features/*/*/*/*.npz")} == {"seq_2", "seq_7", "seq_11"}


def test_bad_weights_are_told_as_here(cluster, built, extract, weights, tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(weights().read_bytes()[:-500])
    told = []
    for workers in (1, cluster):
        with pytest.raises(UserError, match=r"bad\.pt: ") as error:
            extract(weights=path, workers=workers)
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("num_workers", [1, 3, 64])
@pytest.mark.parametrize("least", [1, 100])
def test_shares_are_neighbours_that_become_smaller(rng, num_workers, least):
    sizes = rng.integers(1, 60, 200).tolist()
    parts = share_out(sizes, num_workers, least)
    assert [index for part in parts for index in part] == list(range(200))
    images = [sum(sizes[index] for index in part) for part in parts]
    assert all(size >= least for size in images[:-1])
    assert all(size < max(least, sum(images[n:]) / (2 * num_workers)) + 60 for n, size in enumerate(images))
    assert share_out([], num_workers, least) == []
