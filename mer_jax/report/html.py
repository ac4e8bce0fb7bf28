"""One self-contained page per study: what it found, how sure that is, and everything needed to check it."""

import csv
import json
import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation.views import combine_views
from mer_jax.files import atomic_write_text
from mer_jax.report import plots
from mer_jax.report.plots import format_number
from mer_jax.report.style import STYLE
from mer_jax.report.tables import (
    LEAKY_EXPLANATION,
    format_interval,
    format_mean,
    format_signed,
    leaky_block,
    leaky_choices,
    score_rows,
)
from mer_jax.study.results import StudyResults

FILENAME = "report.html"


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes ``report.html`` from the files of a finished run.

    Only files of the run folder are read: ``summary.json`` and ``predictions.npz``, which must be there, and
    ``config.json``, ``overrides.json``, ``versions.json`` and ``folds.csv``, whose sections are left out where they are
    not. The same files give the same bytes.

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
    page = _Page(
        name=workdir.resolve().name,
        results=results,
        summary=summary,
        config=_read_json(workdir / "config.json") or {},
        overrides=_read_json(workdir / "overrides.json") or {},
        versions=_read_json(workdir / "versions.json") or {},
        no_face=_clips_without_face(workdir / "folds.csv"),
    )
    path = workdir / FILENAME
    atomic_write_text(path, page.render())
    return path


def _read_json(path: Path):
    """Content of a JSON file, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the study again to rewrite it") from error


def _clips_without_face(path: Path) -> list[str] | None:
    """Names in the fold table whose crop fell back, None where the table does not tell."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the study again to rewrite it") from error
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
    """The data of one report and its sections; a section is HTML, or ``''`` where the study has nothing to show."""

    def __init__(self, name, results: StudyResults, summary, config, overrides, versions, no_face):
        self.name, self.results, self.summary = name, results, summary
        self.config, self.overrides, self.versions, self.no_face = config, overrides, versions, no_face
        self.labels: list[str] = summary["labels"]
        self.level = f"{100 * summary['evaluation']['confidence']:g} %"
        self.used = self._members_used()

    def _members_used(self) -> np.ndarray:
        """``(M,)`` bool: members that finished, with the hyper-parameters that their fold's score stands for."""
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
            ("seeds", "Scores over seeds", self.seeds),
            ("classes", "Classes", self.classes),
            ("confusion", "Confusion", self.confusion),
            ("leaks", "What leaking would claim", self.leaks),
            ("thresholds", "Thresholds", self.thresholds),
            ("curves", "Learning curves", self.curves),
            ("variance", "Where the variance comes from", self.variance),
            ("width", "Seeds needed", self.width),
            ("gate", "Gate", self.gate),
            ("attention", "Attention", self.attention),
            ("settings", "Hyper-parameters tried", self.settings),
            ("predictions", "Predictions per clip", self.predictions),
            ("data", "Members and clips", self.members),
            ("config", "Configuration", self.configuration),
        ]
        built = {key: (title, body()) for key, title, body in sections}
        built = {key: (title, body) for key, (title, body) in built.items() if body}
        links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, (title, _) in built.items())
        parts, open_pair = [], False
        for key, (title, body) in built.items():
            pair = key in ("variance", "width", "gate")
            if pair != open_pair:
                parts.append('<div class="pair">' if pair else "</div>")
                open_pair = pair
            parts.append(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>')
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.name)} – study report</title><style>{STYLE}</style></head><body><main>"
            f'{self.head()}<nav aria-label="Sections">{links}</nav>{"".join(parts)}</main></body></html>\n'
        )

    def head(self) -> str:
        """Title, banner, the answer in one sentence, and the study's size."""
        study, score = self.summary["study"], self.summary["honest"]["macro_f1"]["pooled"]
        chance = self.summary["chance"]["macro_f1"]["pooled"]
        if score["seed_ci"]:
            intervals = (
                f"{self.level} CI {format_interval(score['clip_ci'])} for new clips and seeds, "
                f"{format_interval(score['seed_ci'])} for new seeds on these clips"
            )
        else:
            intervals = f"{self.level} CI {format_interval(score['clip_ci'])} for new clips; one seed tells nothing about seeds"
        answer = (
            f"On clips that its members never saw, this study reaches a macro-F1 of <b>{format_number(score['mean'])}</b> "
            f"({intervals}). Chance is {format_number(chance['mean'])} {format_interval(chance['interval'])}; "
            f"choosing {leaky_choices(self.summary)} on the held-out clips would have claimed "
            f"{format_number(leaky_block(self.summary)['macro_f1']['pooled']['mean'])}."
        )
        facts = {
            "clips scored": study["clips"],
            "subjects": study["subjects"] if study["subjects"] is not None else "unknown",
            "folds": len(study["folds"]),
            "seeds": len(study["seeds"]),
            "members": study["members"],
            "diverged": len(study["diverged"]),
            "test clips": study["test_clips"],
        }
        cells = "".join(
            f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
        )
        return (
            f'{self.banner()}<p class="eyebrow">Micro-expression study</p><h1>{escape(self.name)}</h1>'
            f'<p class="answer">{answer}</p><dl class="facts">{cells}</dl>'
        )

    def banner(self) -> str:
        """A warning where the clips are the rendered demo."""
        values = {name: text for name, text in _flatten(self.config).items() if "data" in name}
        if not any(text == "demo" or text.endswith("/demo") for text in values.values()):
            return ""
        return (
            '<p class="banner" role="note"><strong>Demo data.</strong> These clips are rendered from one public-domain '
            "photograph. Numbers on the demo show that the machinery works. They are not a benchmark and say nothing "
            "about real faces.</p>"
        )

    def scores(self) -> str:
        """The table, with the leaky column marked as such."""
        head = (
            '<thead><tr><th scope="col">measure</th><th scope="col">honest<br>mean ± sd over seeds</th>'
            f'<th scope="col">{self.level} CI<br>over seeds</th><th scope="col">{self.level} CI<br>over clips and seeds'
            '</th><th scope="col">threshold 0.5<br>untuned</th><th scope="col" class="leaky">leaky<br>not an estimate'
            "</th></tr></thead>"
        )
        body, group = [], ""
        for row in score_rows(self.summary):
            if row.group != group:
                group = row.group
                body.append(f'<tr class="group"><th scope="rowgroup" colspan="6">{escape(group)}</th></tr>')
            cells = (
                format_mean(row.mean, row.sd),
                format_interval(row.seed_interval),
                format_interval(row.clip_interval),
                format_number(row.untuned),
            )
            body.append(
                f'<tr{" class=key" if row.key else ""}><th scope="row">{escape(row.name)}</th>'
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + f'<td class="leaky">{format_number(row.leaky)}</td></tr>'
            )
        definitions = self.summary["definitions"]
        terms = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in definitions.items()
        )
        notes = "".join(f"<p class=note>{escape(note)}</p>" for note in self.summary["notes"])
        return (
            "<p>Each score is on clips held out from the members that predict them. Thresholds are "
            f"{self._threshold_words()}.</p>"
            f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'
            f'<p class="note" style="margin-top:12px"><b>Leaky:</b> {LEAKY_EXPLANATION}</p>{notes}'
            f'<details><summary>What each name means</summary><dl class="terms">{terms}</dl></details>'
        )

    def _threshold_words(self) -> str:
        """How the honest thresholds came about."""
        evaluation = self.summary["evaluation"]
        if evaluation["thresholds"] == "fixed":
            return f"fixed at {escape(json.dumps(evaluation['fixed_threshold']))}"
        return {
            "global": "one for all classes, tuned on training clips that did not train the member",
            "per_class": "one per class, tuned on training clips that did not train the member",
        }[evaluation["thresholds"]]

    def seeds(self) -> str:
        """The distribution of the score over seeds, pooled and per fold."""
        seeds = self.summary["study"]["seeds"]
        honest, leaky = (block["macro_f1"] for block in (self.summary["honest"], leaky_block(self.summary)))
        rows = [
            (name, np.array(honest[key]["values"], float), np.array(leaky[key]["values"], float), seeds)
            for name, key in (("pooled", "pooled"), ("mean of folds", "fold_mean"))
        ]
        rows += [
            (
                f"fold {fold['fold']} ({fold['clips']} clips)",
                np.array(fold["macro_f1"], float),
                np.zeros(0),
                fold["seeds"],
            )
            for fold in self.summary["folds"]
        ]
        figure = plots.score_strips(
            rows, score_name="macro-F1", chance=self.summary["chance"]["macro_f1"]["pooled"]["mean"]
        )
        one = (
            "<p>There is a single seed, so nothing here shows how much a seed matters.</p>"
            if len(seeds) == 1
            else ""
        )
        return one + _figure(
            figure,
            "One dot per seed. The two upper rows score all folds of a seed together; below them, each fold on its own "
            "clips. The dashed line is the pooled score with permuted labels.",
        )

    def classes(self) -> str:
        """Bars per class."""

        def means(block):
            return _floats(block["per_class_f1"][label]["pooled"]["mean"] for label in self.labels)

        study = self.summary["study"]
        positives = np.array([study["positives"][label] for label in self.labels], float)
        figure = plots.class_bars(
            [f"{label} ({count:.0f})" for label, count in zip(self.labels, positives, strict=True)],
            means(self.summary["honest"]),
            np.stack(
                [
                    _floats(
                        self.summary["honest"]["per_class_f1"][label]["pooled"]["clip_ci"] or (None, None)
                    )
                    for label in self.labels
                ]
            ),
            score_name="F1 of “present”",
            untuned=means(self.summary["untuned"]),
            leaky=means(leaky_block(self.summary)),
            # F1 of the decider that always says "present": precision is the prevalence, recall is one.
            reference=2 * positives / (study["clips"] + positives),
        )
        return _figure(
            figure,
            f"F1 per class over all held-out clips, mean over seeds, with the {self.level} CI over clips and seeds. In "
            "brackets: clips that have the label. “Always present” is what claiming the label for every clip scores.",
        )

    def confusion(self) -> str:
        """Counts per label."""
        cells = self.summary["honest"]["confusion"]
        counts = np.array(
            [[cells[label][key] for label in self.labels] for key in ("tp", "fp", "fn", "tn")], float
        )
        return _figure(
            plots.confusions(self.labels, counts),
            "Held-out clips per cell, mean over seeds; the columns are what was predicted. Shade and percentage are the "
            "share of the row, blue where the decision is right.",
        )

    def leaks(self) -> str:
        """The leaky protocols, one row each."""
        leaky = self.summary["leaky"]
        names = {
            "best_epoch": "best epoch on the held-out fold",
            "best_epoch_untuned": "the same at threshold 0.5",
            "heldout_thresholds": "thresholds tuned on the held-out fold",
            "both": "epoch and thresholds",
        }
        rows = "".join(
            f'<tr><th scope="row">{words}</th>'
            + "".join(
                f'<td class="leaky">{format_number(leaky[key]["macro_f1"][average]["mean"])}</td>'
                f"<td>{format_signed(leaky[key]['inflation'][average]['mean'])} "
                f"{format_interval(leaky[key]['inflation'][average]['clip_ci'])}</td>"
                for average in ("pooled", "fold_mean")
            )
            + "</tr>"
            for key, words in names.items()
            if leaky[key]
        )
        missing = (
            ""
            if leaky["both"]
            else "<p>No predictions per epoch were kept, so the best epoch is not known.</p>"
        )
        return (
            "<p>The same members, judged as papers often do. The difference to the honest score is not skill.</p>"
            '<div class="scroll"><table><thead><tr><th scope="col">chosen on the clips that are scored</th>'
            '<th scope="col" class="leaky">macro-F1<br>pooled</th>'
            f'<th scope="col">minus honest<br>{self.level} CI</th>'
            '<th scope="col" class="leaky">macro-F1<br>mean of folds</th>'
            f'<th scope="col">minus honest<br>{self.level} CI</th></tr></thead><tbody>{rows}</tbody></table></div>{missing}'
        )

    def thresholds(self) -> str:
        """Score over one global threshold, and the thresholds that were used."""
        curve = self.summary["threshold_curve"]
        curves = []
        if curve["inner"] is not None:
            curves.append(("inner splits: where the study chooses", "blue", _floats(curve["inner"]), None))
        curves.append(
            ("held-out clips: leaky to choose here", "orange", _floats(curve["heldout_leaky"]), None)
        )
        figure = plots.curves_with_marks(
            _floats(curve["threshold"]),
            curves,
            x_name="one threshold for all classes (probability)",
            y_name="macro-F1",
            marks=[("0.5", "ink", 0.5)],
            label="Macro-F1 over the threshold",
        )
        head = "".join(f'<th scope="col">{escape(label)}</th>' for label in self.labels)
        rows = "".join(
            f'<tr><th scope="row">fold {fold["fold"]}</th>'
            + "".join(f"<td>{format_number(value)}</td>" for value in fold["thresholds"])
            + f"<td>{fold['inner_clips']}</td></tr>"
            for fold in self.summary["folds"]
        )
        words = (
            ""
            if curve["inner"] is not None
            else "<p>The study has no inner split, so no threshold was tuned.</p>"
        )
        return (
            words
            + _figure(
                figure,
                "All folds and seeds together. A study may look at the blue curve, never at the other.",
            )
            + f"<details><summary>Thresholds in use, {self._threshold_words()}</summary>"
            f'<div class="scroll"><table><thead><tr><th scope="col">held out</th>{head}<th scope="col">inner clips</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div></details>"
        )

    def curves(self) -> str:
        """Losses over epochs."""
        results, used = self.results, self.used
        losses = {
            "train": results.curve_train_loss[used],
            "inner split": results.curve_inner_loss[used],
            "held out": results.curve_heldout_loss[used],
        }
        losses = {name: values for name, values in losses.items() if np.isfinite(values).any()}
        if not losses or not results.curve_epoch.size:
            return ""
        figure = plots.learning_curves(results.curve_epoch, losses, results.member_stop_epoch[used])
        members = int(used.sum())
        absent = (
            "" if "inner split" in losses else " There is no inner split, so training ran to its last epoch."
        )
        return _figure(
            figure,
            f"Median and 5–95 % band over {members} member{'s' * (members != 1)}. Below: the epoch that the inner split "
            "chose, median and 5–95 %. The held-out curve is drawn after the fact and chooses nothing."
            + absent,
        )

    def variance(self) -> str:
        """Shares of fold, seed and rest."""
        split = self.summary["variance"]
        if split is None:
            return "<p>A split into fold, seed and rest needs at least two folds and two seeds.</p>"
        colours = {"fold": "blue", "seed": "orange", "rest": "grey"}
        parts = [
            (
                name,
                colour,
                split[name]["share"] or 0.0,
                f"sd {format_number(split[name]['sd'])}"
                + (" (estimate below 0)" if split[name]["truncated"] else ""),
            )
            for name, colour in colours.items()
        ]
        within = split["seed_sd_within_fold"]
        return _figure(
            plots.share_bar(parts, "Variance of macro-F1 per fold and seed"),
            "Two-way random effects on the macro-F1 of each fold and seed. Fold: which clips are held out. Seed: the same "
            "seed on all folds. Rest: a seed's luck within one fold, and noise."
            + ("" if within is None else f" Within a fold, seeds scatter by sd {format_number(within)}."),
        )

    def width(self) -> str:
        """Seeds that an interval of a given width needs."""
        score, seeds = self.summary["honest"]["macro_f1"]["pooled"], len(self.summary["study"]["seeds"])
        targets = [
            (t["seeds"], t["half_width"]) for t in self.summary["seeds_needed"] if t["seeds"] is not None
        ]
        if score["sd"] is None or not targets:
            return "<p>Needs at least two seeds, to know by how much seeds scatter.</p>"
        figure = plots.width_curve(
            score["sd"],
            seeds,
            targets,
            confidence=self.summary["evaluation"]["confidence"],
            score_name="macro-F1",
        )
        return _figure(
            figure,
            f"Half-width of the {self.level} t interval of the pooled mean, on these clips. More seeds do not narrow the "
            "interval over clips.",
        )

    def gate(self) -> str:
        """The gate's weights over members."""
        results = self.results
        names = [str(name) for name in results.gate_name]
        weights = np.asarray(results.gate, float)[self.used]
        if not names or not np.isfinite(weights).any():
            return ""
        ids, folds = results.member_id[self.used].tolist(), results.member_fold[self.used]
        if len(names) == 2:
            groups = [(f"fold {fold}", folds == fold, 0) for fold in np.unique(folds)]
            axis, ends = f"weight of {names[0]}", (f"all {names[1]}", f"all {names[0]}")
        else:
            groups = [(name, np.ones(len(folds), bool), index) for index, name in enumerate(names)]
            axis, ends = "weight", ("none", "all")
        rows = [
            (name, weights[mine, column], [ids[index] for index in np.flatnonzero(mine)])
            for name, mine, column in groups
        ]
        reference = 1 / len(names)
        overall = ", ".join(
            f"{escape(name)} {format_number(float(np.nanmean(column)), 2)}"
            for name, column in zip(names, weights.T, strict=True)
        )
        return _figure(
            plots.gate_strips(rows, axis=axis, ends=ends, even=reference),
            f"One dot per member. Mean weights: {overall}. The dashed line weighs all modalities alike.",
        )

    def attention(self) -> str:
        """Attention over frames per class and modality."""
        per_class = {
            name: self._attention_per_class(values) for name, values in self.results.attention.items()
        }
        per_class = {name: values for name, values in per_class.items() if np.isfinite(values).any()}
        if not per_class:
            return ""
        return _figure(
            plots.attention_panels(self.labels, per_class),
            "Mean attention, over queries, on each frame of the held-out clips that have the label. Median and 5–95 % band "
            "over members. The dashed line is attention that does not care.",
        )

    def _attention_per_class(self, attention: np.ndarray) -> np.ndarray:
        """Mean over the held-out samples that have the label: ``(M, V, T)`` -> ``(M', C, T)``, NaN where none has."""
        results = self.results
        rows = results.curve_sample[self.used]  # (M', V)
        attention = np.asarray(attention, float)[self.used]  # (M', V, T)
        present = results.clip_labels[results.sample_clip[rows.clip(0)]] == 1  # (M', V, C)
        known = (rows >= 0) & np.isfinite(attention).all(axis=-1)  # (M', V)
        weight = (present & known[..., None]).astype(float)  # (M', V, C)
        total = np.einsum("mvc,mvt->mct", weight, np.where(known[..., None], attention, 0.0))
        count = weight.sum(axis=1)[..., None]  # (M', C, 1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def settings(self) -> str:
        """Each hyper-parameter setting, where there are several."""
        settings = self.summary["settings"]
        if len(settings) < 2:
            return ""
        names = list(settings[0]["hyper"])
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{setting['hyper'][name]:g}</td>" for name in names)
            + f"<td>{setting['members']}</td>"
            f"<td>{', '.join(format_number(loss) for loss in setting['inner_loss'] or [])}</td>"
            f"<td>{format_number(setting['macro_f1']['pooled'])}</td>"
            f"<td>{', '.join(str(fold) for fold in setting['chosen_for_folds']) or '–'}</td></tr>"
            for setting in settings
        )
        return (
            "<p>Each fold uses the setting of least inner loss. The macro-F1 beside it is for readers; it chooses nothing."
            f'</p><div class="scroll"><table><thead><tr>{head}<th scope="col">members</th>'
            '<th scope="col">inner loss per fold</th><th scope="col">macro-F1, pooled</th>'
            f'<th scope="col">chosen for folds</th></tr></thead><tbody>{rows}</tbody></table></div>'
        )

    def predictions(self) -> str:
        """Mean probability of each class for each clip, beside the truth."""
        probabilities = self._clip_probabilities()
        results = self.results
        thresholds = {fold["fold"]: _floats(fold["thresholds"]) for fold in self.summary["folds"]}
        groups = (
            ("held-out clips", np.flatnonzero(results.scored)),
            ("test clips", np.flatnonzero(results.clip_split == "test")),
        )
        parts = []
        for title, clips in groups:
            clips = [clip for clip in clips if np.isfinite(probabilities[clip]).all()]
            if not clips:
                continue
            clips.sort(
                key=lambda clip: (results.clip_fold[clip], results.clip_id[clip], results.clip_name[clip])
            )
            head = "".join(f'<th scope="col">{escape(label)}</th>' for label in self.labels)
            rows = "".join(self._clip_row(clip, probabilities[clip], thresholds) for clip in clips)
            parts.append(
                f"<details><summary>{len(clips)} {title}</summary>"
                '<div class="scroll"><table class="clips"><thead><tr><th scope="col">clip</th><th scope="col">subject</th>'
                f'<th scope="col">fold</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
            )
        return (
            "<p>Mean probability over members that held the clip out (for test clips: over all members). <b>✓</b> marks a "
            "label that the clip has; an orange bar is a decision, at the fold's threshold, that is wrong.</p>"
            + "".join(parts)
        )

    def _clip_probabilities(self) -> np.ndarray:
        """``(C, 5)`` mean over the members that may judge a clip, NaN where none may."""
        results, used = self.results, self.used
        views = self.summary["evaluation"]["views"]
        clips = combine_views(results.probabilities[used], results.sample_clip, len(results.clip_name), views)
        fold = results.clip_fold[None, :]  # (1, C)
        judge = (results.member_fold[used][:, None] == fold) | (results.clip_split == "test")[
            None, :
        ]  # (M', C)
        total = np.einsum("mc,mcl->cl", judge.astype(float), np.asarray(clips, float))
        count = judge.sum(axis=0)[:, None]  # (C, 1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _clip_row(self, clip: int, probabilities: np.ndarray, thresholds) -> str:
        results = self.results
        fold, truth = int(results.clip_fold[clip]), results.clip_labels[clip]
        cells = []
        for index, probability in enumerate(probabilities):
            known = truth[index] >= 0 and fold in thresholds
            wrong = known and (probability >= thresholds[fold][index]) != (truth[index] == 1)
            css = "p" + " miss" * bool(wrong) + " true" * bool(truth[index] == 1)
            mark = "✓ " if truth[index] == 1 else ""
            cells.append(f'<td class="{css}" style="--p:{probability:.2f}">{mark}{probability:.2f}</td>')
        return (
            f'<tr><th scope="row">{escape(str(results.clip_name[clip]))}</th>'
            f"<td>{escape(str(results.clip_subject[clip])) or '–'}</td><td>{fold if fold >= 0 else '–'}</td>"
            f"{''.join(cells)}</tr>"
        )

    def members(self) -> str:
        """Who diverged, which faces were not found, how large the folds are."""
        study = self.summary["study"]
        diverged = study["diverged"]
        words = (
            f"{len(diverged)} of {study['members']} members diverged and are in no score: "
            + escape(", ".join(diverged))
            + "."
            if diverged
            else f"All {study['members']} members finished."
        )
        if study["incomplete_seeds"]:
            seeds = ", ".join(str(seed) for seed in study["incomplete_seeds"])
            words += f" Seeds without all their folds, left out of pooled figures: {seeds}."
        if self.no_face:
            words += (
                f" No face was found in {len(self.no_face)} clips, whose crop is the fallback: "
                + escape(", ".join(self.no_face))
                + "."
            )
        elif self.no_face is not None:
            words += " A face was found in every clip."
        head = "".join(f'<th scope="col">{escape(label)}</th>' for label in self.labels)
        rows = "".join(
            f'<tr><th scope="row">fold {fold["fold"]}</th><td>{fold["clips"]}</td>'
            + "".join(f"<td>{fold['positives'][label]}</td>" for label in self.labels)
            + f"<td>{len(fold['seeds'])}</td><td>{format_mean(fold['mean'], fold['sd'])}</td></tr>"
            for fold in self.summary["folds"]
        )
        return (
            f'<p>{words}</p><div class="scroll"><table><thead><tr><th scope="col">held out</th><th scope="col">clips</th>'
            f'{head}<th scope="col">seeds</th><th scope="col">macro-F1 ± sd</th></tr></thead><tbody>{rows}</tbody></table>'
            "</div><p class=note style=margin-top:8px>Columns of classes: clips of the fold that have the label.</p>"
        )

    def configuration(self) -> str:
        """Settings and versions."""
        changed = _flatten(self.overrides)
        changed.pop("", None)
        blocks = [
            ("Changed on the command line", changed),
            ("All settings", _flatten(self.config) if self.config else {}),
            ("Versions", _flatten(self.versions) if self.versions else {}),
        ]
        return "".join(
            f"<details><summary>{title} ({len(leaves)})</summary>{_values(leaves)}</details>"
            for title, leaves in blocks
            if leaves
        )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _values(leaves: Mapping[str, str]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in leaves.items()
    )
    return f'<dl class="values">{rows}</dl>'


def _floats(values) -> np.ndarray:
    """Numbers of a JSON list, NaN for null."""
    return np.array([np.nan if value is None else value for value in values], float)
