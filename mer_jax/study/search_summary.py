"""What choosing hyper-parameters gained: the nested score against fixed values, and against choosing by the answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mer_jax.evaluation import metrics, statistics
from mer_jax.study.held_out import SELECTIONS, HeldOut, StudyMembers, decide
from mer_jax.study.scorer import Scorer

SELECTION_WORDS = {"average_precision": "average precision", "loss": "cross-entropy", "macro_f1": "macro-F1"}
_AVERAGES = {"pooled": False, "fold_mean": True}


def search_figures(
    study: StudyMembers, chosen: Sequence[int], nested: HeldOut, pooled: Sequence[float | None]
) -> dict[str, Any] | None:
    """What choosing among the settings of a study gained.

    Args:
        study: The study.
        chosen: The setting that inner splits chose for each fold.
        nested: The held-out clips under these.
        pooled: The held-out macro-F1 of each setting in all folds, mean over seeds; None where no seed finished.

    Returns:
        None with one setting, else a dict:

        * ``selection``, ``higher_is_better``, ``varied``: what chose, and the names of what it chose from;
        * ``default``: the setting 0 in every fold, which is the config's own values (or the first of a grid that lacks
          them): its ``macro_f1`` and ``uar``, and ``nested_minus_default``, the paired comparison of both; None where
          no seed finished under it;
        * ``leaky``: the settings that score best on the held-out clips, ``best_overall`` one for all folds and
          ``best_per_fold``: ``chosen`` for each fold, ``macro_f1``, ``uar`` and ``inflation`` over the nested score;
        * ``stability``: ``counts`` of the folds of each setting, how many are ``distinct``, and the
          ``most_chosen``;
        * ``rank_correlation``: Spearman's, over the settings, of the mean inner score of all folds (better is higher)
          with the pooled held-out score; None where it is undefined.
    """
    settings = study.settings
    if len(settings) < 2:
        return None
    higher = SELECTIONS[study.evaluation["selection"]]
    counts = np.bincount(chosen, minlength=len(settings))
    return {
        "selection": study.evaluation["selection"],
        "higher_is_better": higher,
        "varied": [name for name in settings[0] if len({setting[name] for setting in settings}) > 1],
        "default": _default(study, nested),
        "leaky": {
            "label": "leaky",
            "best_overall": _leaky(study, nested, _best_overall(study, pooled)),
            "best_per_fold": _leaky(study, nested, _best_per_fold(study)),
        },
        "stability": {
            "counts": counts,
            "distinct": int((counts > 0).sum()),
            "most_chosen": int(np.argmax(counts)),
        },
        "rank_correlation": _rank_correlation(study, pooled, 1 if higher else -1),
    }


def _common(one: HeldOut, other: HeldOut) -> tuple[HeldOut, HeldOut] | None:
    """Both on the seeds that both have."""
    seeds = np.intersect1d(one.seeds, other.seeds)
    return (one.take_seeds(seeds), other.take_seeds(seeds)) if len(seeds) else None


def _held_out(study: StudyMembers, chosen: Sequence[int] | None) -> HeldOut | None:
    """The clips under settings for each fold; None where no seed finished in all of them."""
    if chosen is None or not len(study.complete_seeds(list(chosen))):
        return None
    return study.held_out(list(chosen))


def _scores(scorer: Scorer, replicates: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    return {
        name: {
            average: scorer.score(values[:, index], drawn[:, index]) for average, (values, drawn) in replicates.items()
        }
        for name in ("macro_f1", "uar")
        for index in [scorer.names.index(name)]
    }


def _default(study: StudyMembers, nested: HeldOut) -> dict[str, Any] | None:
    own = _held_out(study, [0] * len(study.folds))
    pair = own and _common(nested, own)
    if not pair:
        return None
    scorer = Scorer(pair[1])
    decisions = [held.decisions for held in pair]

    def difference(by_fold):
        found = statistics.paired_clip_comparison(
            scorer.held.truth,
            *decisions,
            scorer.held.mask,
            scorer.draws,
            metrics.macro_f1,
            scorer.held.fold if by_fold else None,
            scorer.confidence,
        )
        return {
            "mean": found.mean,
            "clip_ci": found.interval,
            "p_value": found.p_value,
            "probability_better": found.probability_a_better,
        }

    return {
        "seeds": len(scorer.held.seeds),
        **_scores(scorer, scorer.replicates(decisions[1])),
        "nested_minus_default": {average: difference(by_fold) for average, by_fold in _AVERAGES.items()},
    }


def _leaky(study: StudyMembers, nested: HeldOut, chosen: Sequence[int] | None) -> dict[str, Any] | None:
    best = _held_out(study, chosen)
    pair = best and _common(nested, best)
    if not pair:
        return None
    scorer = Scorer(pair[1])
    honest, claimed = (scorer.replicates(held.decisions) for held in pair)
    return {"chosen": list(chosen), **_scores(scorer, claimed), "inflation": scorer.inflation(claimed, honest)}


def _best_overall(study: StudyMembers, pooled: Sequence[float | None]) -> list[int] | None:
    """The setting of the highest held-out score, for every fold."""
    known = [setting for setting, score in enumerate(pooled) if score is not None]
    return [max(known, key=lambda setting: pooled[setting])] * len(study.folds) if known else None


def _best_per_fold(study: StudyMembers) -> list[int]:
    """For each fold the setting of the highest score on that very fold, mean over seeds, the first of equals."""
    score = metrics.accuracy if study.results.multi_class else metrics.macro_f1
    best = []
    for fold in study.folds:
        rows, scores = study.fold == fold, []
        for setting in range(len(study.settings)):
            members = study.members(setting, fold)
            if not len(members):
                scores.append(-np.inf)
                continue
            cut = study.thresholds(setting, fold)
            made = decide(study.probabilities[members][:, rows], cut, study.evaluation, study.results.labels)
            scores.append(score(metrics.confusion_counts(study.truth[rows], made, study.mask[rows])).mean())
        best.append(int(np.argmax(scores)))
    return best


def _rank_correlation(study: StudyMembers, pooled: Sequence[float | None], sign: int) -> float | None:
    inner, heldout = [], []
    for setting, score in enumerate(pooled):
        scores = [study.inner_score(setting, fold) for fold in study.folds]
        if score is not None and None not in scores:
            inner.append(sign * float(np.mean(scores)))
            heldout.append(float(score))
    if len(inner) < 3 or np.ptp(inner) == 0 or np.ptp(heldout) == 0:
        return None
    from scipy import stats  # takes long to import, and few studies search

    return float(stats.spearmanr(inner, heldout).statistic)
