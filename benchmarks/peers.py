"""The same training in PyTorch: an idiomatic loop over members, and all of them at once by ``torch.func``.

It runs on the kind of device that JAX runs on.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.jobs import WIDTHS, Job
from mer_jax.errors import UserError
from mer_jax.study.devices import worker_devices


class TorchSTSTNet(nn.Module):
    """STSTNet (Liong et al. 2019) as its authors' description has it."""

    def __init__(self, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, features, 3, padding=2) for features in (3, 5, 8)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(features) for features in (3, 5, 8)])
        self.pool, self.average = nn.MaxPool2d(3, 3, 1), nn.AvgPool2d(2, 2)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(400, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, 28, 28)`` to logits ``(B, 3)``."""
        streams = [
            self.dropout(self.pool(norm(torch.relu(conv(x)))))
            for conv, norm in zip(self.convs, self.norms, strict=True)
        ]
        return self.fc(self.average(torch.cat(streams, 1)).flatten(1))


class TorchMicroAttNet(nn.Module):
    """MicroAttNet (Nguyen et al. 2026, section 3.5) with the sizes of our config."""

    def __init__(self, model, size: int, dropout: float, feature_dropout: float):
        super().__init__()
        self.pools = model.pools
        widths = (1, *model.features)

        def stage(block):
            convs = [
                nn.Conv2d(widths[block], widths[block + 1], model.kernels[block], padding=model.kernels[block] // 2)
                for _ in range(3)
            ]
            return nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs])

        def attend(block):
            hidden = model.attention_hidden
            return nn.Sequential(
                nn.Linear(3 * widths[block + 1], hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 3, bias=False)
            )

        self.stages = nn.ModuleList([stage(0), stage(1)])
        self.attention = nn.ModuleList([attend(0), attend(1)])
        squeezed = widths[2] // model.se_reduction
        self.excitation = nn.Sequential(
            nn.Linear(widths[2], squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, widths[2], bias=False)
        )
        side = size // model.pools[0] // model.pools[1]
        self.hidden = nn.Linear(3 * widths[2] * side * side, model.hidden_dim)
        self.norm, self.logits = nn.BatchNorm1d(model.hidden_dim), nn.Linear(model.hidden_dim, 5)
        self.dropout, self.channel_dropout = nn.Dropout(dropout), nn.Dropout2d(feature_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` to logits ``(B, 5)``."""
        streams = list(x.split(1, dim=1))
        for block, (stage, attention) in enumerate(zip(self.stages, self.attention, strict=True)):
            streams = [
                functional.max_pool2d(self.channel_dropout(torch.relu(layers(stream))), self.pools[block])
                for layers, stream in zip(stage, streams, strict=True)
            ]
            if block == 1:
                gate = torch.sigmoid(self.excitation(streams[2].mean((2, 3))))
                streams[2] = streams[2] * gate[:, :, None, None]
            weights = torch.softmax(attention(torch.cat([stream.mean((2, 3)) for stream in streams], 1)), 1)
            streams = [stream * weights[:, n, None, None, None] for n, stream in enumerate(streams)]
        flat = torch.cat([stream.flatten(1) for stream in streams], 1)
        return self.logits(self.dropout(torch.relu(self.norm(self.hidden(flat)))))


class TorchPooling(nn.Module):
    """Multi-query attention pooling as the fusion paper writes it (section 3.1.3, eq. 1), keys and values made."""

    def __init__(self, width: int, queries: int, key_dim: int):
        super().__init__()
        self.query = nn.Parameter(0.1 * torch.randn(queries, key_dim))
        self.key, self.value = (nn.Linear(width, key_dim, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, D)`` to ``(B, d_k)``."""
        scores = self.query @ self.key(x).transpose(1, 2) / math.sqrt(self.query.shape[1])  # (B, Q, T)
        return (torch.softmax(scores, -1) @ self.value(x)).mean(1)  # (B, Q, T) (B, T, d_k) -> (B, d_k)


class TorchFusion(nn.Module):
    """The fusion paper's classifier: a pool a modality, softmax gate, Linear - GELU - LayerNorm - Dropout - Linear."""

    def __init__(self, model, num_classes: int, dropout: float, feature_dropout: float):
        super().__init__()
        width = model.key_dim
        self.pools = nn.ModuleList([TorchPooling(WIDTHS[m], model.num_queries[m], width) for m in WIDTHS])
        self.gate = nn.Parameter(torch.zeros(len(WIDTHS)))
        self.hidden, self.norm = nn.Linear(width, model.hidden_dim), nn.LayerNorm(model.hidden_dim)
        self.dropout, self.logits = nn.Dropout(dropout), nn.Linear(model.hidden_dim, num_classes)
        self.per_clip = model.feature_dropout_kind == "clip"
        self.feature_dropout = nn.Dropout(feature_dropout)

    def forward(self, *streams: torch.Tensor) -> torch.Tensor:
        """A ``(B, T, D)`` a modality to logits ``(B, C)``."""
        descriptors = []
        for pool, x in zip(self.pools, streams, strict=True):
            x = x * self.feature_dropout(torch.ones_like(x[:, :1])) if self.per_clip else self.feature_dropout(x)
            descriptors.append(pool(x))
        weights = torch.softmax(self.gate, 0)
        fused = sum(weight * descriptor for weight, descriptor in zip(weights, descriptors, strict=True))
        return self.logits(self.dropout(self.norm(functional.gelu(self.hidden(fused)))))


def make_network(job: Job) -> nn.Module:
    """A new network of a job."""
    train, model = job.config.train, job.config.model
    if job.name == "ststnet":
        return TorchSTSTNet(train.dropout)
    if job.name.startswith("micro_attnet"):
        size = job.plan.arrays.inputs["flow"].shape[2]
        return TorchMicroAttNet(model, size, train.dropout, train.feature_dropout)
    return TorchFusion(model, job.plan.arrays.labels.shape[1], train.dropout, train.feature_dropout)


def round_factors(precision: str) -> None:
    """Has PyTorch round factors on a GPU as ``config.train.matmul_precision`` says; convolutions know TF32 alone."""
    torch.set_float32_matmul_precision({"float32": "highest", "tensorfloat32": "high", "bfloat16": "medium"}[precision])
    torch.backends.cudnn.allow_tf32 = precision != "float32"


def _device() -> torch.device:
    """Where PyTorch trains.

    Raises:
        UserError: JAX has a GPU that PyTorch does not see.
    """
    kind = worker_devices("")[0].platform
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on {kind}, and PyTorch sees no GPU: install a build of PyTorch for it, or set JAX_PLATFORMS=cpu"
        )
    return torch.device("cuda")


def _prepared(job: Job) -> tuple[torch.Tensor, ...]:
    """The inputs of all held-out folds, each ``(F or 1, N, ...)``."""
    arrays = job.plan.arrays
    if "features" in arrays.inputs:
        return tuple(torch.tensor(np.asarray(arrays.inputs["features"][modality])) for modality in WIDTHS)
    flow = arrays.inputs["flow"]  # (1, N, H, W, C)
    if "flow" in arrays.maps:
        mean, scale = (each[:, None, None, None] for each in arrays.maps["flow"])  # (F, 1, 1, 1, C)
        flow = (flow - mean) * scale
    return (torch.tensor(np.ascontiguousarray(flow.transpose(0, 1, 4, 2, 3))),)  # (F, N, C, H, W)


def _losses(job: Job, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``(..., B, C)`` to the samples' losses ``(..., B)``."""
    train = job.config.train
    if job.plan.recipe.exclusive:
        return -(functional.log_softmax(logits, -1) * wanted).sum(-1)
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if train.loss == "focal":
        entropy = (1 - torch.exp(-entropy)) ** train.focal_gamma * entropy
    return entropy.mean(-1)


def _optimiser(job: Job, parameters, steps: int):
    """The optimiser and its schedule over ``steps`` updates."""
    train, recipe = job.config.train, job.plan.recipe
    kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    optimiser = kind(parameters, train.learning_rate, weight_decay=train.weight_decay)
    warmup = math.ceil(recipe.warmup_fraction * steps)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(steps - warmup, 1))))
        return falling if recipe.schedule == "cosine" else 1.0

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _watched(member) -> torch.Tensor:
    watched = np.asarray(member.watched)
    return torch.tensor(watched[np.asarray(member.watched_heldout | member.watched_inner)], dtype=torch.long)


def pytorch_way(job: Job) -> Callable[[], None]:
    """A turn of the idiomatic loop: one member after another, all of PyTorch's threads on each."""
    device = _device()
    prepared, labels = [x.to(device) for x in _prepared(job)], torch.tensor(job.plan.arrays.labels, device=device)
    size = job.plan.recipe.batch_size

    def turn():
        for number, member in enumerate(job.plan.inputs):
            torch.manual_seed(number)
            inputs = [x[int(member.fold) if len(x) > 1 else 0] for x in prepared]
            train = torch.tensor(np.flatnonzero(np.asarray(member.train_mask)), device=device)
            watched = _watched(member).to(device)
            model = make_network(job).to(device)
            optimiser, schedule = _optimiser(job, model.parameters(), -(-len(train) // size) * job.epochs)
            for _ in range(job.epochs):
                model.train()
                for batch in train[torch.randperm(len(train), device=device)].split(size):
                    optimiser.zero_grad()
                    _losses(job, model(*(x[batch] for x in inputs)), labels[batch]).mean().backward()
                    optimiser.step()
                    schedule.step()
                model.eval()
                with torch.no_grad():
                    _losses(job, model(*(x[watched] for x in inputs)), labels[watched]).mean().item()

    return turn


def vmap_way(job: Job) -> Callable[[], None]:
    """A turn of ``torch.func``: the members' weights stacked, one ``vmap`` over all of them.

    Members take equally many samples, as a stack asks for: one with fewer repeats some of its own. Their losses are
    summed for one backward pass, and one optimiser works on the stacked weights, which is the same for every member.
    """
    device = _device()
    prepared, labels = [x.to(device) for x in _prepared(job)], torch.tensor(job.plan.arrays.labels, device=device)
    members, size = job.plan.inputs, job.plan.recipe.batch_size
    fold = torch.tensor([int(member.fold) for member in members], device=device)[:, None]  # (M, 1)
    owned = [torch.tensor(np.flatnonzero(np.asarray(member.train_mask)), device=device) for member in members]
    most = max(map(len, owned))
    watched = [_watched(member) for member in members]
    widest = max(map(len, watched))
    watched = torch.stack([each[torch.arange(widest) % len(each)] for each in watched]).to(device)  # (M, V)

    def take(index):
        """``(M, B)`` to a list of ``(M, B, ...)``."""
        return [x[fold if len(x) > 1 else 0, index] for x in prepared]

    def turn():
        torch.manual_seed(0)
        networks = [make_network(job).to(device) for _ in members]
        parameters, buffers = torch.func.stack_module_state(networks)
        network = copy.deepcopy(networks[0]).to("meta")
        del networks
        optimiser, schedule = _optimiser(job, parameters.values(), -(-most // size) * job.epochs)

        def logits_of(parameters, buffers, *inputs):
            return torch.func.functional_call(network, (parameters, buffers), inputs)

        apply = torch.func.vmap(logits_of, randomness="different")
        for _ in range(job.epochs):
            network.train()
            shuffled = [each[torch.randperm(len(each), device=device)] for each in owned]
            order = torch.stack([each[torch.arange(most, device=device) % len(each)] for each in shuffled])
            for batch in order.split(size, 1):
                optimiser.zero_grad()
                _losses(job, apply(parameters, buffers, *take(batch)), labels[batch]).mean(1).sum().backward()
                optimiser.step()
                schedule.step()
            network.eval()
            with torch.no_grad():
                # A batch at a time: the frames of all members' watched samples would not fit at once.
                for batch in watched.split(size, 1):
                    _losses(job, apply(parameters, buffers, *take(batch)), labels[batch]).mean(1).tolist()

    return turn
