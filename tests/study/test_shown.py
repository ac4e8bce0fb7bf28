"""Which clips a report shows, and that what is kept of them is what was there."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.study.shown import (
    FILENAME,
    ShownClip,
    choose_clips,
    find_sample,
    frame_attention,
    load_shown,
    save_shown,
    see_clips,
    shown_places,
)

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)


@pytest.fixture
def results(rng):
    return fake_study.make_results(rng, num_folds=2, num_seeds=2, clips_per_fold=4, num_test=1, frames=5)


def test_the_median_clip_of_each_label_by_hand(results):
    clips, samples = 9, len(results.sample_clip)
    labels = np.zeros((clips, 5), np.int8)
    labels[:8, 0], labels[[1, 2, 5], 1], labels[[3], 2] = 1, 1, 1
    labels[8] = -1
    # Of members that held a clip out, 0.1 a clip; of the others, and of the test clip, numbers that must not count.
    held = results.clip_fold[results.sample_clip] == results.member_fold[:, None]  # (M, N)
    own = 0.1 * np.array([8, 1, 6, 3, 5, 4, 7, 2, 9])[results.sample_clip]  # (N,)
    probabilities = np.where(held, own, 0.99)[..., None].repeat(5, axis=-1).astype(np.float32)
    # Members and views of one clip differ; their mean is what it was.
    wobble = 0.05 * np.where(results.sample_view == "l", 1, -1)[None, :, None] * held[..., None]
    changed = dataclasses.replace(
        results, clip_labels=labels, probabilities=(probabilities + wobble).astype(np.float32)
    )
    assert len(changed.probabilities[0]) == samples
    # Label 0: 0.1 to 0.8, the lower of the middle two is 0.4, clip 5; label 1: 0.1, 0.6, 0.4, again clip 5.
    assert choose_clips(changed) == {5: [0, 1], 3: [2]}


def test_diverged_members_have_no_say(rng, results):
    chosen = choose_clips(results)
    more = fake_study.make_results(
        rng, num_folds=2, num_seeds=2, clips_per_fold=4, num_test=1, frames=5, diverged=[(0, 0)]
    )
    probabilities = results.probabilities.copy()
    probabilities[0] = probabilities[1]  # the same two members in fold 0
    both = dataclasses.replace(results, probabilities=probabilities)
    one = dataclasses.replace(
        both, member_status=more.member_status, probabilities=np.where(more.ok[:, None, None], probabilities, np.nan)
    )
    assert choose_clips(one) == choose_clips(both) and chosen
    nobody = dataclasses.replace(results, member_status=np.full(4, "diverged"))
    assert choose_clips(nobody) == {}


@pytest.mark.parametrize(
    "positions, places",
    [(1, [0]), (4, [0, 1, 2, 3]), (9, list(range(9))), (10, [0, 2, 4, 6, 8]), (16, list(range(0, 16, 2))),
     (18, list(range(0, 18, 2))), (40, list(range(0, 40, 5)))],
)  # fmt: skip
def test_positions_are_shown_at_equal_steps(positions, places):
    assert shown_places(positions).tolist() == places


def test_kept_clips_are_read_as_they_were(rng, tmp_path):
    assert load_shown(tmp_path) == []
    clips = [
        ShownClip(
            clip=name, view=view, phases=phases, sampled=np.arange(6), places=np.array([0, 3]),
            crops=rng.integers(0, 256, (2, 8, 8, 3), np.uint8),
            networks=dict.fromkeys(maps, "vit"), maps=maps, areas=dict.fromkeys(maps, (0.0, 0.1, 1.0, 0.9)),
        )
        for name, view, phases, maps in (
            ("clip_1", "l", {}, {"appearance": rng.random((2, 3, 4)).astype(np.float16)}),
            ("clip_2", "c", {"onset": 0, "apex": 4}, {}),
        )
    ]  # fmt: skip
    save_shown(tmp_path / FILENAME, clips)
    read = load_shown(tmp_path)
    assert [clip.name for clip in read] == ["clip_1_l", "clip_2"]
    for ours, theirs in zip(read, clips, strict=True):
        for field in dataclasses.fields(ShownClip):
            value, expected = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "maps":
                assert value.keys() == expected.keys()
                for name, maps in expected.items():
                    assert value[name].dtype == np.float16
                    np.testing.assert_array_equal(value[name], maps)
            else:
                np.testing.assert_equal(value, expected)
    (tmp_path / FILENAME).write_bytes((tmp_path / FILENAME).read_bytes()[:-200])
    with pytest.raises(UserError, match=r"shown\.npz: damaged; delete it and run scripts/train\.py again"):
        load_shown(tmp_path)


def test_clips_are_found_by_name_and_view(results):
    assert find_sample(results, "seq_003") == (3, "l")
    assert find_sample(results, "seq_003_r") == (3, "r")
    with pytest.raises(UserError, match=r"^--clip=seq_008: a test clip; which frames were attended to is kept of held"):
        find_sample(results, "seq_008")
    with pytest.raises(UserError, match=r"^--clip=seq_003_x: this study has no such clip; it has seq_000, seq_001, "):
        find_sample(results, "seq_003_x")


def test_attention_is_of_the_members_that_held_the_clip_out(results):
    clip = 3  # of fold 1, whose members are rows 2 and 3
    attention = frame_attention(results, clip, "r", np.array([0, 1, 3]))
    sample = int(np.flatnonzero((results.sample_clip == clip) & (results.sample_view == "r"))[0])
    column = results.curve_sample[3].tolist().index(sample)
    assert set(attention) == {"appearance"} and attention["appearance"].shape == (1, 5)
    np.testing.assert_array_equal(attention["appearance"][0], results.attention["appearance"][3, column])
    assert frame_attention(results, clip, "r", np.arange(4))["appearance"].shape == (2, 5)


def test_clips_of_another_kind_are_refused(results):
    with pytest.raises(UserError, match=r"megc2019/raw: only clips of four_dme can be shown"):
        see_clips({"dataset": "megc2019/raw"}, results, [(0, "c")])
