"""How much arithmetic and memory traffic a member-step needs, and the least time in which this machine could do it.

Everything is counted per *member-step*: one update of one member with a full batch, and its share of the look at
inner and held-out samples that ends an epoch. Arithmetic is additions, multiplications and comparisons of float32 (a
multiplication and an addition of a matrix product are two), bytes are those of float32.

Bytes are told twice. *Needed* takes a phase as a whole: it reads what it is given and writes what it hands on, once
each, and what lives inside of a phase is free; forward hands on what backward cannot do without. *Layer by layer* is
what a framework moves that writes every layer's result before the next begins. The floor of a phase is the longer of
arithmetic over the machine's rate of matrix products and bytes over its bandwidth; the floor of a step is their sum.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jobs import WIDTHS, Job, on_threads, prepare_engine, seconds, take_turns
from mer_jax.models.products import with_factors
from mer_jax.models.stored import Stored
from mer_jax.study.engine import predict_watched, sample_losses, take_samples

PHASES = ("gather", "dropout", "forward", "backward", "update", "watch")
_FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network for a batch; sizes are numbers of values.

    Attributes:
        name: What it is.
        arithmetic: Operations of its forward pass.
        inputs: Values that it reads, without parameters.
        outputs: Values that it writes.
        parameters: Its parameters.
        backward: Arithmetic of its backward pass over that of its forward pass: 2 for a product whose factors both
            need gradients, 1 where one of them does or the layer is element-wise.
        to_inputs: Whether a gradient goes on to the inputs; not to data.
        kept: Values that backward cannot do without and that are not given anyway.
        handed_on: Values of the gradient of its parameters as it is handed on to the update, where that is as factors
            of a product; 0 for the gradient itself.
    """

    name: str
    arithmetic: float
    inputs: float
    outputs: float
    parameters: int = 0
    backward: float = 1.0
    to_inputs: bool = True
    kept: float = 0
    handed_on: float = 0

    @property
    def gradients(self) -> float:
        """Values that the update gets of it."""
        return self.handed_on or self.parameters


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase takes for one member-step.

    Attributes:
        arithmetic: Operations.
        needed: Bytes, the phase taken as a whole.
        layered: Bytes, layer by layer.
    """

    arithmetic: float
    needed: float
    layered: float

    def scaled(self, factor: float) -> "Work":
        """``factor`` times as much."""
        return Work(self.arithmetic * factor, self.needed * factor, self.layered * factor)

    def floor(self, machine: "Machine", *, layered: bool = False) -> float:
        """Least seconds on a machine."""
        moved = self.layered if layered else self.needed
        return max(self.arithmetic / machine.arithmetic, moved / machine.bandwidth)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine reached in this process, all cores together.

    Attributes:
        arithmetic: Operations a second of large float32 matrix products.
        bandwidth: Bytes a second of a triad over arrays far larger than the caches.
        told: Rate and bandwidth of each library, for the record.
    """

    arithmetic: float
    bandwidth: float
    told: dict[str, float]


def dense(name: str, batch: float, width: int, features: int, **fields) -> Layer:
    """A product ``(B, D) (D, F)``: ``2 B D F`` operations, and as many for each of its two gradients."""
    fields = {"backward": 2.0, "parameters": width * features} | fields
    return Layer(name, 2 * batch * width * features, batch * width, batch * features, **fields)


def elementwise(name: str, values: float, operations: float, **fields) -> Layer:
    """``operations`` for each of so many values, and about as many backwards."""
    return Layer(name, operations * values, values, values, **fields)


def fusion_layers(model, batch: float, frames: int, num_classes: int) -> list[Layer]:
    """The layers of the fusion classifier as computed here: neither keys nor values are made.

    With B samples, T frames of D values, Q queries of width d and a head of width H, a modality takes: probes
    ``Q W_K^T`` (2 Q d D), scores of the raw frames (2 B T Q D), a softmax and its mean over queries (6 B Q T), pooled
    raw frames (2 B T D), and the value projection (2 B D d). Frames are data, so scores and pooling pass gradients to
    probes and attention alone. Dropout is a product of the frames with their mask, B T D. The head takes 2 B d H +
    20 B H (GELU, LayerNorm, dropout) + 2 B H C.

    Args:
        model: ``config.model``.
        batch: B.
        frames: T.
        num_classes: C.
    """
    d, hidden, layers = model.key_dim, model.hidden_dim, []
    for name, width in WIDTHS.items():
        queries = model.num_queries[name]
        frame, attended = batch * frames * width, batch * queries * frames
        layers.append(
            Layer(
                f"{name} probes",
                2 * queries * d * width,
                0,
                queries * width,
                d * (queries + width),
                backward=2.0,
                handed_on=queries * (width + 2 * d),  # two factors, and the gradient of the queries
            )
        )
        layers.append(elementwise(f"{name} dropped frames", frame, 1, to_inputs=False))
        layers += [
            Layer(
                f"{name} scores",
                2 * batch * frames * queries * width,
                frame + queries * width,
                attended,
                to_inputs=False,
            ),
            elementwise(f"{name} attention", attended, 6, kept=attended),
            Layer(f"{name} pooling", 2 * frame, frame, batch * width, kept=batch * width),
            dense(f"{name} values", batch, width, d, kept=batch * d, handed_on=batch * (width + d)),
        ]
    count = len(WIDTHS)
    return [
        *layers,
        Layer("gate", 2 * count * batch * d, count * batch * d, batch * d, count, backward=2.0, kept=batch * d),
        dense("hidden", batch, d, hidden, parameters=(d + 1) * hidden, kept=batch * hidden),
        elementwise("GELU, LayerNorm, dropout", batch * hidden, 20, parameters=2 * hidden, kept=batch * hidden),
        dense("logits", batch, hidden, num_classes, parameters=(hidden + 1) * num_classes),
    ]


def convolution_layers(
    name: str, batch: float, side: int, channels: int, features: int, kernel: int, pooled: int, *, first: bool
) -> list[Layer]:
    """Convolution, batch normalisation, ReLU and max pooling.

    The convolution takes 2 k^2 C F operations a position of its ``side x side`` maps (as many again for the gradient
    of its kernel, and of its input unless that is data), the statistics 4 (a mean, and squared deviations from it),
    the pooling a comparison; the affine map and the ReLU, which commute with pooling, take 3 a pooled value. Layer by
    layer, normalisation and ReLU each read and write the maps; backward needs no more of them than the pooled ones
    and which position won, as maps can be computed again.

    Args:
        name: What to call them.
        batch: B.
        side: Rows and columns of the convolved maps.
        channels: C.
        features: F.
        kernel: k.
        pooled: Rows and columns after the pooling.
        first: Whether the input is data.
    """
    maps, small = batch * features * side**2, batch * features * pooled**2
    product = Layer(
        f"{name} convolution",
        2 * kernel**2 * channels * maps,
        batch * channels * side**2,
        maps,
        (kernel**2 * channels + 1) * features,
        backward=1.0 if first else 2.0,
        to_inputs=not first,
    )
    return [
        product,
        elementwise(f"{name} normalisation", maps, 4, parameters=2 * features),
        Layer(f"{name} ReLU", 3 * small, maps, maps),
        Layer(f"{name} pooling", maps, maps, small, kept=1.25 * small),
    ]


def micro_attnet_layers(model, batch: float, side: int, num_classes: int, streams: int = 3) -> list[Layer]:
    """The layers of MicroAttNet: two blocks a stream, attention after each, and the classifier.

    Args:
        model: ``config.model``.
        batch: B.
        side: Rows and columns of the flow.
        num_classes: C.
        streams: S.
    """
    layers, channels = [], 1
    for block, (features, kernel, window) in enumerate(zip(model.features, model.kernels, model.pools, strict=True)):
        pooled = side // window
        for stream in range(streams):
            layers += convolution_layers(
                f"block {block + 1}.{stream + 1}", batch, side, channels, features, kernel, pooled, first=block == 0
            )
        maps = streams * batch * features * pooled**2
        hidden = model.attention_hidden
        layers += [
            elementwise(f"dropout {block + 1}", maps, 1),
            dense(f"attention {block + 1}", batch, streams * features, hidden),
            dense(f"attention {block + 1}, streams", batch, hidden, streams),
            elementwise(f"weighing {block + 1}", maps, 2, kept=maps),
        ]
        if block == 1:
            squeezed = max(1, features // model.se_reduction)
            layers += [
                dense("squeeze", batch, features, squeezed),
                dense("excitation", batch, squeezed, features),
                elementwise("recalibration", maps / streams, 2, kept=maps / streams),
            ]
        side, channels = pooled, features
    flat, hidden = streams * channels * side**2, model.hidden_dim
    return [
        *layers,
        dense("hidden", batch, flat, hidden, parameters=(flat + 1) * hidden, kept=batch * hidden),
        elementwise("hidden normalisation, ReLU, dropout", batch * hidden, 10, parameters=2 * hidden),
        dense("logits", batch, hidden, num_classes, parameters=(hidden + 1) * num_classes),
    ]


def ststnet_layers(batch: float, side: int, num_classes: int) -> list[Layer]:
    """The layers of STSTNet: 16 channels of three streams over the same three input channels, and one dense layer.

    Args:
        batch: B.
        side: Rows and columns of the images, 28 for the published network.
        num_classes: C.
    """
    grown = side + 2  # 3 x 3, padding 2
    pooled = (grown + 2 - 3) // 3 + 1
    flat = 16 * (pooled // 2) ** 2
    return [
        *convolution_layers("streams", batch, grown, 3, 16, 3, pooled, first=True),
        elementwise("dropout", batch * 16 * pooled**2, 1),
        Layer("average pooling", batch * 16 * pooled**2, batch * 16 * pooled**2, batch * flat, kept=batch * flat),
        dense("logits", batch, flat, num_classes, parameters=(flat + 1) * num_classes),
    ]


def layers_of(job: Job, batch: float) -> list[Layer]:
    """The layers of a job's network for ``batch`` samples."""
    model, inputs = job.config.model, job.plan.arrays.inputs
    num_classes = job.plan.arrays.labels.shape[1]
    if job.name == "ststnet":
        return ststnet_layers(batch, inputs["flow"].shape[2], num_classes)
    if job.name.startswith("micro_attnet"):
        return micro_attnet_layers(model, batch, inputs["flow"].shape[2], num_classes)
    frames = next(iter(inputs["features"].values())).shape[2]
    return fusion_layers(model, batch, frames, num_classes)


def mask_values(job: Job, batch: float) -> float:
    """Values of a step's dropout masks for ``batch`` samples."""
    model = job.config.model
    inputs = job.plan.arrays.inputs
    if job.name == "ststnet":
        pooled = (inputs["flow"].shape[2] + 1) // 3 + 1
        return batch * 16 * pooled**2
    if job.name.startswith("micro_attnet"):
        return batch * (3 * sum(model.features) + model.hidden_dim)
    features = inputs["features"].values()
    frames = 1 if model.feature_dropout_kind == "clip" else next(iter(features)).shape[2]
    return batch * (frames * sum(each.shape[-1] for each in features) + model.hidden_dim)


def forward_work(layers: Sequence[Layer], batch_values: float) -> Work:
    """Forward: reads batch and parameters, hands on logits and what backward cannot do without."""
    parameters, kept = sum(layer.parameters for layer in layers), sum(layer.kept for layer in layers)
    return Work(
        sum(layer.arithmetic for layer in layers),
        _FLOAT * (batch_values + parameters + kept + layers[-1].outputs),
        _FLOAT * sum(layer.inputs + layer.parameters + layer.outputs for layer in layers),
    )


def backward_work(layers: Sequence[Layer], batch_values: float) -> Work:
    """Backward: reads batch, parameters and what forward kept, writes gradients of the parameters or their factors.

    Layer by layer, each reads its inputs, its parameters and its output's gradient and writes the gradients of the
    parameters and, unless they are data, of the inputs.
    """
    parameters, kept = sum(layer.parameters for layer in layers), sum(layer.kept for layer in layers)
    layered = sum(
        layer.outputs + layer.inputs * (2 if layer.to_inputs else 1) + 2 * layer.parameters for layer in layers
    )
    return Work(
        sum(layer.arithmetic * layer.backward for layer in layers),
        _FLOAT * (batch_values + parameters + sum(layer.gradients for layer in layers) + kept + layers[-1].outputs),
        _FLOAT * layered,
    )


def update_work(parameters: int, gradients: float | None = None) -> Work:
    """Adam(W): about 16 operations a parameter and 2 for the norm of the gradients.

    Parameters and both moments are read and written, 24 bytes a parameter, and gradients are read.

    Args:
        parameters: How many.
        gradients: Values that gradients are handed on as; as many as parameters unless given.
    """
    layered = 7 * _FLOAT * parameters
    return Work(18 * parameters, layered if gradients is None else _FLOAT * (6 * parameters + gradients), layered)


def phase_works(job: Job) -> dict[str, Work]:
    """What each of ``PHASES`` takes for one member-step, on the average over an epoch's full batches and its rest.

    ``gather`` reads a batch and writes it together; a model that reads samples where they lie needs none. ``dropout``
    takes 22 operations a value of the masks (two rounds of a 32-bit mixer, and the comparison) and need not store any;
    layer by layer it does. ``watch`` is gather and forward over the samples that are watched, and a copy of the
    variables of the best epoch, divided by the steps of an epoch.
    """
    member, recipe = job.plan.inputs[0], job.plan.recipe
    train_size = int(np.sum(member.train_mask))
    steps = -(-train_size // recipe.batch_size)
    mean_batch = train_size / steps
    layers = layers_of(job, mean_batch)
    samples = sum(
        math.prod(x.shape[2:]) for x in jax.tree.leaves(job.plan.arrays.inputs) if np.issubdtype(x.dtype, np.floating)
    )  # values of a sample
    parameters = sum(layer.parameters for layer in layers)
    forward = forward_work(layers, mean_batch * samples)
    masks = mask_values(job, mean_batch)
    copied = 2 * _FLOAT * mean_batch * samples
    gather = Work(0.0, copied if "flow" in job.plan.arrays.inputs else 0.0, copied)
    share = int(np.sum(member.watched_inner | member.watched_heldout)) / mean_batch  # in batches
    kept = _FLOAT * sum(layer.kept for layer in layers)
    best = 2 * _FLOAT * parameters / steps
    watch = Work(
        share * forward.arithmetic / steps,
        share * (gather.needed + forward.needed - kept) / steps + best,
        share * (gather.layered + forward.layered) / steps + best,
    )
    return {
        "gather": gather,
        "dropout": Work(22.0 * masks, 0.0, 2 * _FLOAT * masks),
        "forward": forward,
        "backward": backward_work(layers, mean_batch * samples),
        "update": update_work(parameters, sum(layer.gradients for layer in layers)),
        "watch": watch,
    }


def _is_stored(node) -> bool:
    return isinstance(node, Stored)


def phase_times(job: Job, repeats: int) -> dict[str, float]:
    """What the study's engine takes for each phase, in ms a member-step, all cores at work.

    An epoch of one block a device runs as programs of its own that end sooner or later: after the gather (where samples
    are read where they lie, of nothing but their numbers), after a forward pass without and with dropout, after the
    backward pass; a phase is the difference of two. The update is what is left of a study's real program, watching
    taken off; so the sum is that program's time.

    Args:
        job: What is trained; as many of its members take part as fill a block a device.
        repeats: Turns of each program; their medians count.
    """
    engine = prepare_engine(job)
    size = len(engine.blocks[0].fold)
    job = job.first(size * len(engine.devices))
    engine, plan, recipe = prepare_engine(job, size), job.plan, job.plan.recipe
    learner = engine.learner
    full_steps = plan.num_steps - 1 if plan.last_batch else plan.num_steps
    no_dropout = dict.fromkeys(("dropout", "feature_dropout"), 0.0)

    def epoch_until(phase):
        def one(arrays, member, state):
            order = jnp.argsort(~member.train_mask)
            order = jnp.pad(order, (0, max(0, plan.num_steps * recipe.batch_size - order.shape[0])))

            def step(carry, number, size):
                # The compiler may not take what does not change out of the loop.
                params, _ = jax.lax.optimization_barrier(carry)
                index = jax.lax.dynamic_slice(order, (number * recipe.batch_size,), (size,))
                inputs, labels = take_samples(arrays, member.fold, index, learner.stored), arrays.labels[index]
                if phase == "gather":
                    taken = jax.tree.map(lambda x: x.index if _is_stored(x) else x, inputs, is_leaf=_is_stored)
                    return (params, jax.tree.map(lambda x: x[:plan_batch], taken)), None
                key = jax.random.fold_in(member.key, number)
                hyper = no_dropout if phase == "forward" else member.hyper

                # With a constant mask, or without the running statistics, the compiler would leave work out.
                mask = number * recipe.batch_size + jnp.arange(size) < jnp.sum(member.train_mask)

                def loss(params, taps):
                    variables = {**state.variables, "params": params, "taps": taps}
                    logits, collections, _ = learner.apply(variables, inputs, mask, True, hyper, key)
                    losses = sample_losses(recipe, logits, labels, None, member.hyper)
                    return jnp.sum(losses * mask) / jnp.sum(mask), collections

                taps = learner.taps(params, size)
                if phase != "backward":
                    return (params, loss(params, taps)), None
                value, (gradients, factors) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, taps)
                return (params, (value, with_factors(gradients, factors))), None

            params = state.variables["params"]
            plan_batch = plan.last_batch or recipe.batch_size
            first = jnp.int32(0)
            shapes = jax.eval_shape(lambda: step((params, 0.0), first, recipe.batch_size)[0][1])
            carry = params, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            carry, _ = jax.lax.scan(
                lambda carry, number: step(carry, number, recipe.batch_size), carry, jnp.arange(full_steps)
            )
            if not plan.last_batch:
                return carry[1]
            last, _ = step(carry, jnp.int32(full_steps), plan.last_batch)
            return carry[1], last[1]  # both, or the compiler would leave the full batches out

        return one

    def watch(arrays, member, state):
        return predict_watched(learner, recipe, state.variables, arrays, member)

    def program(one):
        if not engine.one_by_one:
            return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
        return jax.jit(lambda arrays, *members: jax.lax.map(lambda pair: one(arrays, *pair), members))

    programs = {name: program(epoch_until(name)) for name in ("gather", "forward", "dropout", "backward")}
    programs["watch"] = program(watch)
    threads = range(len(engine.devices))
    blocks = [jax.device_put(block, device) for device, block in zip(engine.devices, engine.blocks, strict=True)]
    states = [engine.programs.init(engine.arrays[engine.devices[thread]], blocks[thread]) for thread in threads]
    numbers = np.arange(1, job.epochs + 1, dtype=np.int32)  # in one call, as in a study

    def work(name, thread):
        device, block = engine.devices[thread], blocks[thread]
        arrays = engine.arrays[device]
        if name == "epoch":
            states[thread], _ = engine.programs.epochs(arrays, block, states[thread], jax.device_put(numbers, device))
            jax.block_until_ready(states[thread])
        else:
            jax.block_until_ready(programs[name](arrays, block, states[thread]))

    turns = {
        name: (lambda name=name: on_threads(lambda thread: work(name, thread), threads))
        for name in (*programs, "epoch")
    }
    steps = job.member_steps / job.epochs
    spent = {name: float(np.median(values)) / steps * 1e3 for name, values in take_turns(turns, repeats)[1].items()}
    spent["epoch"] /= job.epochs
    return {
        "gather": spent["gather"],
        "dropout": spent["dropout"] - spent["forward"],
        "forward": spent["forward"] - spent["gather"],
        "backward": spent["backward"] - spent["dropout"],
        "update": spent["epoch"] - spent["backward"] - spent["watch"],
        "watch": spent["watch"],
    }


def measure_machine(devices: Sequence[jax.Device], *, side: int = 3072, values: int = 1 << 25) -> Machine:
    """Matrix products and memory bandwidth that all cores together reach, by JAX and by PyTorch; the best counts.

    The matrix product is ``(n, n) (n, n)`` in float32, one a core at a time under JAX, one on all cores under
    PyTorch; the triad is ``a = s a + b``, two arrays read and one written, 12 bytes a value.

    Args:
        devices: JAX's, one a thread.
        side: n.
        values: Length of each array of the triad, in each thread.
    """
    import torch

    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    triad = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
    square = [jax.device_put(np.ones((side, side), np.float32), device) for device in devices]
    state = [
        (jax.device_put(np.ones(values, np.float32), device), jax.device_put(np.ones(values, np.float32), device))
        for device in devices
    ]

    def multiply(thread):
        jax.block_until_ready(product(square[thread], square[thread]))

    def stream(thread):
        a, b = state[thread]
        for _ in range(4):
            a = triad(a, b)
        state[thread] = jax.block_until_ready(a), b

    threads = range(len(devices))
    told = {
        "JAX products": 2 * side**3 * len(devices) / _best(lambda: on_threads(multiply, threads)),
        "JAX triad": 4 * 3 * _FLOAT * values * len(devices) / _best(lambda: on_threads(stream, threads)),
    }
    state.clear()
    a, b = torch.ones(side, side), torch.ones(side, side)
    c, x, y, z = torch.empty(side, side), *torch.ones(3, 2 * values)
    told["PyTorch products"] = 2 * side**3 / _best(lambda: torch.mm(a, b, out=c))
    told["PyTorch triad"] = 3 * _FLOAT * len(x) / _best(lambda: torch.add(y, z, alpha=0.5, out=x))
    return Machine(
        max(told["JAX products"], told["PyTorch products"]), max(told["JAX triad"], told["PyTorch triad"]), told
    )


def _best(function: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of some calls, after one that is not counted."""
    function()
    return min(seconds(function) for _ in range(repeats))
