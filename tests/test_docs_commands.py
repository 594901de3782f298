"""The commands that are documented: a test runs each, and its flags exist."""

import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings

import pytest

from ibsgl_jax.app import trainer
from tests.layers import ROOT
from tests.pages import PAGES, name


def documents():
    """(name, text) of the pages, and of what the programs' files say of themselves."""
    for page in PAGES:
        yield name(page), page.read_text()
    for room in ("train", "configs", "benchmarks", "ibsgl_jax/app", "tests"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield name(path), ast.get_docstring(ast.parse(path.read_text())) or ""


def commands():
    """Every ``python -m ...`` and ``ibsgl ...`` of them, as lists of words."""
    for place, text in documents():
        text = text.replace("\\\n", " ")
        for found in re.findall(r"(?:python -m|ibsgl) [^`\"\n]*", text):
            # A command in a line of prose ends where its quotes do.
            try:
                words = shlex.split(found, comments=True)
            except ValueError:  # of the prose behind it an apostrophe opens a quote
                words = found.split()
            yield place, [word.rstrip(":;,)]") for word in words]


def split_command(words):
    """(module, subcommand or None, the words after), or None for prose."""
    if words[0] == "ibsgl":
        if len(words) > 1 and words[1] in trainer.COMMANDS:
            return trainer.COMMANDS[words[1]], None, words[2:]
        if len(words) < 2 or words[1] not in ("explain", "models", "export"):
            return None
        return "ibsgl_jax", words[1], words[2:]
    module = words[2].rstrip(".")
    if not re.fullmatch(r"(train|benchmarks|tests)(\.[a-z_]+)*", module):
        return None
    return module, None, words[3:]


@functools.cache
def help_of(module, subcommand):
    """What the command's --help prints."""
    if module in ("train", "train.compile", "train.prepare"):  # absl's flags
        result = subprocess.run(
            [sys.executable, "-m", module, "--helpfull"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return result.stdout + result.stderr
    printed = io.StringIO()
    argv = sys.argv
    try:
        sys.argv = [module, *([subcommand] if subcommand else []), "--help"]
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            # runpy's: the module has been imported before.
            warnings.simplefilter("ignore", RuntimeWarning)
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = argv
    return printed.getvalue()


def config_fields(page, words):
    """The configuration that the words name, and the fields that they set.

    A file without a folder is the reader's own, which the page shows.
    """
    files = [w.partition("=")[2] for w in words if w.startswith("--config=")]
    file = files[0] if files and files[0] != "..." else "configs/quickstart.py"
    if "/" in file:
        scope = runpy.run_path(str(ROOT / file))
    else:
        own = rf'```python\n("""[^"\n]*/{file}""".*?)```'
        scope = {}
        exec(re.search(own, (ROOT / page).read_text(), flags=re.DOTALL)[1], scope)
    fields = [w.partition("=")[0] for w in words if w.startswith("--config.")]
    return scope["get_config"](), [f.removeprefix("--config.") for f in fields]


COMMANDS = sorted(
    {
        (page, *parts[:2], tuple(parts[2]))
        for page, words in commands()
        if (parts := split_command(words))
    },
    key=repr,
)


# The test that runs it, on little; so that none breaks unseen. Benchmarks of whole runs
# are slow; everything else is run by default.
RUN_BY = {
    ("ibsgl_jax", "explain"): "test_cli.py::TestExplain::test_writes_everything",
    ("ibsgl_jax", "export"): "test_export.py::TestCommand::"
    "test_writes_the_function_and_what_it_needs",
    ("ibsgl_jax", "models"): "test_cli.py::TestModels::test_layers",
    ("train", None): "test_workdir.py::TestCommand::test_trains",
    ("train.compile", None): "test_compile.py::TestCommand::test_prints_the_table",
    ("train.evaluate", None): "test_evaluate.py::TestBadInput::"
    "test_the_command_compares_runs",
    ("train.prepare", None): "test_configs.py::TestPrepare::test_says_what_is_missing",
    ("train.scores", None): "test_scores.py::TestMain::"
    "test_prints_the_table_of_the_record",
    ("train.sweep", None): "test_sweep.py::TestMain::test_a_second_call_runs_nothing",
    ("train.teachers", None): "test_teachers.py::TestCommand::test_measures_once",
    ("tests.layers", None): "test_layers.py::test_the_code_keeps_the_rule",
    ("tests.test_devices", None): "test_devices.py::TestShares::test_four_devices",
    **{
        (f"benchmarks.{script}", None): f"test_benchmark_commands.py::test_{script}"
        for script in (
            "against_torch",
            "attribution",
            "folder",
            "fuzz",
            "growth",
            "imputation",
            "input",
            "originals",
            "pictures",
            "quality",
            "resilience",
            "step",
        )
    },
    ("benchmarks.reach", None): "test_benchmark_commands.py::test_of_a_run",
    ("benchmarks.beside", None): "test_benchmark_commands.py::test_of_a_run",
}


def find_test(address):
    """The syntax of a test and of what stands around it."""
    file, *path = address.split("::")
    found = [ast.parse((ROOT / "tests" / file).read_text())]
    for part in path:
        found.append(next(n for n in found[-1].body if getattr(n, "name", "") == part))
    return found


class TestCommands:
    def test_each_is_run_by_a_test(self):
        documented = {command[1:3] for command in COMMANDS}
        assert documented == RUN_BY.keys()
        for (module, _), address in RUN_BY.items():
            nodes = find_test(address)
            for node in () if module.startswith("benchmarks.") else nodes:
                marks = map(ast.unparse, getattr(node, "decorator_list", ()))
                assert not any("slow" in mark for mark in marks), address

    def test_are_found(self):
        modules = {module for _, module, _, _ in COMMANDS}
        assert {"train", "train.evaluate", "train.sweep", "ibsgl_jax"} <= modules
        assert len(COMMANDS) > 40

    @pytest.mark.parametrize(
        "module, subcommand", sorted({c[1:3] for c in COMMANDS}, key=repr)
    )
    def test_flags_exist(self, module, subcommand):
        used = {
            (page, word.partition("=")[0])
            for page, m, s, words in COMMANDS
            if (m, s) == (module, subcommand)
            for word in words
            if re.match(r"--[a-z]", word) and not word.startswith("--config.")
        }
        text = help_of(module, subcommand) if used else ""
        for page, flag in used:
            known = rf"--(\[no\])?{flag[2:]}\b"
            assert re.search(known, text), f"{page}: {module} has no {flag}"

    def test_fields_and_files_exist(self):
        for page, module, _, words in COMMANDS:
            if module in ("train", "train.compile"):
                config, fields = config_fields(page, words)
                for field in fields:
                    part = config
                    for key in field.split("."):
                        assert key in part, f"{page}: no field {field}"
                        part = part[key]
            for word in words:
                for file in re.findall(r"configs/[a-z0-9_/]+\.py", word):
                    assert (ROOT / file).is_file(), f"{page}: {file}"
