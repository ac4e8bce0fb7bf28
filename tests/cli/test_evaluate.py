import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("fake_study", ROOT / "tests" / "study" / "fake_study.py")
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)


def evaluate(*args):
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "evaluate.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 5)) < 0.3).astype(np.int8)
    labels[36:] = -1
    folder = tmp_path_factory.mktemp("runs")
    for name, signal in (("a", 1.5), ("b", 0.5)):
        results = fake_study.make_results(rng, signal=signal, labels=labels)
        (folder / name).mkdir()
        results.save(folder / name / "predictions.npz")
        (folder / name / "config.json").write_text(json.dumps({"evaluation": {"bootstrap": 200}}))
    return folder


def test_report_rewrites_the_summary_and_the_page(runs):
    done = evaluate("report", runs / "a", "--views=or", "--fixed-threshold=0.6,0.1,0.1,0.5,0.3", "--thresholds=fixed")
    assert done.returncode == 0, done.stderr
    assert "macro-F1, pooled" in done.stdout
    summary = json.loads((runs / "a" / "summary.json").read_text())
    assert summary["evaluation"]["views"] == "or"
    assert summary["evaluation"]["fixed_threshold"] == [0.6, 0.1, 0.1, 0.5, 0.3]
    assert (runs / "a" / "report.html").stat().st_size > 1000
    assert evaluate("report", runs / "a", "--negative-excludes-positive").returncode == 0
    assert json.loads((runs / "a" / "summary.json").read_text())["evaluation"] == {
        **{
            "phases": "mean",
            "views": "mean",
            "thresholds": "per_class",
            "fixed_threshold": 0.5,
            "negative_excludes_positive": True,
        },
        **{"selection": "average_precision", "bootstrap": 200, "confidence": 0.95},
    }


def test_compare(runs):
    done = evaluate("compare", runs / "a", runs / "b")
    assert done.returncode == 0, done.stderr
    assert "A = a\nB = b\n" in done.stdout and "4 common seeds" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report", "nowhere"], "error: nowhere/predictions.npz: not found; train the study first"),
        (["report", "a", "--views=median"], "error: evaluation.views='median': must be one of mean, max, or"),
        (["report", "a", "--fixed-threshold=x"], "argument --fixed-threshold: invalid numbers value: 'x'"),
        (["compare", "a", "nowhere"], "error: nowhere/predictions.npz: not found"),
    ],
)
def test_bad_input_is_one_line(runs, monkeypatch, args, message):
    monkeypatch.chdir(runs)
    done = evaluate(*args)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_help_is_quick_and_names_the_commands():
    done = evaluate("--help")
    assert done.returncode == 0 and "compare runs/A runs/B" in done.stdout


@pytest.fixture(scope="module")
def loso(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loso")
    for name, signal in (("ours", 1.0), ("theirs", 0.5)):
        results = fake_study.make_composite(np.random.default_rng(1), signal=signal, num_seeds=2, num_epochs=2)
        (folder / name).mkdir()
        results.save(folder / name / "predictions.npz")
        (folder / name / "config.json").write_text(json.dumps({"evaluation": {"bootstrap": 100}}))
    return folder


def test_studies_of_one_class_a_clip(loso, runs):
    done = evaluate("report", loso / "ours", "--phases=onset_apex")
    assert done.returncode == 0, done.stderr
    assert "> UF1, pooled" in done.stdout and "UAR smic (164)" in done.stdout
    assert json.loads((loso / "ours" / "summary.json").read_text())["evaluation"]["phases"] == "onset_apex"
    done = evaluate("compare", loso / "ours", loso / "theirs")
    assert done.returncode == 0, done.stderr
    assert "UF1, pooled" in done.stdout and "UF1 casme2, pooled" in done.stdout
    done = evaluate("compare", loso / "ours", runs / "a")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "ours predicts one of negative, positive, surprise, a any of Negative" in done.stderr
    done = evaluate("report", loso / "ours", "--thresholds=global")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "evaluation.thresholds='global': must be argmax in a study of one class a clip" in done.stderr
