"""The part of a config that every study shares, its checks, and its comparison with an earlier run's."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.evaluation.thresholds import TUNED_MODES
from mer_jax.fields import SECTION, TEXT, Kind, Kinds, check_fields, number, numbers, one_of, several, whole
from mer_jax.study.adam import OPTIMISERS
from mer_jax.study.engine import MATMUL_PRECISIONS, SCHEDULES
from mer_jax.study.held_out import resolve_evaluation
from mer_jax.study.members import HYPER_NAMES
from mer_jax.study.search import RANGES, validate_search

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
    # What an accelerator rounds the factors of matrix products to: 'float32', 'tensorfloat32' or 'bfloat16'.
    config.train.matmul_precision = "float32"
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


_BEGIN = "begin a config with mer_jax.study.config.base_config()"
_RATE = number(0, 1)
_SEED = whole(0, 2**32 - 1)

SHARED: Kinds = {
    "seed": _SEED,
    "platform": one_of(("", "cpu", "gpu", "tpu")),
    "folds": {
        "scheme": one_of(("stratified", "loso")),
        "group": one_of(("", "subject")),
        "num": whole(2),
        "seed": _SEED,
    },
    "study": {
        "num_seeds": whole(1),
        "first_seed": whole(0, 10**9),
        "only_folds": several(whole(0), "numbers of folds, from 0, in a tuple"),
        "num_inner": whole(0),
        "num_candidates": whole(0),
        "members_together": whole(0),
        "epochs_per_call": whole(1),
        "checkpoint_seconds": number(),
        "compile_cache": TEXT,
    },
    "train": {
        "epochs": whole(1),
        "batch_size": whole(1),
        "optimiser": one_of(OPTIMISERS),
        "schedule": one_of(SCHEDULES),
        "learning_rate": number(),
        "warmup_fraction": _RATE,
        "weight_decay": number(),
        "dropout": _RATE,
        "feature_dropout": _RATE,
        "loss": one_of(("bce", "focal")),
        "focal_gamma": number(),
        "class_weights": one_of(("none", "balanced")),
        "matmul_precision": one_of(tuple(MATMUL_PRECISIONS)),
        "patience": whole(0),
    },
    "grid": {name: numbers(0, 1) if "dropout" in name else numbers() for name in HYPER_NAMES},
    "search": dict.fromkeys(HYPER_NAMES, Kind(lambda value: isinstance(value, tuple | list), RANGES)),
    "evaluation": SECTION,
    "report": {"pictures": one_of(("demo", "always", "never"))},
    "data": SECTION,
}
"""The fields of :func:`base_config`. Those of its evaluation and data are checked where they are used."""


def validate(config: ConfigDict) -> None:
    """Checks the values of the shared fields.

    Args:
        config: A config made of :func:`base_config`.

    Raises:
        UserError: Naming the field, its value and what it can be.
    """
    check_fields(config, "config", SHARED, _BEGIN, others=config)
    if config.study.num_inner == 1:
        raise UserError("config.study.num_inner=1: must be 0 or at least 2 (one part would be all of it)")
    validate_search(config)
    if config.train.loss != "focal" and (len(config.grid.focal_gamma) or len(config.search.focal_gamma)):
        raise UserError("config.train.loss='bce' has no focal_gamma to try: set config.train.loss to 'focal'")
    evaluation = resolve_evaluation(config.evaluation.to_dict())
    if config.study.num_inner == 0:
        if config.train.patience:
            raise UserError(
                "config.train.patience needs an inner split to watch: set config.study.num_inner to 2 or more, or "
                "patience to 0"
            )
        if any(len(values) > 1 for values in config.grid.values()):
            raise UserError("config.grid is chosen from on inner splits: set config.study.num_inner to 2 or more")
        if evaluation["thresholds"] in TUNED_MODES:
            raise UserError(
                f"config.evaluation.thresholds={evaluation['thresholds']!r} is tuned on inner splits: set "
                "config.study.num_inner to 2 or more, or thresholds to 'fixed'"
            )


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
