"""Members: a stable table, and keys that depend on nothing but fold and seed."""

import jax
import numpy as np

from mer_jax.study.members import HYPER_NAMES, Member, make_members, member_key, stream

HYPER = {"learning_rate": 1e-3, "weight_decay": 0.1, "dropout": 0.2, "feature_dropout": 0.3, "focal_gamma": 0.0}


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def test_members_are_the_product_of_folds_grid_and_seeds():
    members = make_members((0, 2), range(3, 5), HYPER, {"dropout": (0.1, 0.4)})
    assert len(members) == 8
    assert [member.id for member in members[:4]] == [
        "fold0-seed3-dropout=0.1",
        "fold0-seed4-dropout=0.1",
        "fold0-seed3-dropout=0.4",
        "fold0-seed4-dropout=0.4",
    ]
    assert dict(members[0].hyper) == HYPER | {"dropout": 0.1}
    assert len({member.id for member in members}) == 8


def test_without_a_grid_ids_are_short():
    assert [member.id for member in make_members((1,), range(2), HYPER, {})] == ["fold1-seed0", "fold1-seed1"]


def test_keys_do_not_depend_on_position_or_hyper_parameters():
    few = make_members((1,), range(7, 8), HYPER, {})
    many = make_members(range(3), range(10), HYPER, {"learning_rate": (1e-4, 1e-3)})
    twins = [member for member in many if (member.fold, member.seed) == (1, 7)]
    assert len(twins) == 2
    assert {str(bits(member_key(0, member))) for member in few + twins} == {str(bits(member_key(0, few[0])))}


def test_keys_and_streams_differ():
    hyper = tuple((name, 0.0) for name in HYPER_NAMES)
    keys = [member_key(root, Member(fold, seed, hyper)) for root in range(2) for fold in range(3) for seed in range(5)]
    assert len({str(bits(key)) for key in keys}) == len(keys)
    streams = [stream(keys[0], name) for name in ("init", "order", "dropout")]
    assert len({str(bits(key)) for key in streams}) == 3


def test_keys_are_those_of_earlier_versions():
    """A member's numbers must not change under a user's feet."""
    key = member_key(0, Member(1, 7, tuple((name, 0.0) for name in HYPER_NAMES)))
    assert bits(key) == GOLDEN_KEY


GOLDEN_KEY = [1264398986, 800542999]
