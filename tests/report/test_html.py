import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.report.html import write_report
from mer_jax.report.plots import format_number

VOID = {"meta", "br", "link", "img", "input", "hr"}
SECTIONS = {
    "scores",
    "seeds",
    "classes",
    "confusion",
    "leaks",
    "thresholds",
    "curves",
    "variance",
    "width",
    "gate",
    "attention",
    "predictions",
    "members",
    "config",
}


class Page(html.parser.HTMLParser):
    """Collects what a page consists of and fails where its tags do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.sections = [], [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections[dict(attrs)["id"]] = []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
            if self.sections:
                self.sections[list(self.sections)[-1]].append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    def words_of(self, section):
        return " ".join("".join(self.sections[section]).split())


def read(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"\b(nan|NaN|inf|None|null)\b", page.words)
    for tag, attributes in page.attributes:
        assert tag not in ("script", "link", "iframe", "img", "object")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data", "xlink:href") and not name.startswith("on")
            if name == "href":
                assert value.startswith("#") and value[1:] in page.sections
            if name not in ("aria-label", "class"):
                assert "nan" not in (value or "").lower() and "inf" not in (value or "").lower()
    assert "url(" not in text and "@import" not in text
    assert all(a.get("aria-label") for tag, a in page.attributes if tag == "svg")
    return page, text


@pytest.fixture(scope="module")
def page(run_folder):
    return read(run_folder)[0]


@pytest.fixture(scope="module")
def summary(run_folder):
    return json.loads((run_folder / "summary.json").read_text())


def test_every_section_is_there(page):
    assert set(page.sections) == SECTIONS
    assert page.tags.count("h1") == 1 and page.tags.count("h2") == len(SECTIONS)
    assert page.tags.count("svg") == 10


def test_the_answer_is_the_summary_s(page, summary):
    score = summary["honest"]["macro_f1"]["pooled"]
    start = page.words.index("On clips that")
    answer = page.words[start : start + 400]
    figures = [
        score["mean"],
        *score["clip_ci"],
        *score["seed_ci"],
        summary["chance"]["macro_f1"]["pooled"]["mean"],
        summary["leaky"]["both"]["macro_f1"]["pooled"]["mean"],
    ]
    positions = [answer.index(format_number(figure)) for figure in figures]
    assert positions[0] == min(positions)


def test_every_class_score_and_inflation_is_the_summary_s(page, summary):
    for label in summary["labels"]:
        figure = format_number(summary["honest"]["per_class_f1"][label]["pooled"]["mean"])
        assert figure in page.words_of("scores") and figure in page.words_of("classes")
    for leak in ("best_epoch", "best_epoch_untuned", "heldout_thresholds", "both"):
        found = summary["leaky"][leak]["inflation"]["pooled"]["mean"]
        assert format_number(found) in page.words_of("leaks")
    for note in summary["notes"]:
        assert note in page.words


def test_clip_probabilities_are_means_over_the_members_that_held_the_clip_out(run_folder, results):
    text = write_report(run_folder).read_text()
    clip = 5
    members = results.ok & (results.member_fold == results.clip_fold[clip])
    samples = results.sample_clip == clip
    expected = results.probabilities[members][:, samples].astype(float).mean(axis=(0, 1))
    row = re.search(rf"<tr><th scope=\"row\">{results.clip_name[clip]}</th>.*?</tr>", text).group()
    assert [float(value) for value in re.findall(r"--p:([\d.]+)", row)] == pytest.approx(expected, abs=0.0051)
    assert row.count("✓") == results.clip_labels[clip].sum()


def test_wrong_decisions_of_the_ensemble_are_marked(run_folder, results, summary):
    text = write_report(run_folder).read_text()
    truth, wrong = results.clip_labels, 0
    for clip in np.flatnonzero(results.scored):
        members = results.ok & (results.member_fold == results.clip_fold[clip])
        mean = results.probabilities[members][:, results.sample_clip == clip].astype(float).mean(axis=(0, 1))
        cut = summary["folds"][results.clip_fold[clip]]["thresholds"]
        wrong += int(((mean >= cut) != (truth[clip] == 1)).sum())
    assert len(re.findall(r'class="p miss', text)) == wrong > 0


def test_gate_and_attention_are_recomputed_from_the_predictions(page, results):
    mean = results.gate[results.ok].astype(float).mean(axis=0)
    assert f"appearance {mean[0]:.2f}, geometry {mean[1]:.2f}" in page.words_of("gate")
    svg = next(a["aria-label"] for t, a in page.attributes if t == "svg" and "Attention" in a["aria-label"])
    rows = results.curve_sample[results.ok]
    chosen = (results.clip_labels[results.sample_clip[rows.clip(0)], 0] == 1) & (rows >= 0)
    attention = results.attention["geometry"][results.ok].astype(float)
    per_member = np.stack([a[c].mean(axis=0) for a, c in zip(attention, chosen, strict=True)])
    peak = np.median(per_member, axis=0).argmax() + 1
    assert f"Negative, geometry: peak at {peak}" in svg


def test_diverged_members_missing_faces_and_folds_are_named(page):
    words = page.words_of("members")
    assert "1 of 12 members diverged: fold1-seed2." in words
    assert "No face was found, so the crop is the fallback: clip_003." in words
    assert "0.10.2" in page.words_of("config") and "study.num_seeds" in page.words_of("config")


def test_same_files_give_the_same_bytes(run_folder):
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()


@pytest.mark.parametrize("dataset", ["four_dme/demo", "four_dme/challenge"])
def test_demo_numbers_carry_a_warning(dataset, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "config.json").write_text(json.dumps({"data": {"dataset": dataset}}))
    page, _ = read(folder)
    assert ("not a benchmark" in page.words) == dataset.endswith("demo")


def test_strings_from_data_are_escaped(make_results, finish_run, tmp_path):
    evil = "</style></table><script>alert(1)</script>\"'&"
    results = make_results(clips=24)
    name, subject = results.clip_name.astype(object), results.clip_subject.astype(object)
    name[0], subject[0] = f"clip {evil}", f"subject {evil}"
    member = results.member_id.astype(object)
    member[0] = f"member {evil}"
    status = results.member_status.copy()
    status[0] = "diverged"
    probabilities = results.probabilities.copy()
    probabilities[0] = np.nan
    results = dataclasses.replace(
        results,
        clip_name=name.astype(str),
        clip_subject=subject.astype(str),
        member_id=member.astype(str),
        member_status=status.astype("U8"),
        probabilities=probabilities,
        gate_name=np.array([f"gate {evil}", "other"]),
        attention={"<b>modality": results.attention["appearance"]},
    )
    folder = tmp_path / "run <b>'&"
    finish_run(folder, results, config={f"key {evil}": f"value {evil}"})
    page, text = read(folder)
    assert "<script" not in text and "<b>modality" not in text and "run <b>" not in text
    for what in ("clip", "subject", "member", "gate", "key", "value"):
        assert f"{what} {evil}" in page.words


@pytest.mark.parametrize("missing", ["gate", "attention", "inner"])
def test_parts_that_a_study_lacks(missing, results, without, finish_run, tmp_path):
    evaluation = {"thresholds": "fixed" if missing == "inner" else "global", "bootstrap": 100}
    finish_run(tmp_path / "run", without(results, missing), evaluation=evaluation)
    page, _ = read(tmp_path / "run")
    if missing == "inner":
        assert "There is no inner split to tune a threshold on." in page.words
        assert "There is no inner split to stop on." in page.words
    else:
        assert set(page.sections) == SECTIONS - {missing}


def test_no_curves_were_kept(results, finish_run, tmp_path):
    empty = {"curve_epoch": results.curve_epoch[:0], "curve_probabilities": results.curve_probabilities[:, :0]}
    empty |= {f"curve_{name}_loss": results.curve_train_loss[:, :0] for name in ("train", "inner", "heldout")}
    finish_run(tmp_path / "run", dataclasses.replace(results, **empty))
    page, _ = read(tmp_path / "run")
    assert "No losses were kept." in page.words
    assert "choosing thresholds on those very clips" in page.words
    assert "The best epoch is not known" in page.words_of("leaks")


def test_early_stopping_leaves_the_tail_to_nobody(results, finish_run, tmp_path):
    losses = {}
    for name in ("train", "inner", "heldout"):
        values = getattr(results, f"curve_{name}_loss").copy()
        values[2:, 8:] = np.nan  # all but two members stop after epoch 8
        losses[f"curve_{name}_loss"] = values
    finish_run(tmp_path / "run", dataclasses.replace(results, **losses))
    page, _ = read(tmp_path / "run")
    label = next(a["aria-label"] for t, a in page.attributes if "Learning" in a.get("aria-label", ""))
    last = np.median(losses["curve_train_loss"][results.ok][:, 7])
    assert f"train {last:.3f}" in label


@pytest.mark.parametrize("num_folds", [1, 2])
def test_one_seed(num_folds, make_results, without, finish_run, tmp_path):
    results = make_results(num_folds=num_folds, num_seeds=1, clips=20, test_clips=0, epochs=1, frames=1)
    results = without(results, "inner")
    finish_run(tmp_path / "run", results, evaluation={"thresholds": "fixed", "bootstrap": 100})
    page, _ = read(tmp_path / "run")
    assert "There is one seed" in page.words_of("seeds")
    assert "with one seed" in page.words
    assert "at least two" in page.words_of("variance") and "at least two" in page.words_of("width")


def test_the_page_of_three_hundred_members_is_small(make_results, finish_run, tmp_path):
    results = make_results(num_seeds=100, clips=100, test_clips=28, epochs=50)
    finish_run(tmp_path / "run", results)
    page, text = read(tmp_path / "run")
    assert len(text.encode()) < 3e6
    assert set(page.sections) == SECTIONS


def test_hyper_parameter_settings_are_listed_and_only_the_chosen_drawn(make_results, finish_run, tmp_path):
    results = make_results(num_seeds=4)
    rate = np.where(results.member_seed < 2, 0.001, 0.01).astype(np.float32)
    results = dataclasses.replace(
        results,
        member_seed=results.member_seed % 2,
        hyper={"lr": rate},
        gate=np.stack([rate * 50, 1 - rate * 50], axis=1),
    )
    summary = finish_run(tmp_path / "run", results)
    page, _ = read(tmp_path / "run")
    words = page.words_of("settings")
    assert "2 candidates." in words and "candidate 00.0016 of 6" in words and "candidate 10.016 of 6" in words
    chosen = {f: s["hyper"]["lr"] for s in summary["settings"] for f in s["chosen_for_folds"]}
    mean = np.mean([chosen[fold] * 50 for fold in (0, 1, 2)])
    assert f"appearance {mean:.2f}" in page.words_of("gate")


def test_many_folds(make_results, finish_run, tmp_path):
    results = make_results(num_folds=12, num_seeds=2)
    finish_run(tmp_path / "subjects", results)  # each fold is one subject of four clips
    page, _ = read(tmp_path / "subjects")
    assert "fold 11" not in page.words_of("seeds") and "fold 11s114" in page.words_of("members")
    assert "Each fold is one subject" in page.words_of("variance")
    finish_run(tmp_path / "clips", dataclasses.replace(results, clip_subject=np.full(54, "")))
    page, _ = read(tmp_path / "clips")
    assert "fold 11 (4 clips)" in page.words_of("seeds") and "fold 114" in page.words_of("members")


def test_optional_files_may_be_absent(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    for name in ("config.json", "overrides.json", "versions.json", "folds.csv"):
        (folder / name).unlink()
    page, _ = read(folder)
    assert set(page.sections) == SECTIONS - {"config"}
    assert "No face was found" not in page.words and "A face was found" not in page.words


def test_unfinished_runs_and_damaged_files_end_in_one_line(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        write_report(folder)
    (folder / "summary.json").write_text('{"schema": 0}')
    with pytest.raises(UserError, match=r"summary\.json: written by another version"):
        write_report(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json: not found"):
        write_report(folder)
    (folder / "predictions.npz").unlink()
    with pytest.raises(UserError, match=r"predictions\.npz"):
        write_report(folder)


def test_a_search_tells_what_was_chosen_and_what_that_gained(make_results, finish_run, tmp_path):
    results = make_results(num_seeds=8, epochs=2)
    rates = np.array([1e-3, 1e-4, 1e-2, 3e-3], np.float32)[results.member_seed // 2]
    results = dataclasses.replace(
        results, member_seed=results.member_seed % 2, hyper={"learning_rate": rates, "dropout": np.full(24, 0.5, "f4")}
    )
    config = {"data": {"dataset": "x"}, "search": {"learning_rate": ["log_uniform", 1e-4, 1e-2], "dropout": []}}
    summary = finish_run(tmp_path / "run", results, config)
    page, _ = read(tmp_path / "run")
    words, search = page.words_of("settings"), summary["search"]
    assert search["varied"] == ["learning_rate"]
    assert "4 candidates. Each held-out fold uses the candidate of the best inner average precision" in words
    assert "learning_rate (log scale)" in words and "dropout" not in words
    gain = search["default"]["nested_minus_default"]["pooled"]
    for score in (summary["honest"], search["default"], search["leaky"]["best_overall"]):
        assert f"{score['macro_f1']['pooled']['mean']:.3f}" in words
    assert f"{abs(gain['mean']):.3f}" in words and f"{gain['p_value']:.4f}" in words
    leaky = search["leaky"]["best_overall"]["chosen"][0]
    assert f"best on all held-out clips, for all folds: candidate {leaky}" in words
    assert all(f"candidate {number}" in words for number in range(4))
    assert "candidate 0 in every fold" in page.words_of("scores")
    assert any("over candidate 0 in every fold" in note for note in summary["notes"])
