"""Built data sets of flow as arrays: channels, sizes, phases, order, and what is refused."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_builders import megc2019
from data_builders.flow_records import FlowFormat, statistics, write_flow_dataset
from mer_jax.clips.flow import flow_channels, optical_strain, resize_flow
from mer_jax.errors import UserError
from mer_jax.study.flow_data import load_flow_dataset
from mer_jax.study.folds import make_folds

LABELS = ("Negative", "Positive")
PHASES = ("onset_apex", "apex_offset")
IMAGES = FlowFormat(
    ("negative", "positive", "surprise"), "multi_class", (4, 4, 3), ("u", "v", "strain"), "uint8", PHASES
)


def field(*seed, shape=(6, 6, 2)):
    """Flow that only this clip, view and phase has."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def record(number, view, labels, flow, **changes):
    return {
        "clip": f"clip_{number}",
        "id": number,
        "subject": f"s{number % 2}",
        "database": "",
        "view": view,
        "labels": np.array(labels, np.int8),
        "num_frames": 9,
        "box": np.array([0, 0, 6, 6], np.int32),
        "face_found": number != 3,
        "onset": 0,
        "apex": 4,
        "offset": 8,
        "apex_annotated": False,
        "flow": flow,
    } | changes


def write(root, records, told):
    """Splits of records as a data set; the folder of its version."""
    target = root / "four_dme_flow" / "demo-12345678" / "1.0.0"
    facts = {
        "origin": "Made by a test.",
        "settings": {},
        "content": "",
        "exceptions": [],
        "statistics": {split: statistics(rows, told.label_names) for split, rows in records.items()},
    }
    write_flow_dataset(
        target,
        staging=root / "staging",
        flow_format=told,
        records={split: (lambda rows=rows: iter(rows)) for split, rows in records.items()},
        facts=facts,
        description="A test's.",
        citation="",
    )
    return target


def two_view_records():
    """Clips 3, 10 (training) and 2 (test), written in another order than that of their ids."""

    def views(number, labels):
        flows = {view: {phase: field(number, v, p) for p, phase in enumerate(PHASES)} for v, view in enumerate("lr")}
        return [record(number, view, labels, flows[view]) for view in "rl"]

    return {"train": [*views(10, (0, 1)), *views(3, (1, 1))], "test": views(2, (-1, -1))}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return write(tmp_path_factory.mktemp("floats"), two_view_records(), FlowFormat(LABELS, "multi_label", (6, 6, 2)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [
        record(
            number, "c", np.eye(3)[number % 3], {phase: rng.integers(0, 256, (4, 4, 3), np.uint8) for phase in PHASES}
        )
        | {"subject": f"p{number}", "database": "smic" if number % 2 else "samm"}
        for number in (1, 2, 3, 4)
    ]
    return write(tmp_path_factory.mktemp("images"), {"train": rows}, IMAGES), rows


def test_training_clips_come_first_then_ids_views_and_phases(floats):
    data = load_flow_dataset(floats)
    assert data.clip_name.tolist() == ["clip_3", "clip_10", "clip_2"] and data.clip_id.tolist() == [3, 10, 2]
    assert data.clip_split.tolist() == ["train", "train", "test"] and data.clip_subject.tolist() == ["s1", "s0", "s0"]
    assert data.clip_labels.tolist() == [[1, 1], [0, 1], [-1, -1]] and data.clip_labels.dtype == np.int8
    assert data.sample_clip.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data.sample_clip.dtype == np.int32
    assert data.sample_view.tolist() == ["l", "l", "r", "r"] * 3
    assert data.sample_phase.tolist() == list(PHASES) * 6
    assert data.face_found.tolist() == [False] * 4 + [True] * 8
    assert data.label_names == LABELS and data.task == "multi_label" and data.frame_mask is None
    told = zip(data.sample_clip, data.sample_view, data.sample_phase, strict=True)
    for row, (clip, view, phase) in enumerate(told):
        flow = field((3, 10, 2)[clip], "lr".index(view), PHASES.index(phase))
        np.testing.assert_array_equal(data.features["flow"][row, ..., :2], flow)


def test_phases_are_those_asked_for_in_their_order(floats):
    alone = load_flow_dataset(floats, phases=("apex_offset",))
    assert alone.sample_phase.tolist() == ["apex_offset"] * 6
    np.testing.assert_array_equal(alone.features["flow"][0, ..., :2], field(3, 0, 1))
    swapped = load_flow_dataset(floats, phases=PHASES[::-1])
    assert swapped.sample_phase[:2].tolist() == ["apex_offset", "onset_apex"]
    np.testing.assert_array_equal(swapped.features["flow"][::2], alone.features["flow"])


def test_magnitude_and_strain_are_derived_at_the_stored_size(floats):
    data = load_flow_dataset(floats, channels=("u", "v", "m", "strain"))
    assert data.features["flow"].shape == (12, 6, 6, 4) and data.features["flow"].dtype == np.float32
    u, v, m, strain = np.moveaxis(data.features["flow"], -1, 0)
    np.testing.assert_allclose(m, np.sqrt(u**2 + v**2), rtol=1e-6)
    np.testing.assert_allclose(strain, optical_strain(np.stack([u, v], axis=-1)), rtol=1e-6)
    assert (m >= 0).all() and (strain >= 0).all()
    picked = load_flow_dataset(floats, channels=("strain", "u"))
    np.testing.assert_array_equal(picked.features["flow"], data.features["flow"][..., [3, 0]])


def test_sizes(floats):
    full = load_flow_dataset(floats, channels=("m", "u"))
    for same in (None, 6):
        np.testing.assert_array_equal(
            load_flow_dataset(floats, channels=("m", "u"), size=same).features["flow"], full.features["flow"]
        )
    small = load_flow_dataset(floats, channels=("m", "u"), size=3).features["flow"]
    assert small.shape == (12, 3, 3, 2)
    # Means of 2 x 2 px: (N, 3, 2, 3, 2, C) -> (N, 3, 3, C). Of lengths, not lengths of means.
    np.testing.assert_allclose(small, full.features["flow"].reshape(12, 3, 2, 3, 2, 2).mean(axis=(2, 4)), atol=1e-6)
    vectors = load_flow_dataset(floats, channels=("u", "v"), size=3).features["flow"]
    assert (small[..., 0] >= np.hypot(vectors[..., 0], vectors[..., 1]) - 1e-6).all()
    assert load_flow_dataset(floats, size=4).features["flow"].shape == (12, 4, 4, 3)


def test_images_keep_their_values_and_give_their_channels_in_any_order(images):
    folder, rows = images
    data = load_flow_dataset(folder, channels=("strain", "v", "u"), phases=("onset_apex",))
    assert data.features["flow"].dtype == np.float32 and data.task == "multi_class"
    stored = np.stack([row["flow"]["onset_apex"] for row in rows]).astype(np.float32)
    np.testing.assert_array_equal(data.features["flow"], stored[..., ::-1])
    assert data.clip_database.tolist() == ["smic", "samm", "smic", "samm"] and data.label_names == IMAGES.label_names
    halved = load_flow_dataset(folder, channels=("v",), phases=("onset_apex",), size=2).features["flow"]
    np.testing.assert_allclose(halved, resize_flow(stored[..., 1:2], 2), atol=1e-4)


def test_still_clips_stay_zero_in_every_channel(tmp_path):
    flow = {phase: np.zeros((6, 6, 2), np.float32) for phase in PHASES}
    rows = [record(number, "c", (1, 0), flow) for number in (1, 2)]
    target = write(tmp_path, {"train": rows}, FlowFormat(LABELS, "multi_label", (6, 6, 2)))
    data = load_flow_dataset(target, channels=("u", "v", "m", "strain"), size=5)
    assert not data.features["flow"].any() and not flow_channels(flow["onset_apex"], ("m",)).any()


# --- bad input --------------------------------------------------------------------------------------------


def refused(folder, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        load_flow_dataset(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_channel_or_phase_that_is_not_there_is_named(floats, images):
    refused(floats, r"config\.data\.channels: .* has no 'depth'; it has u, v, m, strain$", channels=("u", "depth"))
    refused(images[0], r"config\.data\.channels: .* has no 'm'; it has u, v, strain$", channels=("u", "v", "m"))
    refused(floats, r"config\.data\.phases: .* has no 'whole'; it has onset_apex, apex_offset$", phases=("whole",))


def test_one_phase_alone_is_named(tmp_path):
    told = FlowFormat(LABELS, "multi_label", (6, 6, 2), phases=("onset_apex",))
    rows = [record(number, "c", (1, 0), {"onset_apex": field(number)}) for number in (1, 2)]
    target = write(tmp_path, {"train": rows}, told)
    refused(target, r"config\.data\.phases: .* has no 'apex_offset'; it has onset_apex$")
    assert load_flow_dataset(target, phases=("onset_apex",)).features["flow"].shape == (2, 6, 6, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named_with_their_clip(tmp_path, value):
    records = two_view_records()
    records["train"][3]["flow"]["apex_offset"][2, 2, 1] = value
    target = write(tmp_path, records, FlowFormat(LABELS, "multi_label", (6, 6, 2)))
    with pytest.raises(UserError, match=r"^clip clip_3, view l: its flow holds values that are not finite; build the"):
        load_flow_dataset(target)


def test_a_training_clip_without_labels_is_named(tmp_path):
    records = two_view_records()
    for row in records["train"][:2]:
        row["labels"] = np.array([1, -1], np.int8)
    target = write(tmp_path, records, FlowFormat(LABELS, "multi_label", (6, 6, 2)))
    refused(target, r"clip clip_10: a training clip without labels in .*; build the data set anew")


def test_a_data_set_without_clips_is_named(floats, tmp_path):
    folder = tmp_path / "four_dme_flow" / "demo-12345678" / "1.0.0"
    folder.mkdir(parents=True)
    for path in floats.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": []}))
    refused(folder, r"the data set holds no clips; build it anew")


# --- people -----------------------------------------------------------------------------------------------


def test_people_of_two_databases_who_share_a_name_are_left_out_one_at_a_time(tmp_path):
    """From the table of flow images to the folds: 007 of CASME II is not 007 of SAMM."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["dataset,sub,filename_o,label,apex,imagename,sub_filename"]
    for database, subject in (("casme2", "007"), ("casme2", "sub02"), ("samm", "007"), ("smic", "s1")):
        for turn in range(2):
            name = f"{subject}_{database}_{turn}"
            lines.append(f"{database},{subject},{database}_{turn},{turn},,{name}.jpg,")
            pixels = np.random.default_rng([turn, *name.encode()]).integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name} .png")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    target = megc2019.build("folder", data_dir=tmp_path / "data", source=folder, labels=tmp_path / "table.csv")
    data = load_flow_dataset(target, channels=("u", "v", "strain"), phases=("onset_apex",))
    assert data.clip_subject.tolist() == ["casme2-007"] * 2 + ["sub02"] * 2 + ["samm-007"] * 2 + ["s01"] * 2
    folds = make_folds(data.clip_labels, data.clip_subject, scheme="loso", num_folds=0, seed=0)
    assert folds.max() == 3
    held_out = [set(data.clip_name[folds == fold]) for fold in range(4)]
    assert {"007_casme2_0", "007_casme2_1"} in held_out and {"007_samm_0", "007_samm_1"} in held_out
    builder = tfds.builder_from_directory(target)
    assert builder.info.splits["train"].num_examples == 8
