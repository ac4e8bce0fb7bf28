"""How C++ is compiled, kept and done without."""

import sys
import tempfile

import jax
import pytest

from mer_jax import compiled

needs_compiler = pytest.mark.usefixtures("compiled")
TARGETS = ("answer",)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answers.cc"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def anew(monkeypatch, tmp_path, source):
    """``version()`` as in a new process, with an empty folder for what is compiled; XLA learns of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *arguments, **fields: None)
    return lambda: compiled._load.__wrapped__(source, TARGETS)


def test_an_empty_cxx_goes_without(anew, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "")
    assert anew() == "" and not capfd.readouterr().err


FAILS = "import sys; print('In file', 'x.h: error: no such thing', sep='\\n', file=sys.stderr); raise SystemExit(1)"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no_such_compiler", "No such file"),
        (f'{sys.executable} -c "{FAILS}"', "x.h: error: no such thing"),
        ("g++ 'x", "No closing quotation"),
        ("true", "cannot be compiled"),
    ],
)
def test_a_compiler_that_fails_is_told_in_one_line(compiler, reason, anew, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    assert anew() == ""
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and reason in told and "answers.cc" in told and "CXX= to go without" in told
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_a_machine_compiles_once(anew, monkeypatch, tmp_path, source):
    compile, made = compiled._compile, []
    monkeypatch.setattr(compiled, "_compile", lambda *given: made.append(given) or compile(*given))
    name = anew()
    assert name.startswith("answers-") and anew() == name and len(made) == 1
    (kept,) = (tmp_path / "cache" / "mer_jax").iterdir()
    assert kept.name.startswith(name)
    cut = tmp_path / "other" / "mer_jax" / kept.name
    cut.parent.mkdir(parents=True)
    cut.write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert anew() == name and len(made) == 2 and cut.stat().st_size == kept.stat().st_size
    monkeypatch.setattr(compiled, "_FLAGS", [*compiled._FLAGS, "-DOTHER"])
    other = anew()
    assert other != name and len(made) == 3
    source.write_text(source.read_text() + "// changed\n")
    assert anew() not in (name, other) and len(made) == 4


@needs_compiler
@pytest.mark.parametrize("home", ["a file", "none"])
def test_who_can_keep_nothing_compiles_for_the_process(home, anew, monkeypatch, tmp_path):
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiled.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        (tmp_path / "cache").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert anew()
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "answers.cc"}


@needs_compiler
def test_a_source_that_lacks_an_operation_is_told(anew, source, capfd):
    source.write_text("int another() { return 1; }\n")
    assert anew() == "" and "answer" in capfd.readouterr().err
