"""Studies made of random numbers, with labels that the probabilities know as much about as the test wants."""

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.study.results import StudyResults

PREVALENCE = (0.5, 0.2, 0.25, 0.15, 0.3)


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
):
    """A consistent :class:`StudyResults`.

    ``signal`` is the effect size of the labels on the logits, 0 for none; ``hyper`` maps names to the values
    of a grid, which multiplies the members; ``diverged`` lists (fold, seed); ``single_view`` lists clips
    without a right view.
    """
    num_train = num_folds * clips_per_fold
    num_clips = num_train + num_test
    if labels is None:
        labels = (rng.random((num_clips, len(LABELS))) < PREVALENCE).astype(np.int8)
        labels[num_train:] = -1
    clip_fold = np.concatenate([np.arange(num_train) % num_folds, np.full(num_test, -1)]).astype(np.int32)
    # A subject's clips share a fold: six subjects in each.
    subject = [f"s{f}-{i // num_folds % 6}" if f >= 0 else f"t{i % 2}" for i, f in enumerate(clip_fold)]
    pairs = [(c, v) for c in range(num_clips) for v in ("l", "r") if v == "l" or c not in single_view]
    sample_clip = np.array([c for c, _ in pairs], np.int32)
    names = sorted(hyper or {})
    grid = np.array(np.meshgrid(*[hyper[n] for n in names])).reshape(len(names), -1).T if names else [()]
    members = [(f, s, tuple(g)) for g in grid for f in range(num_folds) for s in range(num_seeds)]
    num_members, num_samples = len(members), len(pairs)
    fold = np.array([f for f, _, _ in members], np.int32)
    seed = np.array([s for _, s, _ in members], np.int32)
    bad = np.array([(f, s) in set(diverged) for f, s, _ in members])

    def probabilities(clips, lead):
        truth = np.maximum(labels[clips], 0)
        logit = signal * (2.0 * truth - 1) - 1 + 1.5 * rng.standard_normal((*lead, *truth.shape))
        return (1 / (1 + np.exp(-logit))).astype(np.float32)

    held = [np.flatnonzero(clip_fold[sample_clip] == f) for f in range(num_folds)]
    width = max(map(len, held))
    curve_sample = np.full((num_members, width), -1, np.int32)
    curve = np.full((num_members, num_epochs, width, len(LABELS)), np.nan, np.float32)
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
    return StudyResults(
        clip_name=np.array([f"seq_{i:03d}" for i in range(num_clips)]),
        clip_id=np.arange(num_clips, dtype=np.int64),
        clip_subject=np.array(subject if subjects else [""] * num_clips),
        clip_split=np.array(["train"] * num_train + ["test"] * num_test),
        clip_labels=labels,
        clip_fold=clip_fold,
        sample_clip=sample_clip,
        sample_view=np.array([v for _, v in pairs]),
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
        gate=rng.dirichlet([5, 5], num_members).astype(np.float32),
        gate_name=np.array(["appearance", "geometry"]),
        hyper={n: np.array([g[i] for _, _, g in members], np.float32) for i, n in enumerate(names)},
        attention={"appearance": rng.dirichlet(np.ones(7), (num_members, width)).astype(np.float32)},
    )
