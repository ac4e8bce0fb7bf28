"""Config to model: the one place that knows which models there are, and how the engine sees them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mer_jax.errors import UserError
from mer_jax.fields import FLAG, MANY, SECTION, TEXT, Kind, Kinds, check_fields, one_of, whole
from mer_jax.models import cpu_blocks, cpu_fusion, mqa, pieces, tiles
from mer_jax.models.convolution import Implementation
from mer_jax.models.fusion import DROPOUT_KINDS, FUSIONS, FusionClassifier
from mer_jax.models.micro_attnet import MicroAttNet
from mer_jax.models.products import no_factors
from mer_jax.models.ststnet import STSTNet

CONVOLUTIONAL = ("micro_attnet", "ststnet")
"""Models whose time goes into the maps of convolutions."""

_POSITIVE = whole(1)


def _pair(most: int) -> Kind:
    each = whole(1, most)
    return Kind(
        lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(each.holds, value)),
        f"two whole numbers from 1 to {most}",
    )


_FIELDS: Mapping[str, Kinds] = {
    "fusion": {
        "fusion": one_of(FUSIONS),
        "num_queries": SECTION,
        "key_dim": _POSITIVE,
        "hidden_dim": _POSITIVE,
        "feature_dropout_kind": one_of(DROPOUT_KINDS),
        "concat_width": whole(0),
    },
    "micro_attnet": {
        "attention": FLAG,
        "se_stream": TEXT,
        "features": _pair(MANY),
        "kernels": _pair(MANY),
        "pools": _pair(255),  # pixels of a window are counted in two bytes
        "attention_hidden": _POSITIVE,
        "se_reduction": _POSITIVE,
        "hidden_dim": _POSITIVE,
    },
    "ststnet": {},
}
_BEGIN = {
    "fusion": "begin a config with get_config() of configs/fusion.py",
    "micro_attnet": "begin a config with get_config() of configs/micro_attnet.py",
    "ststnet": "begin a config with get_config() of configs/megc2019.py",
}


class Learner(NamedTuple):
    """A model as the study engine sees it.

    Attributes:
        init: ``(key, inputs) -> variables``, where ``inputs`` is a batch of one sample and ``variables`` has
            ``params`` and, for models with running statistics, further collections.
        apply: ``(variables, inputs, sample_mask, train, hyper, dropout_key) -> (logits (B, C), collections, extras)``.
            ``sample_mask`` ``(B,)`` is False for padding; ``hyper`` maps hyper-parameters to traced scalars and
            ``dropout_key`` is a key (both None unless ``train``); ``collections`` are the further collections after
            the call; ``extras`` may hold ``attention`` (encoder to ``(B, Q, T)``) and ``gate`` ``(G,)``.
        stored: Inputs that ``apply`` and ``init`` also take as :class:`mer_jax.models.stored.Stored`, and had better.
        taps: ``(params, B) -> taps``: what ``variables['taps']`` may hold in training on batches of B, so that kernels'
            gradients come as :class:`mer_jax.models.products.Factors`; nested by name, empty for no kernels.
        gate_names: What the gate weighs, in its order; empty for a model without one.
        stream_names: What attention over streams weighs, in its order; empty for a model without it.
    """

    init: Callable
    apply: Callable
    stored: tuple[str, ...] = ()
    taps: Callable = lambda params, batch: {}
    gate_names: tuple[str, ...] = ()
    stream_names: tuple[str, ...] = ()


def check_model(config: Mapping, channels: Sequence[str], flow: bool) -> None:
    """Checks the fields of a model.

    Args:
        config: ``config.model``.
        channels: What the model fuses, as :func:`build_learner` takes it.
        flow: Whether these are channels of flow rather than modalities of features.

    Raises:
        UserError: Naming the field that is off.
    """
    check_fields(
        config, "config.model", {"name": one_of(_FIELDS)}, "begin a config with a file of configs/", others=config
    )
    name = config["name"]
    if (name in CONVOLUTIONAL) != flow:
        fitting = ", ".join(repr(other) for other in _FIELDS if (other in CONVOLUTIONAL) == flow)
        raise UserError(
            f"config.model.name={name!r}: a study of {'flow' if flow else 'features'} needs one of {fitting}"
        )
    # Another model's fields may have stayed where --config.model.name has changed.
    others = {"name"}.union(*_FIELDS.values())
    check_fields(config, "config.model", _FIELDS[name], _BEGIN[name], others)
    if name == "fusion":
        queries = dict.fromkeys(channels, _POSITIVE)
        check_fields(
            config["num_queries"],
            "config.model.num_queries",
            queries,
            "add its number of queries",
            config["num_queries"],
        )
    if name == "micro_attnet":
        se_stream = config["se_stream"]
        if se_stream and se_stream not in channels:
            raise UserError(
                f"config.model.se_stream={se_stream!r}: must be one of config.data.channels ({', '.join(channels)}), "
                "or ''"
            )
        if any(kernel % 2 == 0 for kernel in config["kernels"]):
            raise UserError(
                f"config.model.kernels={tuple(config['kernels'])}: must be odd, so that maps keep their size"
            )


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
    check_model(config, channels, config.get("name") in CONVOLUTIONAL)
    return builders[config["name"]](config, tuple(channels), num_classes, platform)


def _implementation(platform: str) -> Implementation:
    if platform != "cpu":
        return tiles.IMPLEMENTATION
    return cpu_blocks.IMPLEMENTATION if cpu_blocks.version() else pieces.IMPLEMENTATION


def _build_micro_attnet(config: Mapping, channels: tuple[str, ...], num_classes: int, platform: str) -> Learner:
    se_stream = config["se_stream"]
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
        implementation=_implementation(platform),
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


def _build_ststnet(config: Mapping, channels: tuple[str, ...], num_classes: int, platform: str) -> Learner:
    del config, channels
    model = STSTNet(num_classes, _implementation(platform))

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


def _build_fusion(config: Mapping, modalities: tuple[str, ...], num_classes: int, platform: str) -> Learner:
    compiled = platform == "cpu" and bool(cpu_fusion.version())
    queries = config["num_queries"]
    model = FusionClassifier(
        num_queries={modality: queries[modality] for modality in modalities},
        num_classes=num_classes,
        fusion=config["fusion"],
        concat_width=config["concat_width"],
        feature_dropout_kind=config["feature_dropout_kind"],
        key_dim=config["key_dim"],
        hidden_dim=config["hidden_dim"],
        implementation=cpu_fusion.IMPLEMENTATION if compiled else mqa.IMPLEMENTATION,
    )

    def init(key, inputs):
        return model.init(key, inputs["features"], inputs["frame_mask"])

    def taps(params, batch):
        return {
            name: {
                "key_kernel": no_factors(own["query"].shape[0], own["key_kernel"]),
                "value_kernel": no_factors(batch, own["value_kernel"]),
            }
            for name, own in params.items()
            if name.startswith("pool_")
        }

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
    return Learner(init, apply, ("features",), taps, tuple(modalities) if gated else ())
