"""Pages and tables of studies of one class a clip, of phases and streams, and of a fixed threshold."""

import copy
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mer_jax.report.plots import format_number
from mer_jax.report.tables import format_interval, score_rows, terminal_table
from mer_jax.study.summary import summarise


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_HERE = Path(__file__).parent
fake_study = _load("fake_study", _HERE.parent / "study" / "fake_study.py")
test_html = _load("pages", _HERE / "test_html.py")
PHASES = ("onset_apex", "apex_offset")


@pytest.fixture(scope="module")
def composite():
    return fake_study.make_composite(
        np.random.default_rng(8), num_seeds=3, num_epochs=6, signal=0.7, phases=PHASES, streams=("u", "v", "m")
    )


@pytest.fixture(scope="module")
def folder(composite, finish_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ststnet"
    finish_run(folder, composite, evaluation={"bootstrap": 100})
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return test_html.read(folder)[0]


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def label_of(page, word):
    return next(a["aria-label"] for tag, a in page.attributes if tag == "svg" and word in a["aria-label"])


def test_sections_are_those_that_one_class_a_clip_has(page):
    expected = test_html.SECTIONS - {"thresholds", "gate", "attention"} | {"databases", "streams"}
    assert set(page.sections) == expected
    assert "macro-F1" not in page.words


def test_the_answer_gives_uf1_and_uar_with_four_digits(page, summary):
    honest = summary["honest"]
    start = page.words.index("On clips that")
    answer = page.words[start : start + 400]
    uf1, uar = (honest[name]["pooled"] for name in ("macro_f1", "uar"))
    assert f"a UF1 of {uf1['mean']:.4f} (95 % CI {format_interval(uf1['clip_ci'], 4)} over clips and seeds" in answer
    assert f"a UAR of {uar['mean']:.4f} {format_interval(uar['clip_ci'], 4)}" in answer
    leaky = summary["leaky"]["best_epoch"]["macro_f1"]["pooled"]["mean"]
    assert f"choosing each fold's epoch on those very clips would have claimed {leaky:.4f}." in answer


def test_databases_have_their_table(page, summary):
    words = page.words_of("databases")
    for entry in summary["databases"]:
        assert f"{entry['database']}{entry['clips']}{entry['subjects']}" in words.replace(" ", "")
        for figure in ("macro_f1", "uar"):
            assert f"{entry['honest'][figure]['mean']:.4f} ± {entry['honest'][figure]['sd']:.4f}" in words
            assert format_interval(entry["honest"][figure]["clip_ci"], 4) in words
            assert f"{entry['ensemble'][figure]['value']:.4f}" in words
            assert f"{entry['leaky'][figure]['mean']:.4f}" in words


def test_the_confusion_matrix_is_the_summary_s(page, summary):
    label = label_of(page, "Confusion matrix")
    for true, row in summary["honest"]["confusion_matrix"].items():
        for predicted, count in row.items():
            text = format_number(count, 0 if float(count).is_integer() else 1)
            assert re.search(rf"clips {true}: [^;]*\b{text} taken for {predicted}", label)


def test_sixty_eight_folds_are_one_table_to_open(folder, composite, summary):
    text = (folder / "report.html").read_text()
    details = re.search(r"<details><summary>All 68 folds</summary>(.*?)</details>", text).group(1)
    assert details.count("<tr>") == 69 and text.count("fold 67<") == 1
    fold = summary["folds"][7]
    row = re.search(r"<tr><th scope=\"row\">fold 7</th>(.*?)</tr>", details).group(1)
    cells = re.findall(r"<td>(.*?)</td>", row)
    subject = composite.clip_subject[composite.clip_fold == 7][0]
    counts = composite.clip_labels[composite.clip_fold == 7].sum(axis=0)
    assert cells == [
        *(subject, "casme2", str(counts.sum())),
        *map(str, counts),
        *("3", f"{np.mean(fold['accuracy']):.3f}"),
    ]


def test_streams_are_recomputed_per_class_and_phase(page, composite):
    label = label_of(page, "Attention over streams")
    results = composite
    for block in (1, 2):
        for phase, words in (("onset_apex", "onset → apex"), ("apex_offset", "apex → offset")):
            for c, name in enumerate(fake_study.EMOTIONS):
                means = []
                for member, rows in enumerate(results.curve_sample):
                    known = np.flatnonzero(rows >= 0)
                    samples = rows[known]
                    chosen = (results.sample_phase[samples] == phase) & (
                        results.clip_labels[results.sample_clip[samples], c] == 1
                    )
                    if chosen.any():
                        values = results.attention[f"streams{block}"][member, known[chosen]]
                        means.append(values.astype(float).mean(axis=0))
                u, v, m = (f"{100 * share:.0f} %" for share in np.mean(means, axis=0))
                assert f"after block {block}, {name}, {words}: u {u}, v {v}, m {m}" in label


def test_clips_are_listed_with_database_and_wrong_classes_marked(folder, composite):
    text = (folder / "report.html").read_text()
    results, wrong = composite, 0
    for clip in range(442):
        members = results.member_fold == results.clip_fold[clip]
        mean = results.probabilities[members][:, results.sample_clip == clip].astype(float).mean(axis=(0, 1))
        wrong += 2 * (mean.argmax() != results.clip_labels[clip].argmax())  # what was said, and what was missed
    assert len(re.findall(r'class="p miss', text)) == wrong > 0
    row = re.search(rf"<tr><th scope=\"row\">{results.clip_name[400]}</th>.*?</tr>", text).group()
    assert f"<td>{results.clip_database[400]}</td><td>{results.clip_subject[400]}</td>" in row


def test_the_leaky_table_says_what_it_chose(page, summary):
    words = page.words_of("leaks")
    leak = summary["leaky"]["best_epoch"]
    assert "epoch of the highest accuracy on the held-out fold" in words
    for figure, inflation in (("macro_f1", leak["inflation"]), ("uar", leak["inflation"]["uar"])):
        assert f"{leak[figure]['pooled']['mean']:.4f}" in words
        assert f"+{inflation['pooled']['mean']:.4f} {format_interval(inflation['pooled']['clip_ci'], 4)}" in words


def test_the_terminal_s_table_fits_and_names_uf1(summary):
    text = terminal_table(summary)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "macro-F1" not in text and "at 0.5" not in text
    assert lines[2].startswith("> UF1, pooled") and lines[3].startswith("  UAR, pooled")
    for row in score_rows(summary):
        line = next(line for line in lines if line[2:].startswith(row.name))
        for text in (format_number(row.mean, 4), format_number(row.leaky, 4), format_interval(row.clip_interval, 4)):
            assert text in line
    names = [row.name for row in score_rows(summary)]
    assert len(names) == len(set(names)) and "UAR samm (133)" in names


def test_imported_weights_have_a_page(finish_run, tmp_path):
    results = fake_study.make_composite(np.random.default_rng(1), num_seeds=1, num_epochs=0, inner_share=0)
    summary = finish_run(tmp_path / "run", results, evaluation={"bootstrap": 100})
    page, _ = test_html.read(tmp_path / "run")
    assert "would have claimed" not in page.words and "LEAKY" not in terminal_table(summary)
    assert "The best epoch is not known: no curves were kept." in page.words_of("leaks")
    assert "No losses were kept." in page.words and "There is one seed" in page.words
    assert {"confusion", "databases"} < set(page.sections)


def test_the_sweep_has_the_fixed_threshold_and_the_paper_s_range(finish_run, tmp_path):
    results = fake_study.make_results(np.random.default_rng(2), phases=PHASES, streams=("u", "v", "m"), frames=0)
    summary = finish_run(tmp_path / "run", results, evaluation={"bootstrap": 100, "fixed_threshold": [0.2]})
    page, _ = test_html.read(tmp_path / "run")
    assert "fixed 0.20" in page.words_of("thresholds") and "0.10–0.30, MicroAttNet's sweep" in page.words
    best = summary["leaky"]["global_threshold"]
    claim = f"would be {best['threshold']:.2f} and claim a macro-F1 of {best['macro_f1']:.3f}"
    assert claim in page.words_of("leaks") and claim not in page.words_of("thresholds")
    row = next(row for row in score_rows(summary) if row.name == "fixed: macro-F1, pooled")
    assert row.mean == summary["fixed"]["macro_f1"]["pooled"]["mean"] and row.group.startswith("At the fixed threshold")
    assert max(map(len, terminal_table(summary).splitlines())) <= 100
    assert "streams" in page.sections and "attention" not in page.sections


def test_labels_of_several_databases_have_their_rows(rng):
    results = fake_study.make_results(rng, databases=["a", "b"] * 20, label_names=("x", "y"), num_epochs=0)
    summary = summarise(results, {"bootstrap": 100})
    names = [row.name for row in score_rows(summary)]
    assert "macro-F1 a (18)" in names and "macro-F1 b (18)" in names
    entry = summary["databases"][1]
    leaky = next(row.leaky for row in score_rows(summary) if row.name == "macro-F1 a (18)")
    assert leaky == entry["leaky"]["macro_f1"]["mean"]  # thresholds, for want of curves


def test_folds_that_are_not_subjects_keep_their_strips_and_variance(finish_run, tmp_path):
    results = fake_study.make_results(
        np.random.default_rng(4), task="multi_class", label_names=fake_study.EMOTIONS, gate=False
    )
    finish_run(tmp_path / "run", results, evaluation={"bootstrap": 100})
    page, _ = test_html.read(tmp_path / "run")
    assert "fold 2 (12 clips)" in page.words_of("seeds") and "rest" in page.words_of("variance")
    assert "UF1 ± sd" in page.words_of("members") and "accuracy" in page.words_of("members")
    assert {"attention", "confusion"} < set(page.sections) and "databases" not in page.sections


def test_a_name_of_a_class_or_database_is_escaped(composite, finish_run, tmp_path):
    evil = "<b>&"
    results = dataclasses.replace(
        composite,
        label_name=np.array([f"negative {evil}", "positive", "surprise"]),
        clip_database=np.where(composite.clip_database == "samm", evil, composite.clip_database),
        stream_name=np.array([f"u{evil}", "v", "m"]),
    )
    finish_run(tmp_path / "run", results, evaluation={"bootstrap": 100})
    page, text = test_html.read(tmp_path / "run")
    assert "<b>&" not in text
    assert evil in page.words_of("databases") and f"u{evil}" in page.words_of("streams")


def test_many_settings_by_many_folds_are_summed_up(finish_run, tmp_path):
    results = fake_study.make_composite(np.random.default_rng(6), num_seeds=1, num_epochs=0, hyper={"lr": [0.1, 0.2]})
    summary = finish_run(tmp_path / "run", results, evaluation={"bootstrap": 100})
    page, _ = test_html.read(tmp_path / "run")
    words = page.words_of("settings")
    for setting in summary["settings"]:
        assert f"{np.mean(setting['inner']):.3f}{setting['macro_f1']['pooled']:.3f}" in words
        assert f"{len(setting['chosen_for_folds'])} folds" in words


def test_a_table_of_one_seed_leaves_the_ensemble_out(summary):
    one = copy.deepcopy(summary)
    one["study"]["seeds"] = [0]
    assert not any("all seeds" in row.name for row in score_rows(one))
    assert any("all seeds" in row.name for row in score_rows(summary))
