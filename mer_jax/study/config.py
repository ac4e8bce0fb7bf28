"""The part of a config that every study shares, its checks, and its comparison with an earlier run's."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.evaluation.thresholds import TUNED_MODES
from mer_jax.study.adam import OPTIMISERS
from mer_jax.study.engine import SCHEDULES
from mer_jax.study.held_out import resolve_evaluation
from mer_jax.study.members import HYPER_NAMES
from mer_jax.study.search import validate_search

# A run may go on under other values of these. The platform is checked by itself, by what it turned out to be.
NEUTRAL_FIELDS = ("platform", "study.checkpoint_seconds", "study.compile_cache", "data.workers", "report.pictures")


def base_config() -> ConfigDict:
    """Defaults of everything that is not a model's or a data set's own."""
    config = ConfigDict()
    config.seed = 0  # root of all random numbers
    config.platform = ""  # '' takes the best there is; 'cpu', 'gpu' or 'tpu' insists

    config.folds = ConfigDict()
    config.folds.scheme = "stratified"  # 'stratified' (the fusion paper), or 'loso': one fold a subject
    config.folds.group = ""  # 'subject' keeps all clips of a subject in one fold; the fusion paper does not
    config.folds.num = 3  # number of folds; 'loso' makes one a subject
    config.folds.seed = 0  # shuffles the clips before they are dealt out

    config.study = ConfigDict()
    config.study.num_seeds = 10  # seeds first_seed .. first_seed + num_seeds - 1, in every fold
    config.study.first_seed = 0
    config.study.only_folds = ()  # train these folds only; () trains all
    config.study.num_inner = 5  # an inner split is one of so many parts of the training fold; 0 for none
    config.study.num_candidates = 0  # points of a search, the config's own values among them; 0 for no search
    config.study.members_together = 0  # members in one compiled call on one device; 0 chooses
    config.study.epochs_per_call = 5  # epochs between two looks at the host (progress, signals, checkpoints)
    config.study.checkpoint_seconds = 20.0  # least time between two checkpoints of a block
    config.study.compile_cache = ""  # folder that keeps compiled programs between runs; '' for none

    config.train = ConfigDict()
    config.train.epochs = 50
    config.train.batch_size = 16  # samples (a clip's view is one sample)
    config.train.optimiser = "adamw"  # or 'adam', whose weight decay is an L2 term in the gradient
    config.train.schedule = "cosine"  # to 0 after the warm-up, or 'constant'
    config.train.learning_rate = 1e-3  # peak, after the warm-up
    config.train.warmup_fraction = 0.1  # share of all steps
    config.train.weight_decay = 0.01
    config.train.dropout = 0.0  # before the last layer
    config.train.feature_dropout = 0.0  # on the features of all modalities
    config.train.loss = "bce"  # 'bce' (cross-entropy; a softmax where a clip has one class) or 'focal'
    config.train.focal_gamma = 2.0  # exponent of 'focal'
    # 'balanced': negatives over positives (or inverse class frequencies) of the member's training samples.
    config.train.class_weights = "none"
    config.train.patience = 0  # epochs without a better inner loss before stopping; 0 trains all, keeps the last

    config.grid = ConfigDict(
        {name: () for name in HYPER_NAMES}
    )  # values to try of each; members = folds x grid x seeds

    # Ranges to draw candidates from, in place of a grid: ('uniform', low, high), ('log_uniform', low, high) or
    # ('choice', first, second, ...); study.num_candidates says how many. Members = folds x candidates x seeds.
    config.search = ConfigDict({name: () for name in HYPER_NAMES})

    config.evaluation = ConfigDict()
    config.evaluation.phases = "mean"  # a view's probability from its phases: 'mean', 'max' or 'onset_apex'
    config.evaluation.views = "mean"  # a clip's probability from its views: 'mean', 'max' or 'or'
    # 'fixed', or tuned on inner splits: 'global' or 'per_class'; 'argmax' where a clip has one class.
    config.evaluation.thresholds = "per_class"
    config.evaluation.fixed_threshold = (0.5,)  # one for all classes or one a class; beside tuned ones unless 0.5
    config.evaluation.negative_excludes_positive = False  # the released rule: Negative = 1 makes Positive = 0
    # What chooses among hyper-parameters on inner splits: 'average_precision', 'loss' or 'macro_f1'.
    config.evaluation.selection = "average_precision"
    config.evaluation.bootstrap = 2000  # replicates behind every interval
    config.evaluation.confidence = 0.95

    config.report = ConfigDict()
    # Whether frames of a few clips, faces that is, are kept in the run's folder and shown in its report: 'demo' (only
    # of rendered demo clips), 'always' or 'never'. A finished run can be started again with another value.
    config.report.pictures = "demo"

    config.data = ConfigDict()
    config.data.shuffle_labels = False  # a null study: label vectors dealt out at random; its scores are chance
    return config


def validate(config: ConfigDict) -> None:
    """Checks the values of the shared fields.

    Args:
        config: A config made of :func:`base_config`.

    Raises:
        UserError: Naming the field, its value and what it can be.
    """
    choices = {
        "platform": ("", "cpu", "gpu", "tpu"),
        "folds.scheme": ("stratified", "loso"),
        "folds.group": ("", "subject"),
        "train.loss": ("bce", "focal"),
        "train.class_weights": ("none", "balanced"),
        "train.optimiser": OPTIMISERS,
        "train.schedule": SCHEDULES,
        "report.pictures": ("demo", "always", "never"),
    }
    for field, allowed in choices.items():
        _require(
            config,
            field,
            lambda value, allowed=allowed: value in allowed,
            f"one of {', '.join(map(repr, allowed))}",
        )
    for field, least in {
        "folds.num": 2,
        "study.num_seeds": 1,
        "study.first_seed": 0,
        "study.num_inner": 0,
        "study.members_together": 0,
        "study.epochs_per_call": 1,
        "train.epochs": 1,
        "train.batch_size": 1,
        "train.patience": 0,
    }.items():
        _require(config, field, lambda value, least=least: value >= least, f"at least {least}")
    _require(config, "study.num_inner", lambda value: value != 1, "0 or at least 2 (one part would be all of it)")
    for field in ("train.dropout", "train.feature_dropout", "train.warmup_fraction"):
        _require(config, field, lambda value: 0 <= value < 1, "in [0, 1)")
    for field in (
        "train.learning_rate",
        "train.weight_decay",
        "train.focal_gamma",
        "study.checkpoint_seconds",
    ):
        _require(config, field, lambda value: value >= 0 and math.isfinite(value), "a number of at least 0")
    for field in HYPER_NAMES:
        least, most = 0, 1 if "dropout" in field else math.inf
        _require(
            config,
            f"grid.{field}",
            lambda values, least=least, most=most: all(_is_number(v) and least <= v < most for v in values),
            "numbers in [0, 1)" if most == 1 else "numbers of at least 0",
        )
    _require(
        config,
        "study.only_folds",
        lambda values: all(isinstance(value, int) and value >= 0 for value in values),
        "numbers of folds, from 0",
    )
    validate_search(config)
    if config.train.loss != "focal" and (len(config.grid.focal_gamma) or len(config.search.focal_gamma)):
        raise UserError("config.train.loss='bce' has no focal_gamma to try: set config.train.loss to 'focal'")
    resolve_evaluation(config.evaluation.to_dict())
    if config.study.num_inner == 0:
        if config.train.patience:
            raise UserError(
                "config.train.patience needs an inner split to watch: set config.study.num_inner to 2 or more, or "
                "patience to 0"
            )
        if any(len(values) > 1 for values in config.grid.values()):
            raise UserError("config.grid is chosen from on inner splits: set config.study.num_inner to 2 or more")
        if config.evaluation.thresholds in TUNED_MODES:
            raise UserError(
                f"config.evaluation.thresholds={config.evaluation.thresholds!r} is tuned on inner splits: set "
                "config.study.num_inner to 2 or more, or thresholds to 'fixed'"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(config: ConfigDict, field: str, holds, wanted: str) -> None:
    value: Any = config
    for part in field.split("."):
        if part not in value:
            raise UserError(f"config.{field} is missing; begin a config with mer_jax.study.config.base_config()")
        value = value[part]
    if not holds(value):
        raise UserError(f"config.{field}={value!r}: must be {wanted}")


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested fields to ``{'a.b': value}``, with tuples as lists as JSON has them."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def refuse_other_config(config: ConfigDict, earlier: Mapping, workdir: str) -> None:
    """Lets a run go on only under the config that it began with.

    Args:
        config: Today's config.
        earlier: The resolved config in the work folder.
        workdir: That folder, for the message.

    Raises:
        UserError: Listing every differing field with both values.
    """
    now, before = (
        {key: value for key, value in flatten(fields).items() if key not in NEUTRAL_FIELDS}
        for fields in (config, earlier)
    )
    absent = object()
    differing = [
        f"{key} was {_show(before.get(key, absent), absent)}, now {_show(now.get(key, absent), absent)}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key, absent) != before.get(key, absent)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a study of another config ({'; '.join(differing)}); choose another --workdir, or delete "
            "this one to start afresh"
        )


def _show(value: Any, absent: object) -> str:
    return "absent" if value is absent else json.dumps(value)


def to_json(config: ConfigDict) -> str:
    """The resolved config as stable, readable JSON."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
