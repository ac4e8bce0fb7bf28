"""Config to model: the one place that knows which models there are, and how the engine sees them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mer_jax.errors import UserError
from mer_jax.models.fusion import DROPOUT_KINDS, FUSIONS, FusionClassifier
from mer_jax.models.micro_attnet import MicroAttNet
from mer_jax.models.ststnet import STSTNet

CONVOLUTIONAL = ("micro_attnet", "ststnet")
"""Models whose time goes into the maps of convolutions."""

# What of a convolution's maps a core of a CPU keeps at hand (measured: see benchmarks/micro_attnet.py).
_CACHE_BYTES = 1 << 20


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
        stream_names: What attention over streams weighs, in its order; empty for a model without it.
    """

    init: Callable
    apply: Callable
    gate_names: tuple[str, ...] = ()
    stream_names: tuple[str, ...] = ()


def build_learner(config: Mapping, channels: Sequence[str], num_classes: int, platform: str = "") -> Learner:
    """Makes the model of a config.

    Args:
        config: ``config.model``; ``config.name`` chooses the model.
        channels: What the model fuses, in order: modalities of features, or channels of flow.
        num_classes: Number of labels.
        platform: Where it is to be trained, ``'cpu'`` or another; changes speed alone.

    Returns:
        The model in the engine's form.

    Raises:
        UserError: Naming the field that is off.
    """
    builders = {"fusion": _build_fusion, "micro_attnet": _build_micro_attnet, "ststnet": _build_ststnet}
    if config["name"] not in builders:
        raise UserError(f"config.model.name={config['name']!r}: must be one of {', '.join(map(repr, builders))}")
    return builders[config["name"]](config, tuple(channels), num_classes, _CACHE_BYTES if platform == "cpu" else 0)


def _build_micro_attnet(config: Mapping, channels: tuple[str, ...], num_classes: int, cache_bytes: int) -> Learner:
    se_stream = config["se_stream"]
    if se_stream and se_stream not in channels:
        raise UserError(
            f"config.model.se_stream={se_stream!r}: must be one of config.data.channels ({', '.join(channels)}), or ''"
        )
    for field in ("features", "kernels", "pools"):
        if len(config[field]) != 2 or min(config[field]) < 1:
            raise UserError(f"config.model.{field}={tuple(config[field])}: must be two numbers of at least 1")
    if any(kernel % 2 == 0 for kernel in config["kernels"]):
        raise UserError(f"config.model.kernels={tuple(config['kernels'])}: must be odd, so that maps keep their size")
    for field in ("attention_hidden", "se_reduction", "hidden_dim"):
        if config[field] < 1:
            raise UserError(f"config.model.{field}={config[field]!r}: must be at least 1")
    model = MicroAttNet(
        num_classes=num_classes,
        se_stream=channels.index(se_stream) if se_stream else -1,
        attention=config["attention"],
        features=tuple(config["features"]),
        kernels=tuple(config["kernels"]),
        pools=tuple(config["pools"]),
        attention_hidden=config["attention_hidden"],
        se_reduction=config["se_reduction"],
        hidden_dim=config["hidden_dim"],
        cache_bytes=cache_bytes,
    )

    def init(key, inputs):
        _check_size(inputs["flow"].shape, config["pools"][0] * config["pools"][1])
        return model.init(key, inputs["flow"])

    def apply(variables, inputs, sample_mask, train, hyper, dropout_key):
        rates = {name: hyper[name] for name in ("dropout", "feature_dropout")} if train else {}
        (logits, extras), collections = model.apply(
            variables,
            inputs["flow"],
            sample_mask,
            train=train,
            rngs={"dropout": dropout_key} if train else None,
            mutable=["batch_stats"] if train else [],
            **rates,
        )
        return logits, collections, extras

    return Learner(init, apply, stream_names=channels if config["attention"] else ())


def _build_ststnet(config: Mapping, channels: tuple[str, ...], num_classes: int, cache_bytes: int) -> Learner:
    del config, channels
    model = STSTNet(num_classes, cache_bytes)

    def init(key, inputs):
        _check_size(inputs["flow"].shape, 4)
        return model.init(key, inputs["flow"])

    def apply(variables, inputs, sample_mask, train, hyper, dropout_key):
        logits, collections = model.apply(
            variables,
            inputs["flow"],
            sample_mask,
            train=train,
            rngs={"dropout": dropout_key} if train else None,
            mutable=["batch_stats"] if train else [],
            **({"dropout": hyper["dropout"]} if train else {}),
        )
        return logits, collections, {}

    return Learner(init, apply)


def _check_size(shape: tuple[int, ...], least: int) -> None:
    if min(shape[1:3]) < least:
        raise UserError(
            f"config.data.size: flow of {shape[2]} x {shape[1]} pixels is pooled away, at least {least} are needed; "
            "set a larger size or smaller config.model.pools"
        )


def _build_fusion(config: Mapping, modalities: tuple[str, ...], num_classes: int, cache_bytes: int) -> Learner:
    del cache_bytes  # its maps are small
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
