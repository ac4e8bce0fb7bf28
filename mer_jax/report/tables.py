"""The table of scores: one list of rows that the terminal and the page print alike."""

import dataclasses
import textwrap
from collections.abc import Mapping

from mer_jax.report.plots import format_number

LEAKY_EXPLANATION = (
    "The leaky column takes its choices on the very clips that it is scored on. It is what such a protocol "
    "would have claimed, not an estimate of anything."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure.

    Attributes:
        name: What is measured and over what it is averaged.
        group: Heading that the row stands under, ``''`` for the headline rows.
        mean: Honest value, mean over seeds, or None where it is undefined.
        sd: Standard deviation over seeds, or None.
        seed_interval: Interval over seeds ``(low, high)``, or None.
        clip_interval: Interval over clips (or subjects) and seeds ``(low, high)``, or None.
        untuned: Value at the untuned threshold 0.5, or None.
        leaky: What leaking choices would have claimed, or None.
        key: Whether this is the study's headline figure.
    """

    name: str
    group: str
    mean: float | None
    sd: float | None = None
    seed_interval: tuple[float, float] | None = None
    clip_interval: tuple[float, float] | None = None
    untuned: float | None = None
    leaky: float | None = None
    key: bool = False


def leaky_block(summary: Mapping) -> Mapping:
    """The leaky figures beside the honest: epoch and thresholds where curves were kept, else thresholds."""
    return summary["leaky"]["both"] or summary["leaky"]["heldout_thresholds"]


def leaky_choices(summary: Mapping) -> str:
    """What :func:`leaky_block` chose on the held-out clips, in words."""
    return "epoch and thresholds" if summary["leaky"]["both"] else "thresholds"


def score_rows(summary: Mapping) -> list[Row]:
    """The rows of the table of scores.

    Args:
        summary: What :func:`mer_jax.study.summary.summarise` gave.

    Returns:
        The headline rows first, then other averages, the classes, threshold-free scores and references.
    """
    honest, untuned, leaky = summary["honest"], summary["untuned"], leaky_block(summary)

    def row(name, group, *path, key=False):
        score, plain, leak = (_at(block, path) for block in (honest, untuned, leaky))
        return Row(
            name,
            group,
            score["mean"],
            score["sd"],
            score["seed_ci"],
            score["clip_ci"],
            plain["mean"],
            leak["mean"],
            key,
        )

    rows = [
        row("macro-F1, pooled (UF1)", "", "macro_f1", "pooled", key=True),
        row("macro-F1, mean of folds", "", "macro_f1", "fold_mean"),
        row("UAR, pooled", "Other averages", "uar", "pooled"),
        row("balanced accuracy, pooled", "Other averages", "balanced_accuracy", "pooled"),
        row("present/absent macro-F1", "Other averages", "present_absent_macro_f1", "pooled"),
    ]
    rows += [row(f"F1 {label}", "Per class, pooled", "per_class_f1", label, "pooled") for label in summary["labels"]]
    for name, key in (("AUROC", "auroc"), ("AP", "average_precision")):
        for words, average in (("pooled", "pooled"), ("mean of folds", "fold_mean")):
            score = summary[key]["mean"][average]
            rows.append(
                Row(
                    f"{name}, {words}",
                    "Threshold-free, mean of classes (AP: average precision)",
                    score["mean"],
                    score["sd"],
                )
            )
    ensemble = summary["ensemble"]["macro_f1"]["pooled"]
    chance = summary["chance"]["macro_f1"]["pooled"]
    references = "macro-F1 of other deciders, pooled"
    rows += [
        Row("all seeds' mean probability", references, ensemble["value"], clip_interval=ensemble["clip_ci"]),
        Row("chance (labels permuted)", references, chance["mean"], clip_interval=chance["interval"]),
        Row("every class present", references, summary["baselines"]["all_positive"]["macro_f1"]["pooled"]),
        Row("majority of each class", references, summary["baselines"]["majority"]["macro_f1"]["pooled"]),
    ]
    return rows


def _at(block: Mapping, path) -> Mapping:
    for key in path:
        block = block[key]
    return block


def format_interval(interval) -> str:
    """``[0.512, 0.634]``, or an en dash where there is no interval."""
    if interval is None or any(value is None for value in interval):
        return "–"
    return "[" + ", ".join(format_number(value) for value in interval) + "]"


def format_mean(mean: float | None, sd: float | None) -> str:
    """``0.573 ± 0.021``, or the mean alone where there is no standard deviation."""
    return format_number(mean) + ("" if sd is None else f" ± {format_number(sd)}")


def terminal_table(summary: Mapping) -> str:
    """The table of scores as plain text of at most 100 columns, for a terminal or a log file.

    Args:
        summary: What :func:`mer_jax.study.summary.summarise` gave.

    Returns:
        Lines without a final newline.
    """
    level = f"{100 * summary['evaluation']['confidence']:g} % CI"
    layout = "{:<30} {:>15} {:>16} {:>16} {:>8} {:>8}".format
    lines = [
        layout("", "honest ± sd", level, level, "at 0.5", "LEAKY"),
        layout("", "over seeds", "over seeds", "clips and seeds", "untuned", "see end"),
    ]
    group = ""
    for row in score_rows(summary):
        if row.group != group:
            group = row.group
            lines.append(f"-- {group} " + "-" * (94 - len(group)))
        cells = (
            format_mean(row.mean, row.sd),
            format_interval(row.seed_interval),
            format_interval(row.clip_interval),
            format_number(row.untuned),
            format_number(row.leaky),
        )
        lines.append(layout(("> " if row.key else "  ") + row.name, *cells))
    inflation = leaky_block(summary)["inflation"]["pooled"]
    difference = f"{format_signed(inflation['mean'])} {format_interval(inflation['clip_ci'])}"
    lines += [
        "-" * 98,
        f"LEAKY chooses {leaky_choices(summary)} on the clips that it is scored on: not an estimate.",
        f"It would have claimed {difference} macro-F1.",
    ]
    for note in summary["notes"]:
        lines += textwrap.wrap(f"note: {note}", 98, subsequent_indent="      ")
    return "\n".join(line.rstrip() for line in lines)


def format_signed(value: float | None) -> str:
    """A difference with its sign."""
    text = format_number(value)
    return f"+{text}" if value is not None and value >= 0 else text
