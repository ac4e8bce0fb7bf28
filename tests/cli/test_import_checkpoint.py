"""``scripts/import_checkpoint.py`` as a user opens it: flow images and weights in the published formats, no PyTorch."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("torch_ststnet", ROOT / "tests" / "torch_ststnet.py")
torch_ststnet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_ststnet)

# Names as published: SMIC's images are called by two digits where the table has one.
SUBJECTS = {"sub01": ("casme2", "sub01_EP02_0{}f"), "006": ("samm", "006_006_1_{}"), "s01": ("smic", "s01_s01_ne_0{}")}
CLIPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of noise, their table, and the weights of three subjects."""
    root = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(11)
    images, rows = {}, []
    (root / "images").mkdir()
    for subject, (database, name) in SUBJECTS.items():
        for number in range(1, CLIPS + 1):
            stem, label = name.format(number), int(rng.integers(3))
            pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)  # R = u, G = v, B = strain
            Image.fromarray(pixels).save(root / "images" / f"{stem} .png")
            images[stem] = (subject, label, pixels)
            listed = stem.replace("_s01_", "_s1_") if database == "smic" else stem
            rows.append([database, subject, stem, label, "", f"{listed}.jpg", ""])
    header = ["dataset", "sub", "filename_o", "label", "apex", "imagename", "sub_filename"]
    with open(root / "combined_3_class2_for_optical_flow.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    networks = torch_ststnet.write_weights(root / "STSTNet_Weights", SUBJECTS)
    decided = {}
    for stem, (subject, label, pixels) in images.items():
        seen = torch.from_numpy(pixels[..., ::-1].transpose(2, 0, 1).copy()).float()[None]  # strain, v, u
        with torch.no_grad():
            decided[stem] = (label, int(networks[subject](seen).argmax()))
    return root, np.array(list(decided.values()))


def open_door(script, *arguments, cwd):
    """Runs a script where PyTorch is not to be had."""
    without = cwd / "without_torch"
    without.mkdir(exist_ok=True)
    (without / "torch.py").write_text("raise ImportError('PyTorch was asked for')\n")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(without)}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def import_door(cwd, *more):
    return open_door(
        "import_checkpoint.py",
        f"--config={ROOT / 'configs' / 'megc2019.py'}:ststnet",
        "--config.data.dataset=megc2019/folder",
        "--config.data.source=images",
        "--config.data.labels=combined_3_class2_for_optical_flow.csv",
        "--config.evaluation.bootstrap=100",
        *more,
        cwd=cwd,
    )


def uf1_and_uar(rows):
    """The challenge's figures by hand, from (truth, decision)."""
    truth, decision = rows.T
    f1, recall = [], []
    for label in range(3):
        hits = np.sum((truth == label) & (decision == label))
        total = np.sum(truth == label) + np.sum(decision == label)
        f1.append(2 * hits / total if total else 0.0)
        recall.append(hits / np.sum(truth == label) if (truth == label).any() else 0.0)
    return np.mean(f1), np.mean(recall)


def test_published_weights_are_scored_as_pytorch_decides_them(folder):
    root, rows = folder
    done = import_door(root, "--weights=STSTNet_Weights", "--workdir=runs/published")
    assert done.returncode == 0, done.stderr
    uf1, uar = uf1_and_uar(rows)
    assert f"12 clips: UF1 {uf1:.4f}, UAR {uar:.4f}" in done.stdout
    run = root / "runs" / "published"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["honest"]["macro_f1"]["pooled"]["mean"] == pytest.approx(uf1, abs=1e-9)
    (run / "summary.json").unlink()
    again = open_door("evaluate.py", "report", "runs/published", cwd=root)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "summary.json").read_text())["honest"] == summary["honest"]


def test_what_does_not_fit_is_one_line(folder):
    root, _ = folder
    (root / "some").mkdir(exist_ok=True)
    (root / "some" / "006.pth").write_bytes((root / "STSTNet_Weights" / "006.pth").read_bytes()[:3000])
    for weights, more, told in (
        ("nowhere", (), "error: --weights=nowhere: no such folder"),
        ("some", (), "error: --weights=some: no weights for 2 subjects (s01, sub01); restore the files, or give"),
        ("some", ("--allow-missing",), "error: some/006.pth: not a torch.save file, or damaged"),
    ):
        done = import_door(root, f"--weights={weights}", "--workdir=runs/bad", *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(told), done.stderr
        assert not (root / "runs" / "bad" / "config.json").exists()
