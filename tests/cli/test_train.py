"""``scripts/train.py`` as a user opens it: what it writes, and that nothing can spoil or lose it."""

import csv
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mer_jax.study.train as train_module
from mer_jax.errors import UserError
from mer_jax.study.results import StudyResults

ROOT = Path(__file__).resolve().parents[2]
FUSION = ROOT / "configs" / "fusion.py"
EVERY_EPOCH = {"study.checkpoint_seconds": 0}


def arrays(workdir):
    with np.load(workdir / "predictions.npz") as archive:
        return {name: archive[name] for name in archive.files}


def assert_bitwise_equal(workdir, other):
    ours, theirs = arrays(workdir), arrays(other)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype and values.tobytes() == theirs[name].tobytes(), name


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoint_epochs(workdir, block=0):
    folder = workdir / "checkpoints" / f"block_{block:04d}"
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())


def epochs_seen(workdir):
    """Epochs of all blocks that a run has told about, also in earlier processes."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def test_a_run_writes_all_that_a_reader_needs(challenge, finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("config.json", "overrides.json", "versions.json", "data.json", "folds.csv", "members.csv"),
        *("metrics.jsonl", "predictions.npz", "summary.json", "report.html", "params", "feature_maps.npz"),
    }
    assert not (finished / "blocks").exists() and not list(finished.rglob("*tmp*"))
    config = json.loads((finished / "config.json").read_text())
    assert config["train"]["epochs"] == 30 and config["data"]["modalities"]["appearance"]["extractor"] == "look"
    assert json.loads((finished / "overrides.json").read_text())["study.num_inner"] == 2
    assert {"jax", "python", "numpy", "mer_jax"} <= json.loads((finished / "versions.json").read_text()).keys()

    members = [f"fold{fold}-seed{seed}" for fold in range(3) for seed in range(2)]
    lines = metrics(finished)
    assert [(line["member"], line["epoch"]) for line in lines] == [(m, e) for e in range(1, 31) for m in members]
    assert all(np.isfinite([line["train_loss"], line["inner_loss"], line["heldout_loss"]]).all() for line in lines)

    with open(finished / "folds.csv", newline="") as stream:
        folds = list(csv.DictReader(stream))
    assert len(folds) == 28 and [row["fold"] for row in folds[24:]] == ["-1"] * 4
    assert [sum(row["fold"] == str(fold) for row in folds) for fold in range(3)] == [8, 8, 8]
    assert folds[0]["subject"] == "s1" and folds[-1]["Negative"] == ""
    with open(finished / "members.csv", newline="") as stream:
        assert [row["member"] for row in csv.DictReader(stream)] == members

    results = StudyResults.load(finished)
    assert results.member_id.tolist() == members and results.ok.all()
    assert results.gate_name.tolist() == ["appearance", "geometry"]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["evaluation"]["bootstrap"] == 100
    told = (challenge.root / "finished.txt").read_text()
    assert "macro-F1, pooled" in told and "report: finished/report.html" in told
    assert b"http" not in (finished / "report.html").read_bytes().replace(b"http://www.w3.org", b"")


def test_a_member_scores_above_chance(finished):
    results = StudyResults.load(finished)
    held_out = results.clip_fold[results.sample_clip] == results.member_fold[:, None]  # (M, N)
    truth = np.broadcast_to(results.clip_labels[results.sample_clip] == 1, results.probabilities.shape)[held_out]
    guess = results.probabilities[held_out]  # (K, 5)
    assert guess[truth].mean() > guess[~truth].mean() + 0.15


def test_a_finished_study_ends_at_once_and_rewrites_its_report(challenge, finished, copy, train):
    (copy / "report.html").unlink()
    (copy / "summary.json").write_text("old")
    shutil.move(copy, copy.parent / "again")
    # Neutral fields may differ, and the data are no longer needed.
    done = train(challenge.overrides | EVERY_EPOCH | {"data.workers": 2}, "again").end()
    assert done.status == 0, done.stderr
    assert "training" not in done.stderr and "macro-F1, pooled" in done.stdout
    again = copy.parent / "again"
    assert (again / "summary.json").read_bytes() == (finished / "summary.json").read_bytes()
    assert (again / "report.html").stat().st_size > 10_000
    assert_bitwise_equal(again, finished)


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM, signal.SIGKILL, signal.SIGINT),
        pytest.param(
            (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL), marks=pytest.mark.slow
        ),
    ],
    ids=["once each", "five in turn"],
)
def test_no_kill_and_no_signal_changes_any_result(challenge, finished, train, tmp_path, signals):
    """Kills at random moments, SIGTERM and Ctrl-C, then an undisturbed end, in one folder."""
    run, moments = tmp_path / "run", random.Random()
    for signum in signals:
        before = epochs_seen(run)
        disturbed = train(challenge.overrides | EVERY_EPOCH, "run")
        # Lines of members: 4 an epoch of the first block, 2 an epoch of the second, which trains beside it where there
        # are two processors. The last possible stop is far from the end.
        more = before + moments.randrange(4, 24)
        disturbed.wait_for(lambda more=more: epochs_seen(run) >= more)
        seconds = disturbed.stop(signum)
        assert not (run / "predictions.npz").exists()
        if signum == signal.SIGKILL:
            assert disturbed.status == -signal.SIGKILL
            continue
        assert seconds < 10 and disturbed.status == 128 + signum
        assert f"stopped by {signum.name}" in disturbed.stderr and "Traceback" not in disturbed.stderr
        assert "checkpoints are in run/checkpoints; run the same command again" in disturbed.stderr
        # What was told last of a block is what was saved, so that nothing is lost.
        for number, folds in enumerate((("fold0", "fold1"), ("fold2",))):
            epochs = [line["epoch"] for line in metrics(run) if line["member"].startswith(folds)]
            assert max(epochs, default=0) == max(checkpoint_epochs(run, number), default=0)
    # No start began anew: only what a kill cut off was done again.
    told = [(line["member"], line["epoch"]) for line in metrics(run)]
    assert len(told) - len(set(told)) <= signals.count(signal.SIGKILL) * 3 * 4
    done = train(challenge.overrides, "run").end()
    assert done.status == 0, done.stderr
    assert_bitwise_equal(run, finished)
    assert len(metrics(run)) == 6 * 30
    assert not (run / "blocks").exists() and not list((run / "checkpoints").glob("*"))
    assert not list((run / "params").glob("*tmp*"))


def test_the_number_of_devices_changes_no_bit(challenge, finished, train, tmp_path):
    done = train(challenge.overrides, "four", devices=4).end()
    assert done.status == 0, done.stderr
    assert "on 2 cpu devices" in done.stderr  # two blocks
    assert_bitwise_equal(tmp_path / "four", finished)


@pytest.mark.slow
def test_the_number_of_devices_changes_no_bit_of_optimised_programs(challenge, finished, train, tmp_path):
    del finished  # has built the data set
    for devices in (1, 4):
        fields = challenge.overrides | {"study.compile_cache": "", "study.members_together": 2}
        done = train(fields, f"{devices}", devices=devices, optimised=True).end()
        assert done.status == 0, done.stderr
    assert "on 3 cpu devices" in done.stderr
    assert_bitwise_equal(tmp_path / "1", tmp_path / "4")


def test_programs_that_a_compiler_chooses_by_timing_stay_with_the_run(challenge, finished, train, door, tmp_path):
    """As on a GPU, of which a CPU takes the place here; a stopped run goes on with the programs that it began with."""
    script = tmp_path / "by_timing.py"
    script.write_text(
        "import atexit, collections, json, pathlib, runpy, sys\n"
        "import jax\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "seen = collections.Counter()\n"
        "jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition('/')[2]]))\n"
        "atexit.register(lambda: pathlib.Path('events.json').write_text(json.dumps(seen)))\n"
        "from mer_jax.study import memory\n"
        "memory._BY_TIMING = ('cpu',)\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r}, run_name='__main__')\n"
    )
    fields = challenge.overrides | EVERY_EPOCH | {"study.compile_cache": ""}
    arguments = [f"--config={FUSION}", *(f"--config.{name}={value}" for name, value in fields.items())]

    def kept():
        return {path.name: path.read_bytes() for path in (tmp_path / "run" / "programs").glob("*-cache")}

    stopped = door(script, *arguments, "--workdir=run", devices=2)
    stopped.wait_for(lambda: epochs_seen(tmp_path / "run") >= 4)
    stopped.stop(signal.SIGTERM)
    before = kept()
    cut = next((tmp_path / "run" / "programs").glob("jit_epochs-*-cache"))
    cut.write_bytes(before[cut.name][:100])  # by a kill
    assert sum(name.startswith("jit_epochs") for name in before) == 2, before.keys()  # one a device
    done = door(script, *arguments, "--workdir=run", devices=2).end()
    assert done.status == 0, done.stderr
    assert_bitwise_equal(tmp_path / "run", finished)
    after, events = kept(), json.loads((tmp_path / "events.json").read_text())
    others = before.keys() - {cut.name}
    assert all(after[name] == before[name] for name in others)
    # What was kept was read, and only what came new, or was cut, compiled.
    assert events["cache_hits"] > 4
    assert events["cache_misses"] == len(after.keys() - before.keys()) + 1 and len(after[cut.name]) > 100
    assert not any(name.startswith("jit_epochs") for name in after.keys() - before.keys())
    assert "persistent compilation cache" not in done.stderr
    assert not (finished / "programs").exists()


def test_a_member_alone_equals_itself_among_others(challenge, finished, train, tmp_path):
    alone = {"study.only_folds": (1,), "study.num_seeds": 1, "study.first_seed": 1, "evaluation.thresholds": "fixed"}
    done = train(challenge.overrides | alone, "alone").end()
    assert done.status == 0, done.stderr
    single, all_ = StudyResults.load(tmp_path / "alone"), StudyResults.load(finished)
    assert single.member_id.tolist() == ["fold1-seed1"]
    row = all_.member_id.tolist().index("fold1-seed1")
    np.testing.assert_allclose(single.probabilities[0], all_.probabilities[row], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(single.inner[0], all_.inner[row])


def test_a_diverging_member_is_named_and_harms_no_other(challenge, finished, train, tmp_path):
    """Rates of 1e30 share blocks with good ones."""
    grid = {"grid.learning_rate": (1e-2, 1e30)}
    done = train(challenge.overrides | grid, "grid").end()
    assert done.status == 0, done.stderr
    results, alone = StudyResults.load(tmp_path / "grid"), StudyResults.load(finished)
    bad = np.array(["1e+30" in name for name in results.member_id])
    assert bad.sum() == 6 and (results.member_status[bad] == "diverged").all() and results.ok[~bad].all()
    for name in results.member_id[bad]:
        assert f"warning: member {name} diverged at step " in done.stderr
    assert np.isnan(results.probabilities[bad]).all()
    assert results.member_id[~bad].tolist() == [f"{name}-learning_rate=0.01" for name in alone.member_id]
    np.testing.assert_allclose(results.probabilities[~bad], alone.probabilities, rtol=0, atol=1e-4)


def test_a_full_disk_costs_nothing(challenge, finished, train, tmp_path):
    """The kernel refuses to write: for a while, which training outlives, then for good; then there is space again.

    A checkpoint that was damaged meanwhile costs the epochs since the one before.
    """
    run = tmp_path / "run"
    full = train(challenge.overrides | EVERY_EPOCH, "run")

    def allow(size):
        resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    full.wait_for(lambda: len(checkpoint_epochs(run)) >= 2)
    allow(64)
    full.wait_for(lambda: "training goes on and tries again" in full.stderr)
    reached = max(checkpoint_epochs(run))
    allow(resource.RLIM_INFINITY)
    full.wait_for(lambda: max(checkpoint_epochs(run), default=99) > reached + 1)
    allow(64)
    full.end()
    assert full.status == 2, full.stderr
    # Not the only line: where the disk fills in the middle of a checkpoint, TensorStore's own threads have their say.
    line = full.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "run/" in line and "written (" in line
    assert line.endswith(("run the same command again", "Earlier checkpoints are intact"))
    kept = checkpoint_epochs(run)
    assert len(kept) == 2 and kept[-1] > reached and not list(run.rglob("*tmp*"))
    # The same disk has lost a part of the newest checkpoint.
    shutil.rmtree(run / "checkpoints" / "block_0000" / str(kept[-1]) / "d")
    done = train(challenge.overrides, "run").end()
    assert done.status == 0, done.stderr
    assert f"its members go on from the one before, after epoch {kept[0]}" in done.stderr
    assert_bitwise_equal(run, finished)


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: flag --config=None: Flag --config must have a value other than None."),
        (["--config=absent.py"], "error: --config: No such file or directory: 'absent.py'"),
        (["--config=FUSION:nonsense"], "error: configs/fusion.py:nonsense: no such variant; there are fusion, "),
        (
            ["--config=FUSION", "--config.study.num_seedz=3"],
            "error: --config.study.num_seedz=3: the config has no such field; did you mean num_seeds?",
        ),
        (["--config=FUSION", "--config.studdy.num_seeds=3"], "--config.studdy.num_seeds=3: the config has no such"),
        (["--config=FUSION", "--config.train.epochs.x=3"], "--config.train.epochs.x=3: the config has no such field"),
        (["--config=FUSION", "--config.train.epochs=many"], "error: flag --config.train.epochs=many: "),
        (["--config=FUSION", "--wrkdir=x"], "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["--config=FUSION", "more"], "error: unknown argument 'more'"),
    ],
)
def test_a_wrong_command_line_is_one_line(door, arguments, message):
    done = door("train.py", *(text.replace("FUSION", str(FUSION)) for text in arguments)).end()
    assert message in done.error and len(done.stderr.splitlines()) == 1 and done.stdout == ""


_BASE = "from mer_jax.study.config import base_config\n"


@pytest.mark.parametrize(
    "text, argument, message",
    [
        ("x = 1\n", "", "own.py: has no get_config(); write one"),
        ("def get_config(:\n", "", "own.py, line 1: SyntaxError: invalid syntax"),
        ("import nothing_like_it\n", "", "own.py, line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def get_config():\n    pass\n", "", "own.py: get_config() gives NoneType instead of a ConfigDict"),
        ("def get_config():\n    return {}['a']\n", "", "own.py, line 2: KeyError: a; correct the file"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "", "own.py, line 2: ValueError: two lines; "),
        ("def get_config(a, b):\n    pass\n", "", "own.py: get_config() gets its argument from --config=own.py:ARGU"),
        ("def get_config():\n    pass\n", ":big", "own.py: get_config() is called with 'big', which does not fit ("),
        (_BASE + "get_config = base_config\n", "", "config.name is missing; begin a config with get_config() of a fi"),
        (
            _BASE + "def get_config():\n    c = base_config()\n    c.train.epochs = 'x'\n    return c\n",
            "",
            "own.py, line 4: TypeError: Could not override field 'epochs'",
        ),
    ],
)
def test_what_is_wrong_in_a_config_file_is_one_line(door, tmp_path, text, argument, message):
    (tmp_path / "own.py").write_text(text)
    done = door("train.py", f"--config=own.py{argument}").end()
    assert done.error.startswith(f"error: {message}") and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["own.py"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("blocks.json", b"{", "blocks.json: cannot be read (Expecting"),
        ("blocks.json", b"{}", "blocks.json: lacks members_together or platform; delete it"),
        ("data.json", b"\xff", "data.json: cannot be read ('utf-8' codec"),
        ("config.json", b"[]", "config.json: cannot be read (no JSON object); put a copy of it back, or delete"),
        ("feature_maps.npz", b"PK", "feature_maps.npz: cannot be read (no whole .npz archive); delete it and run"),
    ],
)
def test_a_damaged_file_of_an_unfinished_run_is_named_with_what_to_do(challenge, copy, told, name, content, message):
    (copy / "predictions.npz").unlink()
    (copy / name).write_bytes(content)
    assert message in told(challenge.overrides, "copy")
    assert (copy / name).read_bytes() == content and any((copy / "params").iterdir())


def test_an_absent_accelerator_is_one_line(challenge, train, told, tmp_path):
    line = told(challenge.overrides | {"platform": "gpu"})
    assert "config.platform='gpu': no such device on this machine" in line and "config.platform='cpu'" in line
    done = train(challenge.overrides, "run", JAX_PLATFORMS="cuda").end()
    assert "JAX_PLATFORMS='cuda': no such device on this machine" in done.error
    assert not (tmp_path / "run" / "config.json").exists()
    line = told(challenge.overrides | {"train.matmul_precision": "bfloat16"})
    assert "config.train.matmul_precision='bfloat16': a CPU multiplies in float32; set it to 'float32', or" in line


def test_another_config_is_refused_with_both_values(challenge, copy, told):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = told(challenge.overrides | {"train.epochs": 31, "study.only_folds": (0,)}, "copy")
    assert "holds a study of another config" in line and "choose another --workdir" in line
    assert "train.epochs was 30, now 31" in line and "study.only_folds was [], now [0]" in line
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize("began_with", [False, True])
def test_loops_of_another_kind_are_refused(challenge, copy, told, monkeypatch, began_with):
    """Last bits depend on them, so that a run that would go on with others would be neither of the two."""
    settled = json.loads((copy / "blocks.json").read_text())
    (copy / "blocks.json").write_text(json.dumps(settled | {"merged_loops": began_with}))
    (copy / "predictions.npz").unlink()
    monkeypatch.setattr("mer_jax.study.train.loops_are_merged", lambda: not began_with)
    line = told(challenge.overrides, "copy")
    began, option = ("with", "xla_cpu_use_multi_output_fusion") if began_with else ("without", "xla_none")
    assert f"began {began} XLA's merged loops" in line and f"add --xla_backend_extra_options={option} to XLA_FL" in line


@pytest.mark.parametrize(
    ("began", "now", "remedy"),
    [
        ("", "cpu_blocks-1", "began with no compiled .* on with cpu_blocks-1; set CXX= to go without"),
        ("cpu_blocks-1", "", "began with cpu_blocks-1 compiled .* on with none; set CXX to the C.. compiler that it"),
        ("cpu_blocks-1", "cpu_blocks-2", "would go on with cpu_blocks-2; set CXX to .* began with, on the same kind"),
    ],
)
def test_convolutions_of_another_kind_are_refused(tmp_path, began, now, remedy):
    assert train_module._settled_block_size(tmp_path, 2, "cpu", began) == 2
    assert train_module._settled_block_size(tmp_path, None, "cpu", began) == 2
    with pytest.raises(UserError, match=f"{remedy}.*another --workdir"):
        train_module._settled_block_size(tmp_path, 2, "cpu", now)


def test_a_library_changes_no_option_of_the_process_that_uses_it(challenge, finished, tmp_path):
    """Merged loops keep programs of optical flow from ending."""
    fields = challenge.overrides | {"train.epochs": 1, "study.only_folds": (0,), "study.num_seeds": 1}
    program = f"""
import json, os, runpy, sys
from mer_jax.study.loops import loops_are_merged
from mer_jax.study.train import train

config = runpy.run_path({str(FUSION)!r})["get_config"]()
config.update_from_flattened_dict({fields!r})
assert train(config, sys.argv[1]) == 0
assert "XLA_FLAGS" not in os.environ and not loops_are_merged()
assert json.load(open(sys.argv[1] + "/blocks.json"))["merged_loops"] is False
"""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"], cwd=ROOT, env=kept, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_of_something_else_is_refused(challenge, told, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    assert "run is not empty and holds no study; choose another --workdir" in told(challenge.overrides)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    assert "file/run: cannot be used (Not a directory)" in told(challenge.overrides, "file/run")


@pytest.fixture(scope="module")
def small(new_challenge, tmp_path_factory):
    return new_challenge(tmp_path_factory.mktemp("small"), 6, 1)


@pytest.fixture
def broken(small, tmp_path):
    """A small data set that a test may damage."""
    shutil.copytree(small.root, tmp_path / "challenge")
    return type(small)(tmp_path / "challenge")


def _labels(change):
    def damage(broken):
        path = broken.source / "train.csv"
        path.write_text(change(path.read_text()))

    return damage


def _features(change):
    def damage(broken):
        path = broken.features / "look" / "clip_3_r.npy"
        np.save(path, change(np.load(path)))

    return damage


def _remove_frames(broken):
    for path in sorted((broken.source / "train" / "clip_2").iterdir())[1:]:
        path.unlink()


_BAD = {
    "source is missing": (
        lambda broken: shutil.rmtree(broken.source), {}, ["challenge/source"]
    ),
    "source is not told": (None, {"data.source": ""}, ["four_dme/challenge is not built yet: say with --source"]),
    "unknown class": (
        _labels(lambda text: "\n".join(f"{line},{0 if n else 'Joy'}" for n, line in enumerate(text.split()))),
        {},
        ["train.csv", "Joy"],
    ),
    "label without a clip": (_labels(lambda text: text + "77,0,1,0,0,0,s1\n"), {}, ["train.csv: line 8", "'77'"]),
    "clip without a label": (
        _labels(lambda text: "\n".join(text.splitlines()[:-1])), {}, ["train.csv", "clip_6"]
    ),
    "duplicate Id": (
        _labels(lambda text: text + "3,0,1,0,0,0,s1\n"), {}, ["train.csv: line 8 gives Id '3' again"]
    ),
    "one frame": (_remove_frames, {}, ["train/clip_2: the clip has 1 frame, at least 2"]),
    "wrong D": (
        _features(lambda x: x[:, :5]), {}, ["look/clip_3_r.npy: 5 features per frame, the others have 6"]
    ),
    "wrong T": (_features(lambda x: x[:3]), {}, ["features of 3 frames for 'clip_3_r', whose clip has 4"]),
    "wrong dtype": (
        _features(lambda x: x.astype(str)), {}, ["look/clip_3_r.npy: values of type <U", "real numbers"]
    ),
    "NaN": (
        _features(lambda x: np.where(np.arange(6) == 2, np.nan, x)),
        {},
        ["look/clip_3_r.npy: NaN or Inf in row 0, column 2"],
    ),
    "no features": (
        lambda broken: (broken.features / "look" / "clip_3_r.npy").unlink(), {}, ["no features of 'clip_3_r'"]
    ),
    "unknown extractor": (
        None,
        {"data.modalities.geometry.extractor": "shap"},
        ["config.data.modalities", "'shap'", "hog, facemesh"],
    ),
    "unknown data set": (
        None, {"data.dataset": "casme"}, ["config.data.dataset='casme'", "a study of features needs 'four_dme/...'"]
    ),
    "unknown configuration": (
        None, {"data.dataset": "four_dme/casme"}, ["config.data.dataset='four_dme/casme': must be one of"]
    ),
    "wrong fold": (None, {"study.only_folds": ("a",)}, ["config.study.only_folds=('a',): must be numbers"]),
    "wrong grid": (None, {"grid.dropout": (0.1, 1.5)}, ["config.grid.dropout=(0.1, 1.5): must be numbers in"]),
    "no inner split": (None, {"study.num_inner": 0}, ["config.evaluation.thresholds='per_class'", "num_inner"]),
}  # fmt: skip


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_one_line(broken, told, tmp_path, case):
    damage, overrides, messages = _BAD[case]
    if damage:
        damage(broken)
    line = told(broken.overrides | overrides)
    for message in messages:
        assert message in line
    assert not list((tmp_path / "run").glob("*.json"))  # the folder is free for the corrected command


def test_an_unreadable_frame_is_named_and_the_other_clips_are_kept(broken, told):
    """With an extractor of this library, which reads every frame."""
    (broken.source / "train" / "clip_2" / "2.jpg").write_bytes(b"no image")
    overrides = broken.overrides | {"data.modalities.appearance.extractor": "hog"}
    line = told(overrides)
    assert "1 of 7 clips cannot be prepared (clip clip_2: " in line and "clip_2/2.jpg" in line
    finished = {path: path.stat().st_mtime_ns for path in (broken.root / "data" / "work").rglob("*.npz")}
    assert len(finished) == 6
    assert told(overrides) == line
    assert finished == {path: path.stat().st_mtime_ns for path in (broken.root / "data" / "work").rglob("*.npz")}


def test_fewer_clips_than_folds(broken, told):
    line = told(broken.overrides | {"folds.num": 7})
    assert "config.folds.num: 7 folds need at least 7 labelled clips, the data set has 6; set fewer folds" in line
    line = told(broken.overrides | {"folds.group": "subject", "folds.num": 6, "study.num_inner": 6})
    assert "config.study.num_inner: 6 inner parts need at least 6 training subjects, fold 0 has 5" in line
    line = told(broken.overrides | {"study.only_folds": (3,)})
    assert "config.study.only_folds=(3,): the folds are 0 to 2" in line
    line = told(broken.overrides | {"grid.dropout": (0.1, 0.1)})
    assert "make two members fold0-seed0-dropout=0.1" in line


def test_data_that_changed_under_a_run_are_refused(broken, told, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "_train_members", lambda *_: 143)  # as if stopped at once
    config = runpy.run_path(str(FUSION))["get_config"]()
    config.update_from_flattened_dict(broken.overrides | {"study.compile_cache": ""})
    assert train_module.train(config, tmp_path / "run") == 143
    path = broken.features / "look" / "clip_3_r.npy"
    np.save(path, np.load(path) + 1)
    line = told(broken.overrides)
    assert "labels, frames or feature files have changed since" in line and "remove this folder" in line
    shutil.rmtree(broken.root / "data" / "four_dme")
    assert "run holds a study of other data" in told(broken.overrides)
