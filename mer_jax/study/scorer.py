"""Scores decisions about held-out clips: every figure with its intervals, all on the same draws."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mer_jax.evaluation import metrics, statistics
from mer_jax.study.held_out import HeldOut

# Whether exactly one label is present in a clip -> the figures of a block.
FIGURES: dict[bool, dict[str, Callable[[metrics.Counts], np.ndarray]]] = {
    False: {
        "macro_f1": metrics.macro_f1,
        "present_absent_macro_f1": metrics.present_absent_macro_f1,
        "uar": metrics.multilabel_uar,
        "balanced_accuracy": metrics.balanced_accuracy,
    },
    True: {"macro_f1": metrics.macro_f1, "uar": metrics.multilabel_uar, "accuracy": metrics.accuracy},
}


class Scorer:
    """Scores decisions for the same clips and seeds with one set of draws, so that figures are paired."""

    def __init__(self, held: HeldOut, draws: statistics.Resampling | None = None):
        self.held = held
        self.names = tuple(FIGURES[held.multi_class])
        self.confidence = held.evaluation["confidence"]
        self.draws = draws or statistics.make_resampling(
            held.fold, held.people, len(held.seeds), held.evaluation["bootstrap"]
        )

    def figures(self, counts: metrics.Counts) -> np.ndarray:
        """All K count-based figures along the last axis: those of ``names``, then F1 per label."""
        single = [figure(counts) for figure in FIGURES[self.held.multi_class].values()]
        return np.concatenate([np.stack(single, axis=-1), metrics.binary_f1(counts)], axis=-1)

    def by_label(self, score: Callable[[int], Any]) -> dict[str, Any]:
        """``score`` of the place of each label's F1 among the figures."""
        return {label: score(len(self.names) + index) for index, label in enumerate(self.held.labels)}

    def only(self, rows: np.ndarray) -> "Scorer":
        """A scorer of the pooled clips ``rows`` alone, on the same draws, so that it is paired with the whole's."""
        return Scorer(self.held.take_clips(rows), self.draws._replace(clips=self.draws.clips[:, rows]))

    def replicates(
        self, decisions: np.ndarray, averages: tuple[str, ...] = ("pooled", "fold_mean")
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each average: figures of each seed ``(S, K)``, bootstrap means ``(B, K)``."""
        held, found, draws = self.held, {}, self.draws
        if len(decisions) != len(held.seeds):  # an ensemble has no seeds to draw
            draws = draws._replace(seeds=np.ones((len(draws.clips), len(decisions))))
        everything = np.ones((1, len(held.fold)))
        args = (held.truth, decisions, held.mask)
        for name in averages:
            groups = held.fold if name == "fold_mean" else None
            values = statistics.weighted_scores(*args, everything, self.figures, groups)[0]
            found[name] = values, statistics.hierarchical_replicates(*args, draws, self.figures, groups)
        return found

    def score(self, values: np.ndarray, replicates: np.ndarray) -> dict[str, Any]:
        """A Score: ``(S,)`` values per seed and ``(B,)`` replicates of their mean on new clips."""
        return {
            "mean": values.mean(),
            "sd": sd_over_seeds(values),
            "seed_ci": statistics.t_interval(values, self.confidence, bounds=(0.0, 1.0)),
            "seed_ci_bca": statistics.bootstrap_mean(values, self.draws.seeds, self.confidence)["bca"],
            "clip_ci": self.clip_interval(replicates, values.mean()),
            "values": values,
        }

    def clip_interval(self, replicates: np.ndarray, estimate: float) -> tuple[float, float]:
        """The interval of a score from ``(B,)`` replicates."""
        return statistics.centred_interval(replicates, estimate, self.confidence, bounds=(0.0, 1.0))

    def block(self, decisions: np.ndarray) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """A Block for decisions ``(S, N, L)``, and the replicates behind it."""
        found = self.replicates(decisions)

        def pair(index):
            return {name: self.score(v[:, index], r[:, index]) for name, (v, r) in found.items()}

        held = self.held
        counts = metrics.confusion_counts(held.truth, decisions, held.mask)
        block = {name: pair(index) for index, name in enumerate(self.names)}
        block["per_class_f1"] = self.by_label(pair)
        block["confusion"] = {
            label: {cell: getattr(counts, cell)[:, index].mean() for cell in counts._fields}
            for index, label in enumerate(held.labels)
        }
        if held.multi_class:
            matrix = np.einsum("nt,snp->tp", held.truth.astype(float), decisions.astype(float)) / len(decisions)
            block["confusion_matrix"] = {
                label: dict(zip(held.labels, row, strict=True)) for label, row in zip(held.labels, matrix, strict=True)
            }
        return block, found

    def values(self, decisions: np.ndarray, averages: tuple[str, ...] = ("pooled", "fold_mean")) -> dict[str, Any]:
        """For decisions ``(1, N, L)`` without seeds: each figure's value and its interval over clips."""
        found = self.replicates(decisions, averages)

        def pair(index):
            return {
                name: {
                    "value": values[0, index],
                    "clip_ci": self.clip_interval(replicates[:, index], values[0, index]),
                }
                for name, (values, replicates) in found.items()
            }

        return {name: pair(index) for index, name in enumerate(self.names)} | {"per_class_f1": self.by_label(pair)}

    def inflation(self, leaky: dict, honest: dict) -> dict[str, Any]:
        """How much higher the leaky macro-F1 is, on the same draws; in a multi-class study ``uar``, too."""

        def gain(name, index):
            (values, replicates), (reference, reference_replicates) = leaky[name], honest[name]
            mean = (values - reference)[:, index].mean()
            difference = (replicates - reference_replicates)[:, index]
            return {"mean": mean, "clip_ci": statistics.centred_interval(difference, mean, self.confidence)}

        inflation = {name: gain(name, 0) for name in honest}
        if self.held.multi_class:
            inflation["uar"] = {name: gain(name, self.names.index("uar")) for name in honest}
        return inflation


def sd_over_seeds(values: np.ndarray) -> float | None:
    """Standard deviation of ``(S,)`` scores; None for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
