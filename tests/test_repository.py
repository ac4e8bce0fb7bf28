"""What the repository says of itself holds: commands, requirements, metadata, licence."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mer_jax

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
OURS = ("mer_jax", "data_builders", "scripts", "configs")
HEAVY = (
    "mediapipe",
    "transformers",
    "distributed",
    "tensorflow",
    "tensorflow_datasets",
    "jax",
    "flax",
    "sklearn",
    "matplotlib",
)

# Packages by the name of the module that is imported, where the names differ.
PACKAGES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "cv2": "opencv-contrib-python",
    "dask": "distributed",
    "iterstrat": "iterative-stratification",
    "orbax": "orbax-checkpoint",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
}
# Never imported here, but the packages that are do not work without them or without their pin.
COMPANIONS = {"array_record", "importlib_resources", "protobuf", "tensorflow-metadata"}


def requirements(name):
    """The requirements of a file, read as setuptools reads them for the package's metadata."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {found.name: found for found in (Requirement(line) for line in lines if line and line[0] != "#")}


def load_config(argument):
    path, _, variant = argument.partition(":")
    spec = importlib.util.spec_from_file_location("config_of_readme", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def help_of(script, *arguments):
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(script), *arguments, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ci_runs_the_test_command_of_the_readme_and_nothing_else():
    tests = [command for command in COMMANDS if "pytest" in command]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    code = [line for line in lines if line and not line.startswith("#")]
    assert code == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', *tests]
    assert len(tests) == 1


def test_start_commands_make_their_own_environment():
    environment = "python3 -m venv --without-pip .venv && python3 -m pip --python .venv/bin/python install -q "
    assert COMMANDS[0].startswith(environment) and COMMANDS[1].startswith(environment)
    assert COMMANDS[0].endswith(".venv/bin/python scripts/train.py --config configs/fusion.py")
    assert "requirements-dev.txt" in COMMANDS[1]
    assert all(command.startswith((".venv/bin/python ", environment)) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_name_what_exists(command):
    words = shlex.split(command)
    for word in words:
        if re.fullmatch(r"[\w./-]+\.(py|txt)(:\w+)?", word):
            assert (ROOT / word.partition(":")[0]).is_file(), word
    if "--config" in words:
        config = load_config(words[words.index("--config") + 1])
        for word in words:
            if word.startswith("--config."):
                field = config
                for part in word.partition("=")[0].split(".")[1:]:
                    field = field[part]  # KeyError: no such field
        return
    scripts = [index for index, word in enumerate(words) if word.startswith("scripts/")]
    for index in scripts:
        subcommand = [word for word in words[index + 1 : index + 2] if not word.startswith("-")]
        known = help_of(ROOT / words[index], *subcommand).stdout
        for word in words[index + 1 :]:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", known), word


def test_the_readme_tells_all_variants_and_links_to_what_exists():
    for config in (ROOT / "configs").glob("*.py"):
        for variant in load_config_variants(config):
            named = f"configs/{config.name}:{variant}" in README or f"`:{variant}`" in README
            assert named or variant == config.stem, variant
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def load_config_variants(path):
    assigned = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "VARIANTS")


def test_the_layout_in_the_readme_is_the_layout():
    tree = README.split("## Layout")[1].split("```")[1]
    inner = set(re.findall(r"^    (\w+)/ ", tree, re.MULTILINE))
    assert inner == {path.parent.name for path in (ROOT / "mer_jax").glob("*/__init__.py")}
    assert set(re.findall(r"(\w+\.py)\b", tree)) == {script.name for script in SCRIPTS}
    for name in re.findall(r"^(\w+)/ ", tree, re.MULTILINE):
        assert (ROOT / name).is_dir(), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_is_quick(script):
    """What takes time is what is imported: a figure in seconds would only measure how busy the machine is."""
    done = help_of(script)
    # absl, which takes the flags of train.py, ends with 1 after its help.
    assert done.returncode in (0, 1) and len(done.stdout) > 100, done.stderr
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "re" in loaded and not loaded & set(HEAVY)


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    imported = set()
    for path in (path for folder in OURS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, *OURS}
    required = {**requirements("requirements.txt"), **requirements("requirements-cluster.txt")}
    assert {PACKAGES.get(name, name) for name in imported} | COMPANIONS == set(required)


def test_metadata_and_requirements_agree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = settings["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"] == {"file": ["requirements.txt"]}
    extras = {name: {"file": [f"requirements-{name}.txt"]} for name in ("dev", "cluster")}
    assert dynamic["optional-dependencies"] == extras
    assert dynamic["version"] == {"attr": "mer_jax.__version__"}
    project = settings["project"]
    assert set(project["dynamic"]) == {"version", "dependencies", "optional-dependencies"}
    assert (ROOT / project["readme"]).is_file() and (ROOT / project["license-files"][0]).is_file()
    supported = SpecifierSet(project["requires-python"])
    minor = [f"3.{number}" for number in range(9, 16) if f"3.{number}.1" in supported]
    assert minor == re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"])) == ["3.11", "3.12"]

    run, dev = requirements("requirements.txt"), requirements("requirements-dev.txt")
    cluster = requirements("requirements-cluster.txt")
    assert not set(run) & {*dev, *cluster}
    assert {name: found.specifier for name, found in cluster.items()}.items() <= {
        name: found.specifier for name, found in dev.items()
    }.items()
    for found in (*run.values(), *dev.values(), *cluster.values()):
        # Neither an address nor an accelerator's extra: both break installations elsewhere.
        assert found.specifier and not found.url and not found.extras and not found.marker, found
    assert [name for name, found in run.items() if "==" in str(found.specifier)] == ["mediapipe"]
    # One OpenCV only, below 5; nothing may bring TensorFlow.
    assert [name for name in run if "opencv" in name] == ["opencv-contrib-python"]
    assert "5.0.0" not in run["opencv-contrib-python"].specifier
    assert not {"tensorflow", "tensorflow-cpu", "clu"} & {*run, *dev}


def test_licence_and_changelog():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert re.findall(r"^   (\d)\. ", licence, re.MULTILINE) == list("123456789")
    assert "END OF TERMS AND CONDITIONS" in licence and "Copyright 2026 The mer_jax authors" in licence
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == mer_jax.__version__


def test_nothing_names_a_machine():
    """No absolute path of one machine and no package index in anything that is handed out."""
    # Patterns that begin with a letter of their own are searched for ten times as fast as one for all.
    paths = re.compile(r"/(?<![\w./}\])]/)(?:home|root|Users|tmp|work|opt|mnt|srv|scratch)/\w")
    indices = [re.compile(name) for name in ("index-url", "find-links")]
    files = [path for path in ROOT.iterdir() if path.suffix in (".md", ".txt", ".toml")]
    files += [path for folder in (*OURS, "tests", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in files:
        if path.suffix != ".pyc" and path != Path(__file__).resolve():
            text = path.read_text(encoding="utf-8", errors="ignore")
            for pattern in (paths, *indices):
                found = pattern.search(text)
                assert not found, f"{path.relative_to(ROOT)}: {found.group()}"
