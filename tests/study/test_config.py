import json

import pytest

from mer_jax.errors import UserError
from mer_jax.study.config import NEUTRAL_FIELDS, base_config, flatten, refuse_other_config, to_json, validate


def test_the_defaults_are_valid():
    validate(base_config())


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("platform", "cuda", "config.platform='cuda': must be one of '', 'cpu', 'gpu', 'tpu'"),
        ("report.pictures", "yes", "config.report.pictures='yes': must be one of 'demo', 'always', 'never'"),
        ("folds.scheme", "random", "config.folds.scheme='random': must be one of 'stratified', "),
        ("folds.num", 1, "config.folds.num=1: must be a whole number from 2 to 1000000"),
        ("study.num_seeds", 0, "config.study.num_seeds=0: must be a whole number from 1 to 1000000"),
        ("study.num_inner", 1, "config.study.num_inner=1: must be 0 or at least 2"),
        ("study.only_folds", (0, "b"), "config.study.only_folds=(0, 'b'): must be numbers of folds"),
        ("study.only_folds", (-1,), "config.study.only_folds=(-1,): must be numbers of folds"),
        ("train.dropout", 1.0, "config.train.dropout=1.0: must be a number in [0, 1)"),
        ("train.learning_rate", float("nan"), "config.train.learning_rate=nan: must be a number of at least 0"),
        ("train.matmul_precision", "half", "config.train.matmul_precision='half': must be one of 'float32', 'tensorf"),
        ("train.loss", "mse", "config.train.loss='mse': must be one of 'bce', 'focal'"),
        ("grid.dropout", (0.1, 1.5), "config.grid.dropout=(0.1, 1.5): must be numbers in [0, 1)"),
        ("grid.learning_rate", (1e-3, -1.0), "config.grid.learning_rate=(0.001, -1.0): must be numbers of at least 0"),
        ("grid.weight_decay", ("a",), "config.grid.weight_decay=('a',): must be numbers of at least 0"),
        ("grid.weight_decay", (float("inf"),), "config.grid.weight_decay=(inf,): must be numbers of at least 0"),
        ("evaluation.views", "median", "evaluation.views='median': must be one of"),
        ("evaluation.confidence", 1.0, "evaluation.confidence=1.0: must be a number between 0 and 1"),
        ("evaluation.fixed_threshold", (0.5, 1.5), "evaluation.fixed_threshold=(0.5, 1.5): must be a number"),
        ("evaluation.fixed_threshold", ("x",), "evaluation.fixed_threshold=('x',): must be a number"),
        ("evaluation.bootstrap", 10, "evaluation.bootstrap=10: must be an integer from 100 to 1000000"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(field, value, message):
    config = base_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as told:
        validate(config)
    assert str(told.value).startswith(message) and "\n" not in str(told.value)


def test_a_missing_field_is_named():
    config = base_config()
    del config.train.epochs
    with pytest.raises(
        UserError, match=r"config\.train\.epochs is missing; begin a config with mer_jax\.study\.config"
    ):
        validate(config)


@pytest.mark.parametrize("change", [{"train.patience": 3, "evaluation.thresholds": "fixed"}, {}])
def test_what_needs_an_inner_split_says_so(change):
    config = base_config()
    config.update_from_flattened_dict({"study.num_inner": 0, **change})
    with pytest.raises(UserError, match=r"set config.study.num_inner to 2 or more, or (patience|thresholds)"):
        validate(config)


def test_a_config_goes_on_as_itself_and_under_other_neutral_fields():
    config = base_config()
    refuse_other_config(config, json.loads(to_json(config)), "runs/a")
    config.platform, config.study.checkpoint_seconds = "cpu", 0.0
    assert {"platform", "study.checkpoint_seconds"} <= set(NEUTRAL_FIELDS)
    refuse_other_config(config, json.loads(to_json(base_config())), "runs/a")


def test_every_difference_is_told_with_both_values():
    config = base_config()
    earlier = json.loads(to_json(config))
    config.train.epochs, config.grid.dropout = 7, (0.1, 0.2)
    del earlier["folds"]["seed"]
    earlier["train"]["momentum"] = 0.9
    with pytest.raises(UserError) as told:
        refuse_other_config(config, earlier, "runs/a")
    assert str(told.value).startswith(
        "runs/a holds a study of another config (folds.seed was absent, now 0; grid.dropout was [], now [0.1, 0.2]; "
        "train.epochs was 50, now 7; train.momentum was 0.9, now absent); choose another --workdir"
    )


def test_flatten():
    assert flatten({"a": {"b": (1, 2)}, "c": "x"}) == {"a.b": [1, 2], "c": "x"}
