"""One self-contained page per study: what it found, how sure that is, and everything needed to check it."""

import base64
import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation.thresholds import UNTUNED
from mer_jax.files import atomic_write_text, read_json
from mer_jax.report import plots
from mer_jax.report.clip_pictures import ReportPicture, write_pictures
from mer_jax.report.plots import format_number
from mer_jax.report.response_plot import Response, Score, response_curves
from mer_jax.report.style import STYLE
from mer_jax.report.tables import (
    LEAKY_EXPLANATION,
    digits,
    format_interval,
    format_mean,
    format_signed,
    leaky_block,
    leaky_choices,
    multi_class,
    score_name,
    score_rows,
)
from mer_jax.study.held_out import clip_probabilities, decide
from mer_jax.study.results import PHASES, TEST, UNKNOWN_LABEL, StudyResults, is_stream
from mer_jax.study.search_summary import SELECTION_WORDS
from mer_jax.study.shown import RULE
from mer_jax.study.summary import SCHEMA, format_p

FILENAME = "report.html"
# With more folds than these, what there is of each is in tables to open.
_MANY_FOLDS = 20
# Where MicroAttNet's authors look for one threshold (their section 4.4).
_SWEPT = (0.10, 0.30)


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes ``report.html`` from the files of a finished run.

    Only files of the run folder are read: ``summary.json`` and ``predictions.npz``, which must be there, and
    ``config.json``, ``overrides.json``, ``versions.json``, ``folds.csv`` and ``shown.npz``, whose sections are left
    out where they are not. The same files give the same bytes. Pictures of ``shown.npz`` are also written as files.

    Args:
        workdir: The run folder.

    Returns:
        Path of the page.

    Raises:
        UserError: The run is not finished, or one of its files cannot be read or written.
    """
    workdir = Path(workdir)
    results = StudyResults.load(workdir)
    summary = _read_json(workdir / "summary.json")
    if summary is None:
        raise UserError(
            f"{workdir / 'summary.json'}: not found; finish the study first (scripts/train.py --workdir={workdir})"
        )
    if summary.get("schema") != SCHEMA:
        raise UserError(
            f"{workdir / 'summary.json'}: written by another version; evaluate the run again "
            f"(scripts/evaluate.py report {workdir})"
        )
    page = _Page(
        name=workdir.resolve().name,
        results=results,
        summary=summary,
        config=_read_json(workdir / "config.json") or {},
        overrides=_read_json(workdir / "overrides.json") or {},
        versions=_read_json(workdir / "versions.json") or {},
        no_face=_clips_without_face(workdir / "folds.csv"),
        pictures=write_pictures(workdir, results, summary["evaluation"]),
    )
    path = workdir / FILENAME
    atomic_write_text(path, page.render())
    return path


def _read_json(path: Path):
    """Content of a JSON file, or None where there is no such file."""
    return read_json(path, "delete it and run scripts/train.py again") if path.exists() else None


def _clips_without_face(path: Path) -> list[str] | None:
    """Names in the fold table whose crop fell back, None where the table does not tell."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it and run the same command again, which goes on without it"
        ) from error
    if not rows or "face_found" not in rows[0] or "clip" not in rows[0]:
        return None
    return [row["clip"] for row in rows if row["face_found"].strip().lower() in ("0", "false")]


def _flatten(tree, prefix: str = "") -> dict[str, str]:
    """Leaves of nested dicts as dotted name -> text."""
    if not isinstance(tree, Mapping):
        return {prefix: tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)}
    leaves = {}
    for name, value in tree.items():
        leaves |= _flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return leaves


class _Page:
    """The data of one report and its sections, each of them HTML, empty where a study has nothing to show."""

    def __init__(self, name, results: StudyResults, summary, config, overrides, versions, no_face, pictures):
        self.name, self.results, self.summary = name, results, summary
        self.config, self.overrides, self.versions, self.no_face = config, overrides, versions, no_face
        self.pictures: list[ReportPicture] = pictures
        self.labels: list[str] = summary["labels"]
        self.multi_class, self.score = multi_class(summary), score_name(summary)
        self.leaky, self.digits = leaky_block(summary), digits(summary)
        self.level = f"{100 * summary['evaluation']['confidence']:g} %"
        self.used = self._members_used()

    def _members_used(self) -> np.ndarray:
        """``(M,)`` bool: members that finished, of the hyper-parameters that their fold was given."""
        used = self.results.ok.copy()
        settings = self.summary["settings"]
        if len(settings) < 2:
            return used
        chosen = np.zeros_like(used)
        for setting in settings:
            same = np.isin(self.results.member_fold, setting["chosen_for_folds"])
            for name, value in setting["hyper"].items():
                same &= np.isclose(self.results.hyper[name], value, rtol=1e-5)
            chosen |= same
        return used & chosen

    def render(self) -> str:
        """The whole page."""
        sections: list[tuple[str, str, Callable[[], str]]] = [
            ("scores", "Scores", self.scores),
            ("databases", "Scores per database", self.databases),
            ("seeds", "Scores over seeds", self.seeds),
            ("classes", "Classes", self.classes),
            ("confusion", "Confusion of classes" if self.multi_class else "Confusion per label", self.confusion),
            ("leaks", "What leaking would claim", self.leaks),
            ("thresholds", "Thresholds", self.thresholds),
            ("curves", "Learning curves", self.curves),
            ("variance", "Where the variance comes from", self.variance),
            ("width", "Seeds needed", self.width),
            ("gate", "Gate weights", self.gate),
            ("streams", "Attention over streams", self.streams),
            ("attention", "Frame attention", self.attention),
            ("clips", "Attention on single clips", self.clips),
            ("settings", "Hyper-parameters tried", self.settings),
            ("predictions", "Predictions per clip", self.predictions),
            ("members", "Members and clips", self.members),
            ("config", "Configuration and versions", self.configuration),
        ]
        built = [(key, title, body) for key, title, make in sections if (body := make())]
        links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in built)
        html = {key: f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>' for key, title, body in built}
        # These two figures are narrow and belong together.
        html["variance"] = f'<div class="pair">{html["variance"]}{html.pop("width")}</div>'
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.name)} – study report</title><style>{STYLE}</style></head><body><main>"
            f'{self.head()}<nav aria-label="Sections">{links}</nav>{"".join(html.values())}'
            "</main></body></html>\n"
        )

    def head(self) -> str:
        """Title, banner, the answer in one sentence, and the study's size."""
        study, score = self.summary["study"], self.summary["honest"]["macro_f1"]["pooled"]
        chance = self.summary["chance"]["macro_f1"]["pooled"]
        intervals = f"{self.level} CI {self._interval(score['clip_ci'])} over clips and seeds"
        if score["seed_ci"]:
            intervals += f", {self._interval(score['seed_ci'])} over seeds alone"
        else:
            intervals = intervals.replace("clips and seeds", "clips, with one seed")
        answer = (
            f"On clips that its members never saw, this study reaches a {self.score} of "
            f"<b>{format_number(score['mean'], self.digits)}</b> ({intervals})"
        )
        if self.multi_class:
            uar = self.summary["honest"]["uar"]["pooled"]
            answer += f" and a UAR of <b>{format_number(uar['mean'], self.digits)}</b> {self._interval(uar['clip_ci'])}"
        by_chance = f"{format_number(chance['mean'], self.digits)} {self._interval(chance['interval'])}"
        answer += f", where {self.score} by chance is {by_chance}"
        if self.leaky:
            answer += (
                f" and choosing {leaky_choices(self.summary)} on those very clips would have claimed "
                f"{format_number(self.leaky['macro_f1']['pooled']['mean'], self.digits)}"
            )
        answer += "."
        facts = {
            "clips scored": study["clips"],
            "subjects": "unknown" if study["subjects"] is None else study["subjects"],
            "folds": len(study["folds"]),
            "seeds scored": len(study["seeds"]),
            "members": study["members"],
            "diverged": len(study["diverged"]),
            "test clips": study["test_clips"],
        }
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
        return (
            f'{self.banner()}<p class="eyebrow">Micro-expression study</p><h1>{escape(self.name)}</h1>'
            f'<p class="answer">{answer}</p><dl class="facts">{cells}</dl>'
        )

    def _interval(self, interval) -> str:
        return f'<span class="interval">{format_interval(interval, self.digits)}</span>'

    def banner(self) -> str:
        """A warning where the clips are the rendered demo."""
        values = [text for name, text in _flatten(self.config).items() if "data" in name]
        if not any(text == "demo" or text.endswith("/demo") for text in values):
            return ""
        return (
            '<p class="banner" role="note"><strong>Demo data.</strong> These clips are rendered from one '
            "public-domain photograph. Numbers on the demo show that the machinery works. They are not a "
            "benchmark and say nothing about real faces.</p>"
        )

    def scores(self) -> str:
        """The table, with the leaky column marked as such."""
        # Name, whether the study has the column, and its cells.
        table = {
            "honest<br>mean ± sd over seeds": (True, lambda row: format_mean(row.mean, row.sd, self.digits)),
            f"{self.level} CI<br>over seeds": (True, lambda row: format_interval(row.seed_interval, self.digits)),
            f"{self.level} CI<br>over clips and seeds": (
                True,
                lambda row: format_interval(row.clip_interval, self.digits),
            ),
            "threshold 0.5<br>untuned": (not self.multi_class, lambda row: format_number(row.untuned, self.digits)),
            "leaky<br>not an estimate": (self.leaky, lambda row: format_number(row.leaky, self.digits)),
        }
        shown = {name: cell for name, (there, cell) in table.items() if there}
        columns = ["measure", *shown]
        leaky = (len(shown),) if self.leaky else ()
        rows, group = [], ""
        for row in score_rows(self.summary):
            if row.group != group:
                group = row.group
                rows.append(
                    f'<tr class="group"><th scope="rowgroup" colspan="{len(columns)}">{escape(group)}</th></tr>'
                )
            cells = (escape(row.name), *(cell(row) for cell in shown.values()))
            rows.append(_row(cells, leaky=leaky, css="key" if row.key else ""))
        terms = "".join(
            f"<div><dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd></div>"
            for name, text in self.summary["definitions"].items()
        )
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.summary["notes"])
        rule = f"Thresholds are {self._threshold_words()}."
        if self.multi_class:
            rule = "The likeliest class is predicted."
        explained = f'<p class="note first"><b>Leaky:</b> {LEAKY_EXPLANATION}</p>' if self.leaky else ""
        return (
            f"<p>Each score is on clips held out from the members that predict them. {rule}</p>"
            f"{_table(columns, rows, leaky=leaky)}{explained}{notes}"
            "<details><summary>What each figure means, by its name in summary.json</summary>"
            f'<dl class="terms">{terms}</dl></details>'
        )

    def databases(self) -> str:
        """Pooled scores of all clips and of each database."""
        entries = self.summary["databases"]
        if not entries:
            return ""
        columns = ["database", "clips", "subjects", *map(escape, self.labels)]
        columns += [f"{name}, mean ± sd<br>{self.level} CI" for name in (self.score, "UAR")]
        columns += [f"seeds' mean<br>{self.score}, UAR", *[f"leaky<br>{self.score}, UAR"] * bool(self.leaky)]
        leaky = (len(columns) - 1,) if self.leaky else ()
        rows = []
        for entry in entries:
            people = "unknown" if entry["subjects"] is None else str(entry["subjects"])
            cells = [escape(entry["database"]), str(entry["clips"]), people]
            cells += [str(entry["positives"][label]) for label in self.labels]
            for figure in ("macro_f1", "uar"):
                score = entry["honest"][figure]
                interval = format_interval(score["clip_ci"], self.digits)
                cells.append(f"{format_mean(score['mean'], score['sd'], self.digits)}<br>{interval}")
            pairs = [[entry["ensemble"][figure]["value"] for figure in ("macro_f1", "uar")]]
            if self.leaky:
                pairs.append([entry["leaky"][figure]["mean"] for figure in ("macro_f1", "uar")])
            cells += ["<br>".join(format_number(value, self.digits) for value in pair) for pair in pairs]
            rows.append(_row(cells, leaky=leaky, css="" if rows else "key"))
        return (
            "<p>The pooled held-out decisions of all clips, then of the clips of each database alone; under the "
            "classes, how many clips have them. A class that a database lacks counts 0. Seeds' mean: the decision of "
            f"the probabilities averaged over seeds.</p>{_table(columns, rows, leaky=leaky)}"
        )

    def _threshold_words(self) -> str:
        """How the honest thresholds came about."""
        evaluation = self.summary["evaluation"]
        if evaluation["thresholds"] == "fixed":
            return f"fixed at {escape(json.dumps(evaluation['fixed_threshold']))}"
        what = "one for all classes" if evaluation["thresholds"] == "global" else "one per class"
        return f"{what}, tuned on training clips that did not train the member"

    def seeds(self) -> str:
        """The distribution of the score over seeds, pooled and per fold."""
        seeds = self.summary["study"]["seeds"]
        honest, leaky = self.summary["honest"], self.leaky
        apart = not self.summary["study"]["single_subject_folds"] and len(self.summary["folds"]) <= _MANY_FOLDS
        pooled = [("pooled", "macro_f1", "pooled")]
        if self.multi_class:
            pooled = [("UF1, pooled", "macro_f1", "pooled"), ("UAR, pooled", "uar", "pooled")]
        pooled += [("mean of folds", "macro_f1", "fold_mean")] if apart else []
        rows = [
            (
                name,
                _floats(honest[figure][key]["values"]),
                _floats(leaky[figure][key]["values"]) if leaky else [],
                seeds,
            )
            for name, figure, key in pooled
        ]
        for entry in self.summary["databases"][1:]:
            values = [_floats(entry[kind]["macro_f1"]["values"]) if entry[kind] else [] for kind in ("honest", "leaky")]
            rows.append((f"{self.score}, {entry['database']}", *values, seeds))
        words = "One dot per seed. "
        if apart:
            rows += [
                (f"fold {fold['fold']} ({fold['clips']} clips)", _floats(fold["macro_f1"]), [], fold["seeds"])
                for fold in self.summary["folds"]
            ]
            words += "The upper rows put all folds of a seed together; below them, each fold on its own clips. "
        else:
            words += "Each row puts all folds of a seed together. "
        chance = self.summary["chance"]["macro_f1"]["pooled"]["mean"]
        one = "" if len(seeds) > 1 else "<p>There is one seed: how much a seed matters stays unknown.</p>"
        name = "UF1 or UAR" if self.multi_class else "macro-F1"
        return one + _figure(
            plots.score_strips(rows, score_name=name, chance=chance),
            f"{words}The dashed line is the pooled {self.score} with permuted labels.",
        )

    def classes(self) -> str:
        """Bars per class."""

        def f1(block, key):
            if block is None:
                return [None] * len(self.labels)
            return [block["per_class_f1"][label]["pooled"][key] for label in self.labels]

        honest = self.summary["honest"]
        tp, fp, fn, tn = self._counts()
        figure = plots.class_bars(
            [f"{label} ({count:.0f})" for label, count in zip(self.labels, tp + fn, strict=True)],
            _floats(f1(honest, "mean")),
            np.stack([_floats(interval) for interval in f1(honest, "clip_ci")]),
            score_name="F1 of the class against the rest" if self.multi_class else "F1 of “present”",
            untuned=_floats(f1(self.summary["untuned"], "mean")),
            leaky=_floats(f1(self.leaky, "mean")),
            # Who always says "present" has the prevalence as precision, and a recall of one.
            reference=2 * (tp + fn) / (tp + fn + tp + fp + fn + tn),
        )
        return _figure(
            figure,
            f"F1 per class over all held-out clips, mean over seeds, with the {self.level} CI over clips and "
            "seeds. In brackets: clips with the label. “Always present” claims the label for every clip.",
        )

    def _counts(self) -> np.ndarray:
        """``(4, C)`` true and false positives, false and true negatives: clips, mean over seeds."""
        cells = self.summary["honest"]["confusion"]
        return np.array([[cells[label][key] for label in self.labels] for key in ("tp", "fp", "fn", "tn")])

    def confusion(self) -> str:
        """Counts per label, or of each true class by what was predicted."""
        if self.multi_class:
            matrix = self.summary["honest"]["confusion_matrix"]
            counts = np.array([[matrix[true][predicted] for predicted in self.labels] for true in self.labels])
            return _figure(
                plots.confusion_matrix(self.labels, counts),
                "Held-out clips per cell, mean over seeds. Shade and percentage are the share of the row: on the "
                "diagonal, the recall of the class.",
            )
        return _figure(
            plots.confusions(self.labels, self._counts()),
            "Held-out clips per cell, mean over seeds; the columns are what was predicted. Shade and "
            "percentage are the share of the row, blue where the decision is right.",
        )

    def leaks(self) -> str:
        """The leaky protocols, one row each."""
        missing = (
            "" if self.summary["leaky"]["best_epoch"] else ("<p>The best epoch is not known: no curves were kept.</p>")
        )
        if self.leaky is None:
            return missing
        names = {
            "best_epoch": "best epoch on the held-out fold",
            "best_epoch_untuned": "the same at threshold 0.5 (minus untuned)",
            "heldout_thresholds": "thresholds tuned on the held-out fold",
            "both": "epoch and thresholds",
        }
        rows = []
        # Column, figure, average, and where its inflation is.
        shown = [("macro-F1<br>pooled", "macro_f1", "pooled"), ("macro-F1<br>mean of folds", "macro_f1", "fold_mean")]
        if self.multi_class:
            shown = [("UF1<br>pooled", "macro_f1", "pooled"), ("UAR<br>pooled", "uar", "pooled")]
            names["best_epoch"] = "epoch of the highest accuracy on the held-out fold"
        for key, words in names.items():
            if leak := self.summary["leaky"][key]:
                cells = [words]
                for _, figure, average in shown:
                    inflation = leak["inflation"]["uar"] if figure == "uar" else leak["inflation"]
                    difference = inflation[average]
                    cells.append(format_number(leak[figure][average]["mean"], self.digits))
                    interval = format_interval(difference["clip_ci"], self.digits)
                    cells.append(f"{format_signed(difference['mean'], self.digits)} {interval}")
                rows.append(_row(cells, leaky=(1, 3)))
        columns = ["chosen on the clips that are scored"]
        for name, _, _ in shown:
            columns += [name, f"minus honest<br>{self.level} CI"]
        best = self.summary["leaky"]["global_threshold"]
        one = (
            ""
            if best is None
            else (
                '<p class="first">One threshold for all classes, chosen on all held-out clips together, would be '
                f"{format_number(best['threshold'], 2)} and claim a macro-F1 of {format_number(best['macro_f1'])}.</p>"
            )
        )
        return (
            "<p>The same members, judged as papers often do. What they gain by it is not skill.</p>"
            f"{_table(columns, rows, leaky=(1, 3))}{one}{missing}"
        )

    def thresholds(self) -> str:
        """Score over one global threshold, over one per class, and the thresholds in use."""
        curve = self.summary["threshold_curve"]
        if curve is None:
            return ""
        fixed = self.summary["evaluation"]["fixed_threshold"]
        marks = [("0.5", "ink", 0.5)]
        marks += [(f"fixed {fixed:.2f}", "green", fixed)] if np.isscalar(fixed) and fixed != UNTUNED else []
        x = _floats(curve["threshold"])
        inner, leaky = "inner splits: the study may choose here", "held-out clips: leaky to choose here"
        curves = [(leaky, "orange", _floats(curve["heldout_leaky"]))]
        panels = [(leaky, "orange", self._per_class(curve["per_class_heldout_leaky"]))]
        if curve["inner"] is not None:
            curves.insert(0, (inner, "blue", _floats(curve["inner"])))
            panels.insert(0, (inner, "blue", self._per_class(curve["per_class_inner"])))
        used = np.array([fold["thresholds"] for fold in self.summary["folds"]], float)  # (F, C)
        rows = [
            _row([f"fold {fold['fold']}", *map(format_number, fold["thresholds"]), str(fold["inner_clips"])])
            for fold in self.summary["folds"]
        ]
        none = "" if curve["inner"] is not None else "<p>There is no inner split to tune a threshold on.</p>"
        return (
            none
            + _figure(
                plots.curves(
                    x,
                    curves,
                    x_name="one threshold for all classes (probability)",
                    y_name="macro-F1",
                    marks=marks,
                    label="Macro-F1 over the threshold",
                    span=("{:.2f}–{:.2f}, MicroAttNet's sweep".format(*_SWEPT), *_SWEPT),
                ),
                "All folds and seeds together. A study may look at the blue curve, never at the orange one.",
            )
            + _figure(
                plots.class_panels(
                    self.labels,
                    x,
                    panels,
                    x_name="threshold",
                    x_ticks=np.array([0, 0.5, 1]),
                    label="F1 over the threshold",
                    marks=used,
                ),
                "F1 of each class over its own threshold. Triangles: the thresholds in use, one per fold, "
                f"{self._threshold_words()}.",
            )
            + "<details><summary>Thresholds in use</summary>"
            + _table(["held out", *map(escape, self.labels), "inner clips"], rows)
            + "</details>"
        )

    def _per_class(self, curves: Mapping) -> np.ndarray:
        """``(C, 1, X)`` from one list per label."""
        return np.stack([_floats(curves[label]) for label in self.labels])[:, None]

    def curves(self) -> str:
        """Losses over epochs."""
        results, used = self.results, self.used
        losses = {
            "train": results.curve_train_loss[used],
            "inner split": results.curve_inner_loss[used],
            "held out": results.curve_heldout_loss[used],
        }
        # Members that stopped early have no later losses; where few go on, their curve is no longer the study's.
        reached = np.isfinite(losses["train"]).mean(axis=0) >= 0.5
        losses = {name: values[:, reached] for name, values in losses.items() if np.isfinite(values).any()}
        if not losses or not reached.any():
            return "<p>No losses were kept.</p>"
        count = f"{used.sum()} members" if used.sum() > 1 else "one member"
        return _figure(
            plots.learning_curves(
                results.curve_epoch[reached],
                losses,
                results.member_stop_epoch[used],
                "training loss, mean over clips (nats)"
                if self.multi_class
                else "training loss, mean over labels (nats)",
            ),
            f"Median and 5–95 % band over {count}, up to the last epoch that half of them reached. Below: "
            "the epoch whose parameters were kept, median and 5–95 %. The held-out curve chooses nothing."
            + ("" if "inner split" in losses else " There is no inner split to stop on."),
        )

    def variance(self) -> str:
        """Shares of fold, seed and rest."""
        split = self.summary["variance"]
        if self.summary["study"]["single_subject_folds"]:
            return (
                "<p>Each fold is one subject. The score of a single subject's few clips says mostly which classes the "
                "subject has, so it is not split into fold, seed and rest; the intervals over seeds and over clips "
                "tell the two parts of the pooled score.</p>"
            )
        if split is None:
            return "<p>A split into fold, seed and rest needs at least two folds and two seeds.</p>"
        parts = []
        for name, colour in (("fold", "blue"), ("seed", "orange"), ("rest", "grey")):
            words = f"sd {format_number(split[name]['sd'])}"
            words += " (estimated below zero)" if split[name]["truncated"] else ""
            parts.append((name, colour, split[name]["share"] or 0.0, words))
        within = split["seed_sd_within_fold"]
        return _figure(
            plots.share_bar(parts, "Variance of macro-F1 over folds and seeds"),
            "Two-way random effects on the macro-F1 of each fold and seed. Fold: which clips are held out. "
            "Seed: what a seed does to all folds alike. Rest: its luck within one fold."
            + ("" if within is None else f" Within a fold, seeds scatter by sd {format_number(within)}."),
        )

    def width(self) -> str:
        """Seeds that an interval of a given width needs."""
        sd, seeds = self.summary["honest"]["macro_f1"]["pooled"]["sd"], len(self.summary["study"]["seeds"])
        needed = self.summary["seeds_needed"]
        targets = [(target["seeds"], target["half_width"]) for target in needed if target["seeds"]]
        if not sd or not targets:
            return "<p>Known only where at least two seeds differ.</p>"
        confidence = self.summary["evaluation"]["confidence"]
        return _figure(
            plots.width_curve(sd, seeds, targets, confidence=confidence, score_name=self.score),
            f"Half-width of the {self.level} t interval of the pooled mean, on these clips. More seeds do "
            "not narrow the interval over clips.",
        )

    def gate(self) -> str:
        """The gate's weights over members."""
        results = self.results
        names = results.gate_name.tolist()
        weights = results.gate[self.used].astype(float)
        if not names or not np.isfinite(weights).any():
            return ""
        members, folds = results.member_id[self.used], results.member_fold[self.used]
        if len(names) == 2:
            # The second weight is one minus the first, so one scale shows both.
            rows = [(f"fold {f}", weights[folds == f, 0], members[folds == f].tolist()) for f in np.unique(folds)]
            axis, ends = f"weight of {names[0]}", (f"all {names[1]}", f"all {names[0]}")
        else:
            rows = [(name, weights[:, index], members.tolist()) for index, name in enumerate(names)]
            axis, ends = "weight", ("none", "all")
        means = ", ".join(
            f"{escape(name)} {format_number(mean, 2)}"
            for name, mean in zip(names, np.nanmean(weights, axis=0), strict=True)
        )
        return _figure(
            plots.gate_strips(rows, axis=axis, ends=ends, even=1 / len(names)),
            f"One dot per member. Mean weights: {means}. The dashed line weighs all modalities alike.",
        )

    def attention(self) -> str:
        """Attention over frames per class and modality."""
        series, frames = [], 0
        frame_wise = [(name, values) for name, values in self.results.attention.items() if not is_stream(name)]
        for (name, values), colour in zip(frame_wise, ("green", "purple", "grey"), strict=False):
            per_class = self._attention_per_class(values)
            if np.isfinite(per_class).any():
                series.append((name, colour, np.moveaxis(plots.quantiles(per_class), 0, 1)))  # (C, 3, T)
                frames = max(frames, per_class.shape[-1])
        if not series:
            return ""
        figure = plots.class_panels(
            self.labels,
            np.arange(1, frames + 1),
            series,
            x_name="frame",
            x_ticks=np.unique(np.round(np.linspace(1, max(frames, 2), 4))),
            label="Attention over frame positions",
            reference=(f"even attention, 1/{frames}", 1 / frames),
        )
        return _figure(
            figure,
            "Share of attention on each frame position (after resampling), mean over queries and over the "
            "held-out clips that have the label. Median and 5–95 % band over members.",
        )

    def clips(self) -> str:
        """Pictures of single clips."""
        if not self.pictures:
            return ""
        figures = []
        for picture in self.pictures:
            source = base64.b64encode(picture.png).decode()
            image = f'<img src="data:image/png;base64,{source}" alt="{escape(picture.text)}" loading="lazy">'
            figures.append(
                _figure(image, f"{escape(picture.name)}: chosen for {escape(', '.join(picture.chosen_for))}.")
            )
        return (
            f"<p>The clips were chosen by a rule, not by how they look: {RULE}. Curves show which frames the study's "
            "pools attend to; colours, where they are, to which patches of a frame a network's summary token attends "
            "in its last layer. Attention is not an explanation: it tells where information was taken from, not what "
            "was made of it, and the network behind the colours knows nothing of expressions.</p>" + "".join(figures)
        )

    def streams(self) -> str:
        """What each stream weighs after each block, per class and phase."""
        results = self.results
        blocks = sorted((name, values) for name, values in results.attention.items() if is_stream(name))
        phases = [phase for phase in PHASES if phase in results.sample_phase]
        panels = []
        for name, values in blocks:
            rows = []
            for phase in phases or [""]:
                per_class = self._attention_per_class(values, phase)  # (M', C, S)
                rows += [
                    (
                        f"{label}, {phase.replace('_', ' → ')}" if phase else label,
                        _mean_or_nan(np.nansum(part, axis=0), np.isfinite(part).sum(axis=0)),
                        plots.quantiles(part)[[0, 2]],
                    )
                    for label, part in zip(self.labels, np.moveaxis(per_class, 1, 0), strict=True)
                ]
            panels.append((f"after block {name.removeprefix('streams')}", rows))
        if not any(np.isfinite(mean).all() for _, rows in panels for _, mean, _ in rows):
            return ""
        return _figure(
            plots.share_panels(results.stream_name.tolist(), panels, label="Attention over streams"),
            "Share of each stream's weight, mean over the held-out samples of clips with the label and over members. "
            "A pointer on a bar shows the 5–95 % range over members.",
        )

    def _attention_per_class(self, attention: np.ndarray, phase: str = "") -> np.ndarray:
        """Mean over held-out samples of a class: ``(M, V, T)`` -> ``(M', C, T)``, NaN where none is.

        Args:
            attention: ``(M, V, T)``.
            phase: The samples that count; ``''`` for all.
        """
        results = self.results
        rows = results.curve_sample[self.used]  # (M', V)
        attention = attention[self.used].astype(float)  # (M', V, T)
        present = results.clip_labels[results.sample_clip[rows.clip(0)]] == 1  # (M', V, C)
        known = (rows >= 0) & np.isfinite(attention).all(axis=-1)  # (M', V)
        if phase:
            known &= results.sample_phase[results.curve_sample[self.used].clip(0)] == phase
        weight = (present & known[..., None]).astype(float)  # (M', V, C)
        total = np.einsum("mvc,mvt->mct", weight, np.where(known[..., None], attention, 0.0))
        return _mean_or_nan(total, weight.sum(axis=1)[..., None])

    def settings(self) -> str:
        """What was chosen among hyper-parameters, what that gained, and how scores respond to them."""
        search = self.summary["search"]
        if search is None:
            return ""
        settings, measure = self.summary["settings"], SELECTION_WORDS[search["selection"]]
        folds = np.array(search["stability"]["counts"])
        ranges = self.config.get("search", {})
        responses = [
            Response(
                name,
                np.array([setting["hyper"][name] for setting in settings], float),
                bool(ranges.get(name)) and ranges[name][0] == "log_uniform",
            )
            for name in search["varied"]
        ]
        better = "higher" if search["higher_is_better"] else "lower"
        inner = np.array([_floats(setting["inner"]).mean() for setting in settings])
        heldout = _floats(setting["macro_f1"]["pooled"] for setting in settings)
        figure = _figure(
            response_curves(
                responses,
                [
                    Score(f"inner {measure}, mean of folds ({better} is better)", "blue", inner),
                    Score(f"held-out {self.score}, pooled: leaky to choose by", "orange", heldout),
                ],
                folds,
            ),
            "One dot per candidate and panel, mean over seeds. A study may choose on the left, never on the right. "
            "Other hyper-parameters vary along with the one shown, so the line is their typical response, not that of "
            "one candidate.",
        )
        agree = search["rank_correlation"]
        agreement = (
            "" if agree is None else f" Over the candidates, their rank correlation is {format_number(agree, 2)}."
        )
        return (
            f"<p>{len(settings)} candidates. Each held-out fold uses the candidate of the best inner {measure}, over "
            f"all of the fold's seeds, on inner splits of its own training clips; {self._stability_words(search)}. "
            "The figures of this study are those of this whole procedure (nested).</p>"
            f"{self._search_table(search)}{figure}"
            f'<p class="note first">Inner and held-out scores need not agree.{agreement}</p>'
            f"{self._candidates(search, inner)}"
        )

    def _stability_words(self, search: Mapping) -> str:
        stability, folds = search["stability"], len(self.summary["folds"])
        most = stability["most_chosen"]
        if stability["distinct"] == 1:
            return f"all {folds} folds chose candidate {most}"
        if stability["distinct"] == folds:
            return f"each of the {folds} folds chose another one"
        return (
            f"{folds} folds chose {stability['distinct']} different ones, candidate {most} for "
            f"{stability['counts'][most]} of them"
        )

    def _search_table(self, search: Mapping) -> str:
        """The nested score beside fixed values and leaky choices."""
        honest, default = self.summary["honest"]["macro_f1"]["pooled"], search["default"]

        def cells(words, score, difference=None):
            interval = format_interval(score["clip_ci"], self.digits)
            cell = "–"
            if difference:
                sign, mean, (low, high) = difference
                low, high = sorted((sign * low, sign * high))
                cell = f"{format_signed(sign * mean, self.digits)} {format_interval((low, high), self.digits)}"
            return [words, format_mean(score["mean"], score["sd"], self.digits), interval, cell]

        rows = [_row([*cells("nested: chosen on inner splits", honest), ""], css="key")]
        if default:
            gain = default["nested_minus_default"]["pooled"]
            row = cells("candidate 0 in every fold", default["macro_f1"]["pooled"], (1, gain["mean"], gain["clip_ci"]))
            rows.append(_row([*row, format_p(gain["p_value"])]))
        for key, words in (
            ("best_overall", "best on all held-out clips, for all folds"),
            ("best_per_fold", "best on each held-out fold"),
        ):
            if leak := search["leaky"][key]:
                inflation = leak["inflation"]["pooled"]
                if key == "best_overall":
                    words += f": candidate {leak['chosen'][0]}"
                row = cells(words, leak["macro_f1"]["pooled"], (-1, inflation["mean"], inflation["clip_ci"]))
                rows.append(_row([*row, ""], leaky=(1, 2, 3)))
        columns = ["hyper-parameters", f"{self.score}, pooled<br>mean ± sd over seeds"]
        columns += [f"{self.level} CI<br>over clips and seeds", f"nested minus it<br>{self.level} CI", "p"]
        return _table(columns, rows) + (
            '<p class="note first">Candidate 0 has the config&#x27;s own values (or the first of a grid that lacks '
            "them). Hatched: leaky, chosen on the very clips that are scored.</p>"
        )

    def _candidates(self, search: Mapping, inner: np.ndarray) -> str:
        """Every candidate with its values, scores and folds."""
        settings = self.summary["settings"]
        rows = [
            _row(
                [
                    f"candidate {number}",
                    *(f"{setting['hyper'][name]:g}" for name in search["varied"]),
                    f"{setting['members_ok']} of {setting['members']}",
                    format_number(inner[number]),
                    format_number(setting["macro_f1"]["pooled"]),
                    self._fold_names(setting["chosen_for_folds"]),
                ],
                css="key" if setting["chosen_for_folds"] else "",
                leaky=(len(search["varied"]) + 3,),
            )
            for number, setting in enumerate(settings)
        ]
        columns = ["", *map(escape, search["varied"]), "members<br>finished"]
        columns += [f"inner<br>{SELECTION_WORDS[search['selection']]}", f"held-out<br>{self.score}", "used for folds"]
        table = _table(columns, rows, leaky=(len(search["varied"]) + 3,))
        return f"<details{' open' * (len(rows) <= 8)}><summary>All {len(rows)} candidates</summary>{table}</details>"

    @staticmethod
    def _fold_names(folds: list[int]) -> str:
        """Their numbers, or how many they are."""
        return f"{len(folds)} folds" if len(folds) > _MANY_FOLDS else ", ".join(map(str, folds)) or "–"

    def predictions(self) -> str:
        """Mean probability of each class for each clip, beside the truth."""
        results = self.results
        probabilities = self._clip_probabilities()
        columns = [
            "clip",
            *["database"] * bool(self.summary["databases"]),
            "subject",
            "fold",
            *map(escape, self.labels),
        ]
        parts = []
        for title, wanted in (("held-out clips", results.scored), ("test clips", results.clip_split == TEST)):
            clips = np.flatnonzero(wanted & np.isfinite(probabilities).all(axis=1))
            if len(clips):
                order = np.lexsort([results.clip_name[clips], results.clip_id[clips], results.clip_fold[clips]])
                rows = [self._clip_row(clip, probabilities[clip]) for clip in clips[order]]
                table = _table(columns, rows, css="clips")
                parts.append(f"<details><summary>{len(clips)} {title}</summary>{table}</details>")
        return (
            "<p>Mean probability over the members that hold the clip out; for test clips, over all. A tick "
            "marks a label of the clip, an orange bar a wrong decision"
            f"{'' if self.multi_class else ' at the fold&#x27;s thresholds'}.</p>" + "".join(parts)
        )

    def _clip_probabilities(self) -> np.ndarray:
        """``(C, L)`` mean over the members that may judge a clip, NaN where none may."""
        results, used = self.results, self.used
        clips = clip_probabilities(results, results.probabilities[used], self.summary["evaluation"])  # (M', C, L)
        held_out = results.member_fold[used][:, None] == results.clip_fold  # (M', C)
        judge = (held_out | (results.clip_split == TEST)).astype(float)
        return _mean_or_nan(np.einsum("mc,mcl->cl", judge, clips.astype(float)), judge.sum(axis=0)[:, None])

    def _clip_row(self, clip: int, probabilities: np.ndarray) -> str:
        results, evaluation = self.results, self.summary["evaluation"]
        fold, truth = int(results.clip_fold[clip]), results.clip_labels[clip]
        wrong = np.zeros(len(truth), bool)
        thresholds = [entry["thresholds"] for entry in self.summary["folds"] if entry["fold"] == fold]
        if thresholds:
            made = decide(probabilities, thresholds[0], evaluation, self.labels)
            wrong = (made != (truth == 1)) & (truth != UNKNOWN_LABEL)
        cells = "".join(
            f'<td class="p{" miss" * bool(miss)}{" true" * bool(label == 1)}" style="--p:{value:.2f}">'
            f"{'✓ ' * bool(label == 1)}{value:.2f}</td>"
            for value, label, miss in zip(probabilities, truth, wrong, strict=True)
        )
        database = f"<td>{escape(str(results.clip_database[clip])) or '–'}</td>" if self.summary["databases"] else ""
        return (
            f'<tr><th scope="row">{escape(str(results.clip_name[clip]))}</th>{database}'
            f"<td>{escape(str(results.clip_subject[clip])) or '–'}</td><td>{fold if fold >= 0 else '–'}</td>"
            f"{cells}</tr>"
        )

    def members(self) -> str:
        """Who diverged, which faces were not found, how large the folds are."""
        study = self.summary["study"]
        words = [f"All {study['members']} members finished."]
        if study["diverged"]:
            names = escape(", ".join(study["diverged"]))
            words = [f"{len(study['diverged'])} of {study['members']} members diverged: {names}."]
        if study["incomplete_seeds"]:
            seeds = ", ".join(map(str, study["incomplete_seeds"]))
            words.append(f"Seeds that lack a fold and are left out of figures over all folds: {seeds}.")
        if self.no_face:
            words.append(f"No face was found, so the crop is the fallback: {escape(', '.join(self.no_face))}.")
        elif self.no_face is not None:
            words.append("A face was found in every clip.")
        table = self._fold_table() + '<p class="note first">Under the classes: how many clips of the fold have it.</p>'
        if len(self.summary["folds"]) > _MANY_FOLDS:
            table = f"<details><summary>All {len(self.summary['folds'])} folds</summary>{table}</details>"
        return f"<p>{' '.join(words)}</p>{table}"

    def _fold_table(self) -> str:
        """Who is held out in each fold, and how well the fold is predicted."""
        subjects = self.summary["study"]["single_subject_folds"]
        columns = [("subject", lambda fold: escape(fold["subject"]))] if subjects else []
        if subjects and self.summary["databases"]:
            columns.append(("database", lambda fold: escape(fold["database"])))
        columns.append(("clips", lambda fold: str(fold["clips"])))
        columns += [(escape(label), lambda fold, label=label: str(fold["positives"][label])) for label in self.labels]
        columns.append(("seeds", lambda fold: str(len(fold["seeds"]))))
        if self.multi_class:
            columns.append(("accuracy", lambda fold: format_number(fold["mean_accuracy"])))
        if not (self.multi_class and subjects):
            columns.append((f"{self.score} ± sd", lambda fold: format_mean(fold["mean"], fold["sd"])))
        rows = [_row([f"fold {fold['fold']}", *(cell(fold) for _, cell in columns)]) for fold in self.summary["folds"]]
        return _table(["held out", *(name for name, _ in columns)], rows)

    def configuration(self) -> str:
        """Settings and versions."""
        blocks = {
            "Changed on the command line": self.overrides,
            "All settings": self.config,
            "Versions": self.versions,
        }
        return "".join(
            f"<details><summary>{title}</summary>{_values(_flatten(tree))}</details>"
            for title, tree in blocks.items()
            if tree
        )


def _mean_or_nan(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _row(cells: Sequence[str], leaky: Sequence[int] = (), css: str = "") -> str:
    """A table row of HTML ``cells``, the first of them its heading; ``leaky`` are the columns so marked."""
    data = "".join(
        f"<td{_css('leaky' if index in leaky else '')}>{cell}</td>" for index, cell in enumerate(cells) if index
    )
    return f'<tr{_css(css)}><th scope="row">{cells[0]}</th>{data}</tr>'


def _table(columns: Sequence[str], rows: Iterable[str], leaky: Sequence[int] = (), css: str = "") -> str:
    """A table that scrolls sideways where the window is too narrow for it."""
    head = "".join(
        f'<th scope="col"{_css("leaky" if index in leaky else "")}>{column}</th>'
        for index, column in enumerate(columns)
    )
    return (
        f'<div class="scroll"><table{_css(css)}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _css(name: str) -> str:
    return f' class="{name}"' if name else ""


def _values(leaves: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in leaves.items())
    return f'<dl class="values">{rows}</dl>'


def _floats(values: Iterable[float | None]) -> np.ndarray:
    """Numbers of a JSON list, NaN for null."""
    return np.array([np.nan if value is None else value for value in values], float)
