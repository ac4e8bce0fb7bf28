"""The tables of a grid: what stands in them, for the terminal and the page alike, and as plain text."""

import textwrap
from collections.abc import Mapping, Sequence

from mer_jax.report.plots import format_number
from mer_jax.report.tables import format_interval, format_mean, format_signed
from mer_jax.study.summary import format_p

_FUSIONS = {
    "concat": "concat, one encoder",
    "mean": "two pools, mean",
    "gate": "two pools, softmax gate",
}


def fusion_words(fusion: str) -> str:
    """A way to fuse in the words of the paper's Table 3."""
    return _FUSIONS[fusion]


def row_label(row: Mapping) -> str:
    """What a row is called in a table: ``hog + facemesh, gate``."""
    names = " + ".join(name for name in (row["appearance"], row["geometry"]) if name)
    return f"{names}, {row['fusion']}" if row["fusion"] else names


def format_difference(found: Mapping) -> tuple[str, str, str]:
    """A difference, its interval and its p-value."""
    interval = ", ".join(format_signed(value) for value in found["interval"])
    return format_signed(found["difference"]), f"[{interval}]", format_p(found["p_value"])


def cross_table(summary: Mapping, average: str = "pooled") -> list[list[str]]:
    """Table 2 as a grid: rows are geometry (3D), columns appearance (2D), single features at the margins.

    Args:
        summary: What :func:`mer_jax.study.grid_summary.summarise_grid` gave.
        average: ``'pooled'`` or ``'fold_mean'``.

    Returns:
        Lines of cells, the first line and the first cell of each being headings; an en dash where there is no row.
    """
    main = summary["fusions"][0] if summary["fusions"] else ""
    cells = {
        (row["appearance"], row["geometry"]): row
        for row in summary["rows"]
        if row["fusion"] in ("", main) and not row["failed"]
    }

    def cell(appearance, geometry):
        if (appearance, geometry) not in cells:
            return "–"
        score = cells[appearance, geometry]["macro_f1"][average]
        return format_mean(score["mean"], score["sd"])

    columns = [*_names(summary, "appearance"), ""]
    lines = [["3D \\ 2D", *(name or "3D alone" for name in columns)]]
    for geometry in [*_names(summary, "geometry"), ""]:
        lines.append([geometry or "2D alone", *(cell(name, geometry) for name in columns)])
    return lines


def _names(summary: Mapping, modality: str) -> list[str]:
    return list(dict.fromkeys(row[modality] for row in summary["rows"] if row[modality]))


def score_table(summary: Mapping) -> list[tuple[Mapping, list[str]]]:
    """Every row of the grid, best first, and its cells: name, pooled and fold mean with their intervals, chance."""
    lines = []
    for row in ranked(summary):
        cells = [row_label(row)]
        for average in ("pooled", "fold_mean"):
            score = row["macro_f1"][average]
            cells += [format_mean(score["mean"], score["sd"]), format_interval(score["clip_ci"])]
        cells.append(format_number(row["chance"]["pooled"]["mean"]))
        lines.append((row, cells))
    return lines


def ranked(summary: Mapping) -> list[Mapping]:
    """The rows that were scored, the highest pooled score first."""
    scored = [row for row in summary["rows"] if not row["failed"]]
    return sorted(scored, key=lambda row: -row["macro_f1"]["pooled"]["mean"])


def best_table(summary: Mapping, average: str = "pooled") -> list[tuple[Mapping, list[str]]]:
    """Every row against the best of an average: name, difference, interval, p-value, probability of being best."""
    lines = []
    scored = [row for row in summary["rows"] if not row["failed"]]
    for row in sorted(scored, key=lambda row: -row["macro_f1"][average]["mean"]):
        versus = row["minus_best"][average]
        cells = format_difference(versus) if versus else ("best", "–", "–")
        lines.append((row, [row_label(row), *cells, format_number(row["probability_best"][average])]))
    return lines


def fusion_table(summary: Mapping) -> list[tuple[str, list[list[str]]]]:
    """Table 3: for each pair, its ways to fuse and what each adds to the one before."""
    scored = {row["name"]: row for row in summary["rows"] if not row["failed"]}
    steps = {step["a"]: step["pooled"] for step in summary["steps"]}
    tables: dict[str, list[list[str]]] = {}
    for fusion in _FUSIONS:
        for row in scored.values():
            if row["fusion"] != fusion:
                continue
            pooled, fold_mean = (row["macro_f1"][average] for average in ("pooled", "fold_mean"))
            step = format_difference(steps[row["name"]]) if row["name"] in steps else ("–", "–", "–")
            tables.setdefault(f"{row['appearance']} + {row['geometry']}", []).append(
                [
                    fusion_words(fusion),
                    format_mean(pooled["mean"], pooled["sd"]),
                    format_mean(fold_mean["mean"], fold_mean["sd"]),
                    *step,
                ]
            )
    return list(tables.items())


def single_table(summary: Mapping) -> list[list[str]]:
    """What each pair of Table 2 adds to each of its features alone."""
    rows = {row["name"]: row for row in summary["rows"]}
    return [
        [f"{row_label(rows[step['a']])} − {step['b']}", *format_difference(step["pooled"])]
        for step in summary["over_single"]
    ]


def terminal_tables(summary: Mapping) -> str:
    """The tables of a grid as plain text, for a terminal or a log file.

    Args:
        summary: What :func:`mer_jax.study.grid_summary.summarise_grid` gave.

    Returns:
        Lines without a final newline.
    """
    level = f"{100 * summary['evaluation']['confidence']:g} %"
    study = summary["study"]
    main = f", pairs by {fusion_words(summary['fusions'][0])}" if summary["fusions"] else ""
    lines = [
        f"{len(summary['rows'])} rows, {study['clips']} held-out clips, {len(study['folds'])} folds, "
        f"{len(study['seeds'])} seeds; resampled: {study['resampled']}, and seeds",
        "",
        f"Table 2: macro-F1, pooled ± sd over seeds{main}",
        *_layout(cross_table(summary)),
        "",
        "Every row, best first",
        *_layout(
            [
                ["", "pooled ± sd", f"{level} CI", "fold mean ± sd", f"{level} CI", "chance"],
                *(cells for _, cells in score_table(summary)),
            ]
        ),
        "",
        "Against the best row (pooled); joint intervals and p-values hold for all pairs of rows at once",
        *_layout(
            [
                ["", "minus best", f"{level} joint CI", "adjusted p", "P(best)"],
                *(cells for _, cells in best_table(summary)),
            ]
        ),
    ]
    head = ["pooled ± sd", "fold mean ± sd", "minus above", f"{level} joint CI", "adjusted p"]
    for pair, cells in fusion_table(summary):
        lines += ["", f"Table 3: {pair}", *_layout([["", *head], *cells])]
    if summary["over_single"]:
        lines += [
            "",
            "What a pair adds to one of its features alone (pooled)",
            *_layout([["", "difference", f"{level} joint CI", "adjusted p"], *single_table(summary)]),
        ]
    lines.append("")
    for note in summary["notes"]:
        lines += textwrap.wrap(f"note: {note}", 98, subsequent_indent="      ")
    return "\n".join(line.rstrip() for line in lines)


def _layout(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width each, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
