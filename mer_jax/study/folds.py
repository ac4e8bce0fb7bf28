"""Which clips are held out. Everything here works on clips, so a clip's views and phases can never be parted."""

import warnings

import numpy as np

from mer_jax.errors import UserError

# Enough to be even, few enough that seeds still give different folds.
_DEALS = 16


def make_folds(labels: np.ndarray, subjects: np.ndarray, *, scheme: str, num_folds: int, seed: int) -> np.ndarray:
    """Assigns every clip to the fold that holds it out.

    Args:
        labels: ``(C, L)`` 0/1, multi-label.
        subjects: ``(C,)`` subject ids, '' where unknown.
        scheme: ``'stratified'`` iterative stratification over label combinations (Sechidis et al. 2011; the fusion
            paper's protocol, which does not group subjects), ``'subject'`` the same aim with all clips of a subject
            in one fold, ``'loso'`` one fold per subject.
        num_folds: Number of folds; ``'loso'`` ignores it.
        seed: Shuffles before stratification.

    Returns:
        ``(C,)`` int32 fold numbers from 0.

    Raises:
        UserError: Fewer clips or subjects than folds, or subjects needed and unknown.
    """
    if scheme != "loso" and len(labels) < num_folds:
        raise UserError(
            f"config.folds.num: {num_folds} folds need at least {num_folds} labelled clips, the data set has "
            f"{len(labels)}; set fewer folds or add clips"
        )
    if scheme == "stratified":
        return _stratified(labels, num_folds, seed)
    if not all(subjects):
        raise UserError(
            f"{scheme!r} folds need the subject of every clip, and {int(np.sum(subjects == ''))} of "
            f"{len(subjects)} have none; add a subject column to the labels, or set config.folds.scheme='stratified' "
            "and config.folds.group=''"
        )
    num_subjects = len(np.unique(subjects))
    if scheme == "loso":
        if num_subjects < 2:
            raise UserError(
                "'loso' folds need at least 2 subjects, the data set has 1; set config.folds.scheme='stratified'"
            )
        return np.unique(subjects, return_inverse=True)[1].astype(np.int32)
    if num_subjects < num_folds:
        raise UserError(
            f"config.folds.num: {num_folds} subject folds need at least {num_folds} subjects, the data set has "
            f"{num_subjects}; set fewer folds"
        )
    return _grouped(labels, subjects, num_folds, seed)


def inner_split(
    labels: np.ndarray, subjects: np.ndarray, *, scheme: str, num_inner: int, fold: int, seed: int
) -> np.ndarray:
    """The part of a training fold that gives no gradients: for early stopping and thresholds.

    The splits rotate: seeds ``k * num_inner .. (k + 1) * num_inner - 1`` of one fold take turns at the parts of one
    inner cross-validation, so that together their inner predictions cover each training clip exactly once, always
    by a model that has taken no gradient from the clip and has not seen the held-out fold. (Means, scales and
    principal components are fitted on the whole training fold, without labels.)

    Args:
        labels: ``(C, L)`` labels of the training clips.
        subjects: ``(C,)`` their subjects.
        scheme: As in :func:`make_folds`; other than ``'stratified'`` the inner split keeps subjects whole too.
        num_inner: Number of inner parts; 0 for no inner split.
        fold: The member's fold.
        seed: The member's seed.

    Returns:
        ``(C,)`` bool, True for inner clips.

    Raises:
        UserError: Too few training clips or subjects for ``num_inner`` parts.
    """
    if num_inner == 0:
        return np.zeros(len(labels), bool)
    units = len(labels) if scheme == "stratified" else len(np.unique(subjects))
    if units < num_inner:
        raise UserError(
            f"config.study.num_inner: {num_inner} inner parts need at least {num_inner} "
            f"{'training clips' if scheme == 'stratified' else 'training subjects'}, fold {fold} has {units}; "
            "set fewer, or 0 for none"
        )
    shuffle = int(np.random.SeedSequence([fold, seed // num_inner]).generate_state(1)[0] >> 1)
    parts = (
        _stratified(labels, num_inner, shuffle)
        if scheme == "stratified"
        else _grouped(labels, subjects, num_inner, shuffle)
    )
    return parts == seed % num_inner


def _stratified(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    fold = np.zeros(len(labels), np.int32)
    if num_folds == 1:
        return fold
    splitter = MultilabelStratifiedKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a label without a positive divides 0 by 0, harmlessly
        for number, (_, held_out) in enumerate(splitter.split(np.zeros((len(labels), 1)), labels)):
            fold[held_out] = number
    return fold


def _grouped(labels: np.ndarray, subjects: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Stratification of whole subjects: the most even of several greedy deals, each in a random order.

    A deal takes subjects of many clips first and gives each to the fold that it unbalances least, over all labels and
    the number of clips alike.
    """
    names, group = np.unique(subjects, return_inverse=True)
    columns = np.concatenate([labels, np.ones((len(labels), 1))], axis=1).astype(np.float64)
    counts = np.zeros((len(names), columns.shape[1]))
    np.add.at(counts, group, columns)
    sizes = counts[:, -1]
    counts /= np.maximum(counts.sum(axis=0), 1.0)  # every label weighs the same, rare or not
    rng = np.random.default_rng(seed)
    deals = []
    for _ in range(_DEALS):
        order = rng.permutation(len(names))
        order = order[np.argsort(-sizes[order], kind="stable")]
        deals.append(_deal(counts, order, num_folds))
    fold_of_group, _ = min(deals, key=lambda deal: deal[1])
    return fold_of_group[group]


def _deal(counts: np.ndarray, order: np.ndarray, num_folds: int) -> tuple[np.ndarray, float]:
    """Gives groups ``(G,)`` in ``order`` to folds; returns the folds ``(G,)`` and how uneven they came out."""
    load = np.zeros((num_folds, counts.shape[1]))
    fold = np.zeros(len(counts), np.int32)
    for position, index in enumerate(order):
        # The unevenness after giving this group to each of the folds: (candidates, folds, labels) -> (candidates,).
        after = load[None] + np.eye(num_folds)[:, :, None] * counts[index]
        spread = after.std(axis=1).mean(axis=1)
        empty = np.flatnonzero(~load.any(axis=1))
        # The last groups go where a fold would stay empty.
        allowed = empty if len(order) - position <= len(empty) else np.arange(num_folds)
        chosen = allowed[int(np.argmin(spread[allowed]))]
        fold[index] = chosen
        load[chosen] += counts[index]
    return fold, float(load.std(axis=0).mean())
