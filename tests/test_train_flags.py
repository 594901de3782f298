"""Every flag of the commands that absl parses, absurd: one line, status 2, no file."""

import functools
import sys

import grain.python  # noqa: F401  (has flags of its own, which the saver keeps)
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import default
from ibsgl_jax.models import own
from tests import layers
from tests.quick_explain import snapshot
from train import __main__ as training
from train import command, compile, prepare
from train.run import loop

# ml_collections reads a configuration in a way that Python gives up.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")

# What nobody means, for any flag; a flag may take one of them for its own.
ABSURD = (
    "",
    "\0",
    "\n\x1b[2J",
    "-1",
    "9" * 50,
    "1e400",
    "nan",
    "/proc/self/nothing",
    "/dev/null/x",
    "/",
    "x" * 5000,
    "\u00b2",
    "\udce9",
)
# As good a name of a folder as any.
FOLDERS = {"\n\x1b[2J", "-1", "9" * 50, "1e400", "nan", "/", "\u00b2", "\udce9"}
COMPILE_FLAGS = ("config", "topology", "phase", "num_classes", "json")
TINY = """
import os
from tests import tiny_run

def get_config():
    return tiny_run.make_config(os.environ["PHOTO_DIGITS"])
"""


class Accepted(Exception):
    """The command would have begun its work."""


CHECK = functools.cache(own.check)  # each network is looked at once


@pytest.fixture
def folder(tmp_path, monkeypatch, photo_digits_dir):
    """Where the commands run: like the project's, but that all written is seen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(layers.ROOT / "configs")
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.setenv("PHOTO_DIGITS", str(photo_digits_dir))
    monkeypatch.setattr(own, "check", CHECK)
    return tmp_path


@pytest.fixture
def compile_flags():
    """The flags of train.compile, in place of the trainer's of the same names."""
    config = flags.FLAGS["config"]
    delattr(flags.FLAGS, "config")
    compile.define_flags()
    yield
    for name in COMPILE_FLAGS:
        delattr(flags.FLAGS, name)
    flags.FLAGS["config"] = config


def run(main, default, arguments, monkeypatch):
    """A command's exit status, or "accepted"."""

    def begin(*args, **kwargs):
        raise Accepted

    monkeypatch.setattr(loop, "train_phase", begin)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    # A configuration without get_config would find that of the one before it.
    sys.modules.pop("config_config", None)
    with flagsaver.flagsaver():
        try:
            return main(command.make_parser(default)(sys.argv))
        except SystemExit as end:
            return end.code
        except Accepted:
            return "accepted"


def told_in_one_line(capsys):
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("error: ") and line.isprintable(), line
    assert len(line) < 2100 and "Traceback" not in line, line
    return line


def own_flags(*modules):
    by_module = flags.FLAGS.flags_by_module_dict()
    return sorted({flag.name for name in modules for flag in by_module.get(name, ())})


def refuse(main, default, arguments, folder, monkeypatch, capsys):
    """Asserts that the command refuses these arguments as a command should."""
    before = snapshot(folder)
    status = run(main, default, arguments, monkeypatch)
    assert status == 2, (status, arguments, capsys.readouterr())
    told_in_one_line(capsys)
    assert snapshot(folder) == before, arguments


class TestTrain:
    @pytest.mark.parametrize(
        "flag", own_flags("train.__main__", "train.command", "__main__")
    )
    def test_absurd_flags(self, flag, folder, monkeypatch, capsys):
        for text in ABSURD:
            arguments = ["--config=tiny.py", f"--{flag}={text}"]
            if flag == "workdir" and text == "/":
                continue  # whether it can be written to is the machine's affair
            if flag == "workdir" and text in FOLDERS:
                status = run(training.main, "tiny.py", arguments, monkeypatch)
                assert status == "accepted", text
                capsys.readouterr()
                continue
            refuse(training.main, "tiny.py", arguments, folder, monkeypatch, capsys)


def leaves(config, prefix=""):
    """The fields of a configuration that hold no others, as on the command line."""
    found = []
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found += leaves(value, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


class TestConfigFiles:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("def get_config(:", "line 1"),
            ("x = 1", "no get_config"),
            ("def get_config():\n    return nope", "line 2: NameError"),
            ("def get_config():\n    raise ValueError('a\\nb')", "b"),
            ("import nope", "No module named 'nope'"),
        ],
    )
    def test_a_file_that_is_none(self, text, expected, folder, monkeypatch, capsys):
        (folder / "own.py").write_text(text)
        status = run(training.main, "own.py", ["--config=own.py"], monkeypatch)
        assert status == 2
        line = told_in_one_line(capsys)
        assert line.startswith("error: --config: ") and expected in line


# Where an empty text, or one without a meaning, has one.
EMPTY = ("control.dataset", "guided.dataset", "plain.dataset")
EMPTY += ("guided.teacher_layer", "tap")
# Any text is a folder's name, a file that no phase asks for, a phase left out.
NAMES = ("data_dir", "pretrained", "picture_phases")


class TestFields:
    @pytest.mark.parametrize("field", leaves(default.get_config()))
    def test_absurd_values(self, field, folder, monkeypatch, capsys):
        for text in ("", "nan", "-1", "1" + "0" * 30):
            if field in (NAMES if text else (*EMPTY, *NAMES[1:])):
                continue
            arguments = ["--config=tiny.py", f"--config.{field}={text}"]
            if not text and field in ("data", "trackers"):
                continue  # empty is the default
            refuse(training.main, "tiny.py", arguments, folder, monkeypatch, capsys)


class TestCompile:
    @pytest.mark.parametrize(
        "flag", ["config", "topology", "phase", "num_classes", "json"]
    )
    def test_absurd_flags(self, flag, folder, compile_flags, monkeypatch, capsys):
        def describe(topology, platform):
            raise RuntimeError(f"no {platform} {topology}\nsecond line")

        topologies = compile.ahead.topologies
        monkeypatch.setattr(topologies, "get_topology_desc", describe)
        for text in ABSURD:
            arguments = ["--config=tiny.py", f"--{flag}={text}"]
            refuse(compile.main, "tiny.py", arguments, folder, monkeypatch, capsys)


class TestPrepare:
    @pytest.mark.parametrize("text", ABSURD)
    def test_absurd_names(self, text, folder, monkeypatch, capsys):
        refuse(prepare.main, None, [text], folder, monkeypatch, capsys)

    @pytest.mark.parametrize("flag", ["data_dir", "manual_dir"])
    def test_absurd_flags(self, flag, folder, monkeypatch, capsys):
        for text in ABSURD:
            arguments = ["cifar10", f"--{flag}={text}"]
            refuse(prepare.main, None, arguments, folder, monkeypatch, capsys)

    @pytest.mark.parametrize("text", sorted(set(ABSURD) - FOLDERS))
    def test_no_folder_for_an_embedded_set(self, text, folder, monkeypatch, capsys):
        arguments = ["photo_digits", f"--data_dir={text}"]
        refuse(prepare.main, None, arguments, folder, monkeypatch, capsys)
