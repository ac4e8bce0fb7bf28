"""Config to model: the one place that knows which models there are, and how the engine sees them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from mer_jax.errors import UserError
from mer_jax.models.fusion import DROPOUT_KINDS, FUSIONS, FusionClassifier


class Learner(NamedTuple):
    """A model as the study engine sees it.

    Attributes:
        init: ``(key, inputs) -> variables``, where ``inputs`` is a batch of one sample and ``variables`` has
            ``params`` and, for models with running statistics, further collections.
        apply: ``(variables, inputs, sample_mask, train, hyper, dropout_key) -> (logits (B, C), collections, extras)``.
            ``sample_mask`` ``(B,)`` is False for padding; ``hyper`` maps hyper-parameters to traced scalars and
            ``dropout_key`` is a key (both None unless ``train``); ``collections`` are the further collections after
            the call; ``extras`` may hold ``attention`` (encoder to ``(B, Q, T)``) and ``gate`` ``(G,)``.
        gate_names: What the gate weighs, in its order; empty for a model without one.
    """

    init: Callable
    apply: Callable
    gate_names: tuple[str, ...] = ()


def build_learner(config: Mapping, modalities: tuple[str, ...], num_classes: int) -> Learner:
    """Makes the model of a config.

    Args:
        config: ``config.model``; ``config.name`` chooses the model.
        modalities: The modalities of the data, in the order of fusion.
        num_classes: Number of labels.

    Returns:
        The model in the engine's form.

    Raises:
        UserError: Naming the field that is off.
    """
    if config["name"] != "fusion":
        raise UserError(f"config.model.name={config['name']!r}: must be 'fusion'")
    for field, allowed in (("fusion", FUSIONS), ("feature_dropout_kind", DROPOUT_KINDS)):
        if config[field] not in allowed:
            raise UserError(f"config.model.{field}={config[field]!r}: must be one of {', '.join(map(repr, allowed))}")
    queries = config["num_queries"]
    missing = [modality for modality in modalities if modality not in queries]
    if missing:
        raise UserError(f"config.model.num_queries has no entry for {', '.join(missing)}; add its number of queries")
    sizes = {"key_dim": config["key_dim"], "hidden_dim": config["hidden_dim"]}
    for field, value in (sizes | {f"num_queries.{modality}": queries[modality] for modality in modalities}).items():
        if value < 1:
            raise UserError(f"config.model.{field}={value!r}: must be at least 1")
    if config["concat_width"] < 0:
        raise UserError(f"config.model.concat_width={config['concat_width']!r}: must be at least 0")
    model = FusionClassifier(
        num_queries={modality: queries[modality] for modality in modalities},
        num_classes=num_classes,
        fusion=config["fusion"],
        concat_width=config["concat_width"],
        feature_dropout_kind=config["feature_dropout_kind"],
        **sizes,
    )

    def init(key, inputs):
        return model.init(key, inputs["features"], inputs["frame_mask"])

    def apply(variables, inputs, sample_mask, train, hyper, dropout_key):
        del sample_mask  # no statistic of this model runs over samples
        rates = {name: hyper[name] for name in ("dropout", "feature_dropout")} if train else {}
        logits, extras = model.apply(
            variables,
            inputs["features"],
            inputs["frame_mask"],
            train=train,
            rngs={"dropout": dropout_key} if train else None,
            **rates,
        )
        return logits, {}, extras

    gated = model.fusion == "gate" and len(modalities) > 1
    return Learner(init, apply, tuple(modalities) if gated else ())
