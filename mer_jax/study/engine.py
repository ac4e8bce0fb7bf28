"""The compiled training program: a block of members, many steps a call by scan.

A member never meets another: there is no collective anywhere, and a block of members runs on one device from its
first step to its last. Several devices work on several blocks with the very same program, which is what makes a
member's result bitwise independent of the number of devices.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mer_jax.models.losses import (
    balanced_class_weight,
    balanced_positive_weight,
    binary_focal_loss,
    softmax_focal_loss,
)
from mer_jax.models.products import Factors, with_factors
from mer_jax.models.registry import Learner
from mer_jax.models.stored import Stored
from mer_jax.study.adam import adam_update, init_adam
from mer_jax.study.devices import current_platform
from mer_jax.study.members import stream


class Recipe(NamedTuple):
    """The static part of a training recipe, equal for all members of a study.

    Attributes:
        epochs: Number of passes over a member's training samples.
        batch_size: Samples a step, B.
        optimiser: ``'adamw'``, or ``'adam'`` (whose weight decay is an L2 term in the gradient, as in PyTorch).
        schedule: ``'cosine'``: a half cosine to 0 after the warm-up; ``'constant'``.
        warmup_fraction: Share of all steps over which the learning rate rises linearly from 0.
        exclusive: Whether a sample has exactly one class (softmax) or any number of labels (sigmoids).
        focal_gamma: Exponent of the focal loss for all members, 0 for cross-entropy; None takes each member's own.
        balanced: Whether classes weigh by the member's training samples: inversely to their frequency or, where labels
            are not exclusive, positives by negatives over positives.
        patience: Epochs without a better inner loss after which a member stops, and the best epoch is kept; 0 keeps
            the last epoch.
        flip: Probability that a flow sample is mirrored in training.
        shift: Greatest shift of a flow sample in training, in pixels.
        mirrored: Which channels of flow change their sign in a mirror image.
    """

    epochs: int
    batch_size: int
    optimiser: str
    schedule: str
    warmup_fraction: float
    exclusive: bool
    focal_gamma: float | None
    balanced: bool
    patience: int
    flip: float = 0.0
    shift: int = 0
    mirrored: tuple[bool, ...] = ()


@struct.dataclass
class Arrays:
    """What all members share, on the device once.

    Attributes:
        inputs: Tree of ``(F or 1, N, ...)`` arrays: the model's inputs for every held-out fold.
        labels: ``(N, C)`` float32, 0/1; 0 where unknown, which is never trained or scored.
        maps: Name of an input to ``(mean, scale)``, each ``(F, channels)``: what is subtracted and multiplied for a
            held-out fold.
    """

    inputs: Mapping
    labels: jax.Array
    maps: Mapping[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)


@struct.dataclass
class MemberInputs:
    """What tells members apart; under vmap every field has a leading member axis.

    Attributes:
        key: Typed scalar key.
        fold: int32, the held-out fold.
        train_mask: ``(N,)`` bool, samples that give gradients.
        watched: ``(V,)`` int32, inner and held-out samples, padded with 0.
        watched_inner: ``(V,)`` bool, which of them are inner.
        watched_heldout: ``(V,)`` bool, which of them are held out.
        hyper: Hyper-parameter to float32 scalar.
    """

    key: jax.Array
    fold: jax.Array
    train_mask: jax.Array
    watched: jax.Array
    watched_inner: jax.Array
    watched_heldout: jax.Array
    hyper: Mapping[str, jax.Array]


@struct.dataclass
class MemberState:
    """Everything about a member that training changes; a checkpoint is this and the history.

    Attributes:
        variables: Parameters and further collections.
        opt_state: Optimiser state.
        step: int32, updates made.
        stopped: bool, early stopping has struck.
        diverged_at: int32, the step whose loss or gradient was not finite; -1 while there is none. The member is
            frozen from then on.
        best_variables: Those of the selected epoch.
        best_loss: float32, inner loss there; infinite before the first.
        best_epoch: int32, that epoch, from 1; 0 before the first.
    """

    variables: Mapping
    opt_state: optax.ScaleByAdamState
    step: jax.Array
    stopped: jax.Array
    diverged_at: jax.Array
    best_variables: Mapping
    best_loss: jax.Array
    best_epoch: jax.Array


class Watch(NamedTuple):
    """What an epoch leaves behind, a member each; all NaN once the member has stopped or diverged.

    Attributes:
        train_loss: Mean training loss of the epoch, dropout on.
        inner_loss: Mean loss of the inner samples; NaN without an inner split.
        heldout_loss: Mean loss of the held-out samples; recorded, never chosen by.
        probabilities: ``(V, C)`` of the watched samples; recorded for the leaky column, never chosen by.
    """

    train_loss: jax.Array
    inner_loss: jax.Array
    heldout_loss: jax.Array
    probabilities: jax.Array


_HURRY = {"xla_backend_optimization_level": 1}
_WATCHED_BATCHES = 4
_LARGE_KERNEL = 1 << 14  # elements

SCHEDULES = ("cosine", "constant")
MATMUL_PRECISIONS = {"float32": "highest", "tensorfloat32": "tensorfloat32", "bfloat16": "BF16_BF16_F32"}
"""What the factors of matrix products are rounded to, and JAX's name for it; sums, batch statistics and all else are in
float32. A TPU, which has no TF32, takes three products of bfloat16 in its place."""


def sample_losses(
    recipe: Recipe, logits: jax.Array, labels: jax.Array, weight: jax.Array | None, hyper: Mapping[str, jax.Array]
) -> jax.Array:
    """The loss of every sample: ``(B, C)`` logits and labels to ``(B,)``, a mean over labels or the class's own."""
    gamma = hyper["focal_gamma"] if recipe.focal_gamma is None else recipe.focal_gamma
    if recipe.exclusive:
        return softmax_focal_loss(logits, labels, gamma=gamma, class_weight=weight)
    losses = binary_focal_loss(logits, labels, gamma=gamma, positive_weight=weight)
    return losses.mean(axis=-1)


def class_probabilities(recipe: Recipe, logits: jax.Array) -> jax.Array:
    """``(..., C)`` logits to probabilities: a softmax, or a sigmoid for each label."""
    return jax.nn.softmax(logits) if recipe.exclusive else jax.nn.sigmoid(logits)


def learning_rate(recipe: Recipe, peak: jax.Array, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """Linear warm-up, then half a cosine to 0 or no change.

    Args:
        recipe: Gives ``warmup_fraction`` and ``schedule``.
        peak: Highest learning rate.
        step: Updates made so far, from 0.
        total_steps: Updates of the whole run.

    Returns:
        The learning rate of the next update, a scalar.
    """
    warmup = jnp.ceil(recipe.warmup_fraction * total_steps)
    rising = (step + 1.0) / jnp.maximum(warmup, 1.0)
    progress = (step - warmup) / jnp.maximum(total_steps - warmup, 1.0)
    falling = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0))) if recipe.schedule == "cosine" else 1.0
    return peak * jnp.where(step < warmup, rising, falling)


def take_samples(arrays: Arrays, fold: jax.Array, index: jax.Array, stored: Sequence[str] = ()) -> Mapping:
    """The model's inputs of samples ``index`` ``(B,)``, as prepared for held-out fold ``fold``.

    Args:
        arrays: The data.
        fold: int32, the held-out fold.
        index: ``(B,)`` int32.
        stored: Names of inputs to leave where they lie.

    Returns:
        Arrays ``(B, ...)``, or :class:`Stored` of the same shape.
    """
    samples = {name: jax.tree.map(lambda x: Stored(x, fold, index), tree) for name, tree in arrays.inputs.items()}
    taken = {name: tree if name in stored else _fetched(tree) for name, tree in samples.items()}
    for name, (mean, scale) in arrays.maps.items():
        broadcast = (1,) * (taken[name].ndim - 1) + (-1,)  # (channels,) -> (1, ..., channels)
        taken[name] = (taken[name] - mean[fold].reshape(broadcast)) * scale[fold].reshape(broadcast)
    return taken


def _fetched(tree):
    return jax.tree.map(Stored.fetch, tree, is_leaf=lambda node: isinstance(node, Stored))


def augment_flow(flow: jax.Array, key: jax.Array, flip: float, shift: int, mirrored: tuple[bool, ...]) -> jax.Array:
    """Mirrors and moves flow fields at random, every sample by itself.

    A sample's draw depends on the key and its place in the batch alone, not on the size of the batch.

    Args:
        flow: ``(B, H, W, C)``, 0 where nothing moves.
        key: Random key.
        flip: Probability of a mirror image, in which the channels of ``mirrored`` change their sign, too.
        shift: Greatest shift in whole pixels in either direction; zeros come in at the border.
        mirrored: Whether a channel is a horizontal displacement, C of them.

    Returns:
        ``(B, H, W, C)``.
    """
    batch, height, width, channels = flow.shape
    draws = jax.random.uniform(key, (batch, 3))
    if flip:
        sign = jnp.where(jnp.asarray(mirrored), -1.0, 1.0).reshape(1, 1, 1, -1)
        flow = jnp.where((draws[:, 0] < flip)[:, None, None, None], flow[:, :, ::-1] * sign, flow)
    if shift:
        padded = jnp.pad(flow, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        starts = jnp.floor(draws[:, 1:] * (2 * shift + 1)).astype(jnp.int32)  # (B, 2)
        flow = jax.vmap(
            lambda image, start: jax.lax.dynamic_slice(image, (start[0], start[1], 0), (height, width, channels))
        )(padded, starts)
    return flow


def init_member(learner: Learner, recipe: Recipe, arrays: Arrays, member: MemberInputs) -> MemberState:
    """A member before its first step. Written for one member; vmap it."""
    first = take_samples(arrays, member.fold, jnp.zeros(1, jnp.int32), learner.stored)
    variables = learner.init(stream(member.key, "init"), first)
    return MemberState(
        variables=variables,
        opt_state=init_adam(variables["params"]),
        step=jnp.int32(0),
        stopped=jnp.bool_(False),
        diverged_at=jnp.int32(-1),
        best_variables=variables,
        best_loss=jnp.float32(jnp.inf),
        best_epoch=jnp.int32(0),
    )


def predict_samples(
    learner: Learner, variables: Mapping, arrays: Arrays, fold: jax.Array, index: jax.Array, batch: int
):
    """Runs a member over samples, a batch at a time so that memory stays bounded.

    Args:
        learner: The model.
        variables: Its variables.
        arrays: The data.
        fold: int32, the member's held-out fold.
        index: ``(V,)`` int32.
        batch: Most samples at a time; the last batch is padded, nothing is dropped.

    Returns:
        Logits ``(V, C)`` and a dict of the attention averaged over queries, encoder to ``(V, T)``.
    """
    count = index.shape[0]
    batch = -(-count // -(-count // batch))  # as many a call, and as little padding
    padded = jnp.pad(index, (0, -count % batch)).reshape(-1, batch)  # (V,) -> (batches, batch)

    def run(rows):
        logits, _, extras = learner.apply(
            variables, take_samples(arrays, fold, rows, learner.stored), jnp.ones(batch, bool), False, None, None
        )
        return logits, {name: weights.mean(axis=1) for name, weights in extras.get("attention", {}).items()}

    outputs = jax.lax.map(run, padded)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], outputs)  # (batches, batch, ...) -> (V, ...)


def predict_watched(
    learner: Learner, recipe: Recipe, variables: Mapping, arrays: Arrays, member: MemberInputs
) -> jax.Array:
    """Logits ``(V, C)`` of a member's inner and held-out samples.

    With more of them at a time than in training, as there are no gradients to keep, kernels are read less often.
    """
    batch = recipe.batch_size * _WATCHED_BATCHES
    return predict_samples(learner, variables, arrays, member.fold, member.watched, batch)[0]


def _masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` where ``mask``; NaN where it selects nothing."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.sum(mask)


def _gradient_size(gradients) -> jax.Array:
    """A sum of squares that is finite where all gradients are.

    The gradient of a large kernel is a product of two matrices, so that what is not finite in one of them spoils a
    whole row or column. Its first row and its first column meet all of these; reading all of it takes as long as a
    tenth of the update. What overflows in the product alone makes the next step's loss NaN, or the predictions. Where
    the two matrices are at hand, no square in their product is larger than the product of their sums of squares
    (Cauchy and Schwarz).
    """
    witnesses, bounds = [], 0.0
    for gradient in jax.tree.leaves(gradients, is_leaf=lambda node: isinstance(node, Factors)):
        if isinstance(gradient, Factors):
            bounds += _squares(gradient.left.ravel()) * _squares(gradient.right.ravel())
        elif gradient.ndim < 2 or gradient.size < _LARGE_KERNEL:
            witnesses.append(gradient.ravel())
        else:
            matrix = gradient.reshape(-1, gradient.shape[-1])
            witnesses += [matrix[0], matrix[:, 0]]
    # A sum for each of them would be three programs of XLA's, longer to call than run.
    return _squares(jnp.concatenate(witnesses)) + bounds


def _squares(values: jax.Array) -> jax.Array:
    return jnp.dot(values, values, precision="highest")


def train_epoch(
    learner: Learner,
    recipe: Recipe,
    num_steps: int,
    last_batch: int,
    arrays: Arrays,
    member: MemberInputs,
    state: MemberState,
    epoch,
) -> tuple[MemberState, Watch]:
    """One epoch of one member, then a look at its inner and held-out samples; vmap it.

    Args:
        learner: The model.
        recipe: The recipe.
        num_steps: Steps a pass, enough for the study's largest training fold; steps beyond a member's own samples
            change nothing.
        last_batch: Size of the last of these steps where it need not be a full batch; 0 for a full one.
        arrays: The data.
        member: The member.
        state: Its state.
        epoch: int32, from 1.

    Returns:
        The new state and what was seen.
    """
    running = ~state.stopped & (state.diverged_at < 0) & (epoch <= recipe.epochs)
    train_size = jnp.sum(member.train_mask)
    own_steps = -(-train_size // recipe.batch_size)
    total_steps = own_steps * recipe.epochs
    # Ranks of one uniform number a sample: the order depends on the data set and the key alone, not on how many
    # steps the study's largest fold needs.
    draw = jax.random.uniform(jax.random.fold_in(stream(member.key, "order"), epoch), member.train_mask.shape)
    order = jnp.argsort(jnp.where(member.train_mask, draw, 2.0))
    order = jnp.pad(order, (0, max(0, num_steps * recipe.batch_size - order.shape[0])))
    balance = balanced_class_weight if recipe.exclusive else balanced_positive_weight
    weight = balance(arrays.labels, member.train_mask) if recipe.balanced else None

    def step(state: MemberState, number, size):
        offset = number * recipe.batch_size
        index = jax.lax.dynamic_slice(order, (offset,), (size,))
        sample_mask = offset + jnp.arange(size) < train_size
        inputs, labels = take_samples(arrays, member.fold, index, learner.stored), arrays.labels[index]
        if recipe.flip or recipe.shift:
            draw_key = jax.random.fold_in(stream(member.key, "augment"), state.step)
            inputs["flow"] = augment_flow(inputs["flow"], draw_key, recipe.flip, recipe.shift, recipe.mirrored)
        dropout_key = jax.random.fold_in(stream(member.key, "dropout"), state.step)

        def loss_fn(params, taps):
            variables = {**state.variables, "params": params, "taps": taps}
            logits, collections, _ = learner.apply(variables, inputs, sample_mask, True, member.hyper, dropout_key)
            losses = sample_losses(recipe, logits, labels, weight, member.hyper)
            loss = jnp.sum(losses * sample_mask) / jnp.maximum(jnp.sum(sample_mask), 1)
            return loss, collections

        params = state.variables["params"]
        (loss, collections), (gradients, factors) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(
            params, learner.taps(params, size)
        )
        gradients = with_factors(gradients, factors)
        active = running & jnp.any(sample_mask) & (state.diverged_at < 0)
        finite = jnp.isfinite(loss) & jnp.isfinite(_gradient_size(gradients))
        update = active & finite
        params, opt_state = adam_update(
            params,
            gradients,
            state.opt_state,
            optimiser=recipe.optimiser,
            rate=learning_rate(recipe, member.hyper["learning_rate"], state.step, total_steps),
            weight_decay=member.hyper["weight_decay"],
            update=update,
        )
        others = {name: state.variables[name] for name in collections}
        collections = jax.tree.map(lambda new, old: jnp.where(update, new, old), dict(collections), others)
        state = state.replace(
            variables={**state.variables, **collections, "params": params},
            opt_state=opt_state,
            step=state.step + update.astype(jnp.int32),
            diverged_at=jnp.where(active & ~finite, state.step, state.diverged_at),
        )
        count = jnp.where(active, jnp.sum(sample_mask), 0)
        return state, (jnp.where(active, loss, 0.0) * count, count)

    full_steps = num_steps - 1 if last_batch else num_steps
    state, (loss_sums, counts) = jax.lax.scan(
        functools.partial(step, size=recipe.batch_size), state, jnp.arange(full_steps)
    )
    if last_batch:
        state, (loss_sum, count) = step(state, jnp.int32(full_steps), last_batch)
        loss_sums, counts = jnp.append(loss_sums, loss_sum), jnp.append(counts, count)

    logits = predict_watched(learner, recipe, state.variables, arrays, member)
    losses = sample_losses(recipe, logits, arrays.labels[member.watched], weight, member.hyper)
    inner_loss = _masked_mean(losses, member.watched_inner)
    if recipe.patience:
        # A finite training loss may hide an overflow that only the evaluation meets; no epoch could be chosen then.
        overflow = running & (state.diverged_at < 0) & jnp.any(member.watched_inner) & ~jnp.isfinite(inner_loss)
        state = state.replace(diverged_at=jnp.where(overflow, state.step, state.diverged_at))
    running = running & (state.diverged_at < 0)
    chosen = jnp.where(jnp.any(member.watched_inner), inner_loss < state.best_loss, True) if recipe.patience else True
    better = running & chosen
    state = state.replace(
        best_variables=jax.lax.cond(
            better, lambda new, old: new, lambda new, old: old, state.variables, state.best_variables
        ),
        best_loss=jnp.where(better, inner_loss, state.best_loss),
        best_epoch=jnp.where(better, epoch, state.best_epoch),
    )
    if recipe.patience:
        state = state.replace(stopped=state.stopped | (epoch - state.best_epoch >= recipe.patience))
    watch = Watch(
        train_loss=jnp.sum(loss_sums) / jnp.sum(counts),
        inner_loss=inner_loss,
        heldout_loss=_masked_mean(losses, member.watched_heldout),
        probabilities=class_probabilities(recipe, logits),
    )
    # How long the neighbours go on must not show in a member's curves.
    return state, jax.tree.map(lambda x: jnp.where(running, x, jnp.nan), watch)


def finish_member(
    learner: Learner, recipe: Recipe, arrays: Arrays, member: MemberInputs, state: MemberState
) -> dict[str, jax.Array]:
    """Predictions of a member's selected epoch; vmap it.

    Returns:
        ``probabilities`` ``(N, C)`` of every sample, NaN for a diverged member; ``diverged_at`` as in
        :class:`MemberState`, or the last step where it broke what no later step could meet; ``attention_<encoder>``
        ``(V, T)`` of the watched samples, averaged over queries; ``gate`` ``(G,)`` for models that have one.
    """
    everything = jnp.arange(arrays.labels.shape[0], dtype=jnp.int32)
    logits, attention = predict_samples(
        learner, state.best_variables, arrays, member.fold, everything, recipe.batch_size
    )
    _, _, extras = learner.apply(
        state.best_variables,
        take_samples(arrays, member.fold, everything[:1], learner.stored),
        jnp.ones(1, bool),
        False,
        None,
        None,
    )
    probabilities = class_probabilities(recipe, logits)
    broken = (state.diverged_at < 0) & ~jnp.all(jnp.isfinite(probabilities))
    diverged_at = jnp.where(broken, jnp.maximum(state.step - 1, 0), state.diverged_at)
    probabilities = jnp.where(diverged_at < 0, probabilities, jnp.nan)
    watched = {f"attention_{name}": values[member.watched] for name, values in attention.items()}  # (N, T) -> (V, T)
    finished = {"probabilities": probabilities, "diverged_at": diverged_at}
    return finished | watched | ({"gate": extras["gate"]} if "gate" in extras else {})


def unseen(arrays: Arrays, members: MemberInputs, *leading: int) -> Watch:
    """What is seen of epochs that are not reached: NaN, with axes ``leading`` before those of a member and epoch."""
    nothing = jnp.full(leading, jnp.nan, jnp.float32)
    shape = (*leading, members.watched.shape[-1], arrays.labels.shape[-1])
    return Watch(nothing, nothing, nothing, jnp.full(shape, jnp.nan, jnp.float32))


def many_epochs(
    recipe: Recipe, train: Callable, states: MemberState, epochs: jax.Array, seen: Watch
) -> tuple[MemberState, Watch]:
    """Calls ``train`` for one epoch after another, until none of the members it trains goes on.

    Args:
        recipe: Gives the last epoch.
        train: ``(states, epoch) -> (states, watch)``, of one member or of several.
        states: Before the first of them.
        epochs: ``(E,)`` int32.
        seen: Their watches, with a leading axis E, to be filled.

    Returns:
        The new states and watches.
    """

    def goes_on(carry):
        number, states, _ = carry
        running = jnp.any(~states.stopped & (states.diverged_at < 0))
        return (number < epochs.shape[0]) & running & (epochs[number] <= recipe.epochs)

    def once(carry):
        number, states, seen = carry
        states, watch = train(states, epochs[number])
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return number + 1, states, jax.tree.map(put, seen, watch)

    _, states, seen = jax.lax.while_loop(goes_on, once, (jnp.int32(0), states, seen))
    return states, seen


def in_turn(function: Callable, members: MemberInputs, *carried):
    """Calls ``function`` with one member after another; a mapping would keep what it changes twice.

    Args:
        function: ``(member, *carried) -> carried``.
        members: With a leading axis b.
        *carried: Trees with a leading axis b: what ``function`` takes of a member and returns changed.

    Returns:
        The trees, changed.
    """

    def turn(number, carried):
        member, *one = jax.tree.map(lambda x: x[number], (members, *carried))
        return jax.tree.map(
            lambda many, new: jax.lax.dynamic_update_index_in_dim(many, new, number, 0),
            carried,
            tuple(function(member, *one)),
        )

    return jax.lax.fori_loop(0, members.fold.shape[0], turn, carried)


class Programs(NamedTuple):
    """The three compiled functions of a study, each over a block of members (leading axis b).

    Attributes:
        init: ``(arrays, members) -> states``.
        epochs: ``(arrays, members, states, epochs (E,)) -> (states, Watch with (b, E, ...))``; donates the states.
        finish: ``(arrays, members, states) -> dict of (b, ...)``.
    """

    init: Callable
    epochs: Callable
    finish: Callable


def make_programs(
    learner: Learner, recipe: Recipe, num_steps: int, last_batch: int = 0, one_by_one: bool = False
) -> Programs:
    """Jitted functions of a block of members. One trace and one program each, whatever the number of members.

    Args:
        learner: The model.
        recipe: The recipe.
        num_steps: Steps an epoch of the study's largest training fold.
        last_batch: As in :func:`train_epoch`; made an eighth of a full one, or several, for vectorised members.
        one_by_one: Whether a block's members take turns instead of being vectorised.

    Returns:
        The programs.
    """
    if not one_by_one:
        # Accelerators cut long sums over samples into equal parts, and would copy all maps to make them equal.
        unit = max(1, recipe.batch_size // 8)
        last_batch = min(-(-last_batch // unit) * unit, recipe.batch_size)

    def epochs(arrays, members, states, numbers):
        def one(member, state, epoch):
            return train_epoch(learner, recipe, num_steps, last_batch, arrays, member, state, epoch)

        def all_epochs(member, state, seen):
            return many_epochs(recipe, functools.partial(one, member), state, numbers, seen)

        block, count = members.fold.shape[0], numbers.shape[0]
        if one_by_one:
            return in_turn(all_epochs, members, states, unseen(arrays, members, block, count))
        together = functools.partial(jax.vmap(one, in_axes=(0, 0, None)), members)
        states, seen = many_epochs(recipe, together, states, numbers, unseen(arrays, members, count, block))
        return states, jax.tree.map(lambda x: x.swapaxes(0, 1), seen)  # (E, b, ...) -> (b, E, ...)

    def finish(arrays, members, states):
        one = functools.partial(finish_member, learner, recipe, arrays)
        return jax.lax.map(lambda pair: one(*pair), (members, states)) if one_by_one else jax.vmap(one)(members, states)

    init = jax.vmap(functools.partial(init_member, learner, recipe), in_axes=(None, 0))
    return Programs(
        # It runs once a block, for less time than a CPU's compiler would take to make it fast.
        init=jax.jit(init, compiler_options=_HURRY if current_platform() == "cpu" else None),
        epochs=jax.jit(epochs, donate_argnums=2),
        finish=jax.jit(finish),
    )


def stack_members(members: list[MemberInputs]) -> MemberInputs:
    """Members ``[...]`` to one tree with a leading member axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member_inputs(
    key: jax.Array,
    fold: int,
    hyper: Mapping[str, float],
    train: np.ndarray,
    inner: np.ndarray,
    heldout: np.ndarray,
    num_watched: int,
) -> MemberInputs:
    """Lays out one member.

    Args:
        key: Its key.
        fold: Its held-out fold.
        hyper: Its hyper-parameters.
        train: ``(N,)`` bool, samples that give gradients.
        inner: ``(N,)`` bool, samples of its inner split.
        heldout: ``(N,)`` bool, held-out samples.
        num_watched: V, at least the number of inner and held-out samples.

    Returns:
        The member's fields, held-out samples first in ``watched``.
    """
    index = np.concatenate([np.flatnonzero(heldout), np.flatnonzero(inner)])
    padding = num_watched - len(index)
    kind = np.concatenate([np.zeros(heldout.sum()), np.ones(inner.sum()), np.full(padding, 2)])
    return MemberInputs(
        key=key,
        fold=jnp.int32(fold),
        train_mask=jnp.asarray(train),
        watched=jnp.asarray(np.pad(index, (0, padding)), jnp.int32),
        watched_inner=jnp.asarray(kind == 1),
        watched_heldout=jnp.asarray(kind == 0),
        hyper={name: jnp.float32(value) for name, value in hyper.items()},
    )
