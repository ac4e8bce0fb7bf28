"""Studies made of random numbers, with labels that the probabilities know as much about as the test wants."""

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.study.results import StudyResults

PREVALENCE = (0.5, 0.2, 0.25, 0.15, 0.3)
EMOTIONS = ("negative", "positive", "surprise")
# The composite of MEGC2019: subjects and clips of each class in each database.
COMPOSITE = {"smic": (16, (70, 51, 43)), "casme2": (24, (88, 32, 25)), "samm": (28, (92, 26, 15))}


def one_hot(index, num_classes=3):
    """``(N,)`` classes to ``(N, C)`` int8, -1 to a row of -1."""
    index = np.asarray(index)
    return np.where(index[:, None] < 0, -1, index[:, None] == np.arange(num_classes)).astype(np.int8)


def make_composite(rng, **settings):
    """A leave-one-subject-out study of the composite's sizes: 68 subjects, 442 clips, one sample each."""
    subject, database, label = [], [], []
    for name, (subjects, counts) in COMPOSITE.items():
        classes = rng.permutation(np.repeat(np.arange(3), counts))
        # Every subject has a clip; the others fall where they may.
        owner = np.concatenate([np.arange(subjects), rng.integers(0, subjects, len(classes) - subjects)])
        subject += [f"{name}-{number:02d}" for number in owner]
        database += [name] * len(classes)
        label += classes.tolist()
    fold = np.unique(subject, return_inverse=True)[1]
    return make_results(
        rng,
        **{
            "clip_fold": fold,
            "subject": subject,
            "databases": database,
            "labels": one_hot(label),
            "label_names": EMOTIONS,
            "task": "multi_class",
            "views": ("c",),
            "num_seeds": 5,
            "gate": False,
            "frames": 0,
            **settings,
        },
    )


def make_results(
    rng,
    *,
    num_folds=3,
    num_seeds=4,
    clips_per_fold=12,
    num_test=4,
    num_epochs=5,
    signal=1.5,
    subjects=True,
    single_view=(),
    diverged=(),
    hyper=None,
    inner_share=0.2,
    labels=None,
    label_names=LABELS,
    task="multi_label",
    views=("l", "r"),
    phases=("",),
    single_phase=(),
    databases=None,
    clip_fold=None,
    subject=None,
    streams=(),
    gate=True,
    frames=7,
):
    """A consistent :class:`StudyResults`.

    ``signal`` is the effect size of the labels on the logits, 0 for none; ``hyper`` maps names to the values
    of a grid, which multiplies the members; ``diverged`` lists (fold, seed); ``single_view`` and ``single_phase``
    list clips with the first view or phase only. ``clip_fold``, with ``labels`` and ``subject``, takes the place of
    ``num_folds`` equal folds and the test clips.
    """
    if clip_fold is None:
        num_train = num_folds * clips_per_fold
        clip_fold = np.concatenate([np.arange(num_train) % num_folds, np.full(num_test, -1)])
        # A subject's clips share a fold: six subjects in each.
        subject = [f"s{f}-{i // num_folds % 6}" if f >= 0 else f"t{i % 2}" for i, f in enumerate(clip_fold)]
    clip_fold = np.asarray(clip_fold, np.int32)
    num_clips, num_folds = len(clip_fold), int(clip_fold.max()) + 1
    num_labels = len(label_names)
    if labels is None:
        if task == "multi_class":
            labels = one_hot(rng.choice(num_labels, num_clips), num_labels)
        else:
            labels = (rng.random((num_clips, num_labels)) < np.resize(PREVALENCE, num_labels)).astype(np.int8)
        labels[clip_fold < 0] = -1
    samples = [
        (c, v, p)
        for c in range(num_clips)
        for v in (views[:1] if c in single_view else views)
        for p in (phases[:1] if c in single_phase else phases)
    ]
    sample_clip = np.array([c for c, _, _ in samples], np.int32)
    names = sorted(hyper or {})
    grid = np.array(np.meshgrid(*[hyper[n] for n in names])).reshape(len(names), -1).T if names else [()]
    members = [(f, s, tuple(g)) for g in grid for f in range(num_folds) for s in range(num_seeds)]
    num_members, num_samples = len(members), len(samples)
    fold = np.array([f for f, _, _ in members], np.int32)
    seed = np.array([s for _, s, _ in members], np.int32)
    bad = np.array([(f, s) in set(diverged) for f, s, _ in members])

    def probabilities(clips, lead):
        truth = np.maximum(labels[clips], 0)
        logit = signal * (2.0 * truth - 1) - 1 + 1.5 * rng.standard_normal((*lead, *truth.shape))
        if task == "multi_class":
            exponential = np.exp(logit)
            return (exponential / exponential.sum(axis=-1, keepdims=True)).astype(np.float32)
        return (1 / (1 + np.exp(-logit))).astype(np.float32)

    held = [np.flatnonzero(clip_fold[sample_clip] == f) for f in range(num_folds)]
    width = max(map(len, held))
    curve_sample = np.full((num_members, width), -1, np.int32)
    curve = np.full((num_members, num_epochs, width, num_labels), np.nan, np.float32)
    final = probabilities(sample_clip, (num_members,))
    inner = np.zeros((num_members, num_samples), bool)
    for m, (f, s, _) in enumerate(members):
        curve_sample[m, : len(held[f])] = held[f]
        curve[m, :, : len(held[f])] = probabilities(sample_clip[held[f]], (num_epochs,))
        if num_epochs:
            curve[m, -1, : len(held[f])] = final[m, held[f]]
        train = np.flatnonzero((clip_fold != f) & (clip_fold >= 0))
        chosen = np.roll(train, 7 * s)[: round(inner_share * len(train))]
        inner[m] = np.isin(sample_clip, chosen)
    final[bad] = np.nan
    losses = rng.random((3, num_members, num_epochs)).astype(np.float32)
    ids = [f"fold{f}-seed{s}" + "".join(f"-{n}{v:g}" for n, v in zip(names, g)) for f, s, g in members]  # noqa: B905
    attention = {"appearance": frames} if frames else {}
    attention |= {f"streams{block}": len(streams) for block in (1, 2) if streams}
    return StudyResults(
        label_name=np.array(label_names),
        task=np.array(task),
        clip_name=np.array([f"seq_{i:03d}" for i in range(num_clips)]),
        clip_id=np.arange(num_clips, dtype=np.int64),
        clip_subject=np.array(subject if subjects else [""] * num_clips),
        clip_split=np.where(clip_fold < 0, "test", "train"),
        clip_database=np.array([""] * num_clips if databases is None else databases),
        clip_labels=labels,
        clip_fold=clip_fold,
        sample_clip=sample_clip,
        sample_view=np.array([v for _, v, _ in samples]),
        sample_phase=np.array([p for _, _, p in samples]),
        member_id=np.array(ids),
        member_fold=fold,
        member_seed=seed,
        member_status=np.where(bad, "diverged", "ok"),
        member_stop_epoch=np.full(num_members, max(0, num_epochs - 1), np.int32),
        probabilities=final,
        inner=inner,
        curve_epoch=np.arange(num_epochs, dtype=np.int32),
        curve_train_loss=losses[0],
        curve_inner_loss=losses[1],
        curve_heldout_loss=losses[2],
        curve_sample=curve_sample,
        curve_probabilities=curve,
        gate=rng.dirichlet([5, 5], num_members).astype(np.float32) if gate else np.zeros((num_members, 0), np.float32),
        gate_name=np.array(["appearance", "geometry"] if gate else [], np.str_),
        stream_name=np.array(streams, np.str_),
        hyper={n: np.array([g[i] for _, _, g in members], np.float32) for i, n in enumerate(names)},
        attention={n: rng.dirichlet(np.ones(k), (num_members, width)).astype(np.float32) for n, k in attention.items()},
    )
