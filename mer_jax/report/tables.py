"""The table of scores: one list of rows that the terminal and the page print alike."""

import dataclasses
import numbers
import textwrap
from collections.abc import Mapping, Sequence

from mer_jax.report.plots import format_number
from mer_jax.study.data import MULTI_CLASS

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


_LEAKY_CHOICES = {"both": "epoch and thresholds", "heldout_thresholds": "thresholds", "best_epoch": "each fold's epoch"}


def multi_class(summary: Mapping) -> bool:
    """Whether exactly one label is present in a clip."""
    return summary["task"] == MULTI_CLASS


def score_name(summary: Mapping) -> str:
    """What the headline score is called."""
    return "UF1" if multi_class(summary) else "macro-F1"


def digits(summary: Mapping) -> int:
    """Decimals of a score: the field gives UF1 and UAR with four."""
    return 4 if multi_class(summary) else 3


def format_threshold(threshold: float | Sequence[float]) -> str:
    """One threshold, or several, with two decimals."""
    values = [threshold] if isinstance(threshold, numbers.Real) else threshold
    return " / ".join(format_number(value, 2) for value in values)


def leaky_block(summary: Mapping) -> Mapping | None:
    """The leaky figures beside the honest: of all that could be chosen, what was kept to choose from; maybe None."""
    return next((summary["leaky"][name] for name in _LEAKY_CHOICES if summary["leaky"][name]), None)


def leaky_choices(summary: Mapping) -> str:
    """What :func:`leaky_block` chose on the held-out clips, in words."""
    return next(words for name, words in _LEAKY_CHOICES.items() if summary["leaky"][name])


def score_rows(summary: Mapping) -> list[Row]:
    """The rows of the table of scores.

    Args:
        summary: What :func:`mer_jax.study.summary.summarise` gave.

    Returns:
        The headline rows first, then other averages, the classes, threshold-free scores and references.
    """
    honest, untuned, leaky = summary["honest"], summary["untuned"], leaky_block(summary)

    def row(name, group, *path, key=False, block=honest):
        score = _at(block, path)
        plain, leak = (_at(other, path)["mean"] if other and block is honest else None for other in (untuned, leaky))
        return Row(name, group, score["mean"], score["sd"], score["seed_ci"], score["clip_ci"], plain, leak, key)

    ensemble, chance = summary["ensemble"], summary["chance"]["macro_f1"]["pooled"]
    baselines = summary["baselines"]
    if multi_class(summary):
        rows = [
            row("UF1, pooled", "", "macro_f1", "pooled", key=True),
            row("UAR, pooled", "", "uar", "pooled"),
            row("accuracy, pooled", "Other averages", "accuracy", "pooled"),
            row("UF1, mean of folds", "Other averages", "macro_f1", "fold_mean"),
        ]
        for entry in summary["databases"][1:]:
            rows += [_database_row(entry, name, figure) for name, figure in (("UF1", "macro_f1"), ("UAR", "uar"))]
        rows += [
            row(f"F1 {label}", "Per class, pooled", "per_class_f1", label, "pooled") for label in summary["labels"]
        ]
        references = "Other deciders, pooled"
        return [
            *rows,
            *_threshold_free(summary),
            *_search_rows(summary),
            *(
                Row(
                    f"{name} of all seeds' mean",
                    references,
                    ensemble[figure]["pooled"]["value"],
                    clip_interval=ensemble[figure]["pooled"]["clip_ci"],
                )
                for name, figure in (("UF1", "macro_f1"), ("UAR", "uar"))
                if len(summary["study"]["seeds"]) > 1
            ),
            Row("UF1 of chance (permuted)", references, chance["mean"], clip_interval=chance["interval"]),
            Row("UF1 of the majority class", references, baselines["majority"]["macro_f1"]["pooled"]),
            Row("UAR of the majority class", references, baselines["majority"]["uar"]["pooled"]),
        ]
    rows = [
        row("macro-F1, pooled (UF1)", "", "macro_f1", "pooled", key=True),
        row("macro-F1, mean of folds", "", "macro_f1", "fold_mean"),
        row("UAR, pooled", "Other averages", "uar", "pooled"),
        row("balanced accuracy, pooled", "Other averages", "balanced_accuracy", "pooled"),
        row("present/absent macro-F1", "Other averages", "present_absent_macro_f1", "pooled"),
    ]
    rows += [row(f"F1 {label}", "Per class, pooled", "per_class_f1", label, "pooled") for label in summary["labels"]]
    if fixed := summary["fixed"]:
        group = f"At the fixed threshold {format_threshold(summary['evaluation']['fixed_threshold'])}, tuned on nothing"
        rows += [
            row("fixed: macro-F1, pooled", group, "macro_f1", "pooled", block=fixed),
            row("fixed: macro-F1, mean of folds", group, "macro_f1", "fold_mean", block=fixed),
        ]
    rows += [_database_row(entry, "macro-F1", "macro_f1") for entry in summary["databases"][1:]]
    rows += _threshold_free(summary)
    rows += _search_rows(summary)
    mean = ensemble["macro_f1"]["pooled"]
    references = "macro-F1 of other deciders, pooled"
    rows += [
        Row("all seeds' mean probability", references, mean["value"], clip_interval=mean["clip_ci"]),
        Row("chance (labels permuted)", references, chance["mean"], clip_interval=chance["interval"]),
        Row("every class present", references, baselines["all_positive"]["macro_f1"]["pooled"]),
        Row("majority of each class", references, baselines["majority"]["macro_f1"]["pooled"]),
    ]
    return rows


def _database_row(entry: Mapping, name: str, figure: str) -> Row:
    score, leaky = entry["honest"][figure], entry["leaky"]
    return Row(
        f"{name} {entry['database']} ({entry['clips']})",
        "Per database (clips), pooled",
        score["mean"],
        score["sd"],
        score["seed_ci"],
        score["clip_ci"],
        leaky=leaky and leaky[figure]["mean"],
    )


def _search_rows(summary: Mapping) -> list[Row]:
    """What other choices of hyper-parameters score, where the study chose some on inner splits."""
    search = summary["search"]
    if search is None:
        return []
    group, rows = f"Hyper-parameters chosen otherwise, {score_name(summary)}, pooled", []
    if search["default"]:
        score = search["default"]["macro_f1"]["pooled"]
        rows.append(
            Row("candidate 0 in every fold", group, score["mean"], score["sd"], score["seed_ci"], score["clip_ci"])
        )
    for name, words in (("best_overall", "best on held-out clips"), ("best_per_fold", "best on each held-out fold")):
        if leak := search["leaky"][name]:
            rows.append(Row(words, group, None, leaky=leak["macro_f1"]["pooled"]["mean"]))
    return rows


def _threshold_free(summary: Mapping) -> list[Row]:
    averages = [("pooled", "pooled"), ("mean of folds", "fold_mean")]
    if summary["study"]["single_subject_folds"]:  # whose clips hardly ever have two classes to rank
        averages = averages[:1]
    group = "Threshold-free, mean of classes (AP: average precision)"
    scores = [
        (f"{name}, {words}", summary[key]["mean"][average])
        for name, key in (("AUROC", "auroc"), ("AP", "average_precision"))
        for words, average in averages
    ]
    return [Row(name, group, score["mean"], score["sd"]) for name, score in scores]


def _at(block: Mapping, path) -> Mapping:
    for key in path:
        block = block[key]
    return block


def format_interval(interval, digits: int = 3) -> str:
    """``[0.512, 0.634]``, or an en dash where there is no interval."""
    if interval is None or any(value is None for value in interval):
        return "–"
    return "[" + ", ".join(format_number(value, digits) for value in interval) + "]"


def format_mean(mean: float | None, sd: float | None, digits: int = 3) -> str:
    """``0.573 ± 0.021``, or the mean alone where there is no standard deviation."""
    return format_number(mean, digits) + ("" if sd is None else f" ± {format_number(sd, digits)}")


def terminal_table(summary: Mapping) -> str:
    """The table of scores as plain text of at most 100 columns, for a terminal or a log file.

    Args:
        summary: What :func:`mer_jax.study.summary.summarise` gave.

    Returns:
        Lines without a final newline.
    """
    level = f"{100 * summary['evaluation']['confidence']:g} % CI"
    rows, decimals = score_rows(summary), digits(summary)
    untuned = not multi_class(summary)  # without thresholds there is none that was not tuned
    width = max(30, *(len(row.name) + 2 for row in rows))
    layout = (f"{{:<{width}}} {{:>15}} {{:>16}} {{:>16}}" + " {:>8}" * (1 + untuned)).format
    heads = ("LEAKY", "see end") if leaky_block(summary) else ("", "")
    lines = [
        layout("", "honest ± sd", level, level, *(["at 0.5"] if untuned else []), heads[0]),
        layout("", "over seeds", "over seeds", "clips and seeds", *(["untuned"] if untuned else []), heads[1]),
    ]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"-- {group} " + "-" * (94 - len(group)))
        cells = (
            format_mean(row.mean, row.sd, decimals),
            format_interval(row.seed_interval, decimals),
            format_interval(row.clip_interval, decimals),
            *([format_number(row.untuned, decimals)] if untuned else []),
            format_number(row.leaky, decimals) if leaky_block(summary) else "",
        )
        lines.append(layout(("> " if row.key else "  ") + row.name, *cells))
    lines.append("-" * 98)
    if leaky := leaky_block(summary):
        inflation = leaky["inflation"]["pooled"]
        difference = f"{format_signed(inflation['mean'], decimals)} {format_interval(inflation['clip_ci'], decimals)}"
        lines += [
            f"LEAKY chooses {leaky_choices(summary)} on the clips that it is scored on: not an estimate.",
            f"It would have claimed {difference} {score_name(summary)}.",
        ]
    for note in summary["notes"]:
        lines += textwrap.wrap(f"note: {note}", 98, subsequent_indent="      ")
    return "\n".join(line.rstrip() for line in lines)


def format_signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign."""
    text = format_number(value, digits)
    return f"+{text}" if value is not None and value >= 0 else text
