"""README, docs and notebooks: what they show runs, what they link to is there."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ibsgl_jax
from ibsgl_jax import feature_stats
from ibsgl_jax.app import trainer
from train.run import loop

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "RESULTS.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "NOTES.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
MAX_README_LINES = 200


@pytest.fixture(scope="module", autouse=True)
def promotion_as_users_have_it():
    """Snippets and notebooks run without conftest's flags: a newcomer has set none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_NUMPY_RANK_PROMOTION")  # for the notebooks' kernels
        patch.delenv("JAX_NUMPY_DTYPE_PROMOTION")
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield


def name(path):
    return str(path.relative_to(ROOT))


def snippets(page):
    """The Python blocks of a page; those after a line ``<!-- slow -->`` are slow."""
    blocks = re.finditer(
        r"(<!-- slow -->\n)?```python\n(.*?)```", page.read_text(), flags=re.DOTALL
    )
    for index, block in enumerate(blocks):
        marks = [pytest.mark.slow] if block[1] else []
        yield pytest.param(block[2], id=f"{name(page)}-{index}", marks=marks)


@pytest.fixture(scope="module")
def own_loop():
    """The README's loss for a network of one dense layer and a dense head."""
    scope = {}
    exec(next(snippets(PAGES[0])).values[0], scope)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "conv": jax.random.normal(keys[0], (3, 6)),
        "head": jax.random.normal(keys[1], (6, 4)),
    }
    model = (
        lambda p, x: jax.nn.relu(x @ p["conv"]),
        lambda p, a: jnp.mean(a, axis=(1, 2)) @ p["head"],
    )
    batch = jax.random.normal(keys[3], (8, 5, 5, 3)), jnp.arange(8) % 4

    @functools.partial(jax.jit, static_argnames="only_right")
    def gradient_fn(step, only_right):
        return jax.grad(scope["task_and_guidance"], has_aux=True)(
            params,
            feature_stats.init((5, 5, 6)),
            keys[2],
            step,
            batch,
            model,
            only_right=only_right,
        )

    return gradient_fn


@pytest.fixture
def small_runs(monkeypatch):
    """A snippet that trains does so with a network of seconds, for one phase."""
    train = loop.train_and_evaluate

    def train_small(config, workdir, **options):
        config.model = "small_resnet"
        config.model_options.update(stage_sizes=(1,), stage_strides=(2,), num_filters=4)
        config.phases, config.picture_phases = ("plain",), ()
        config.plain.init, config.plain.num_epochs = "random", 1.0
        return train(config, workdir, **options)

    monkeypatch.setattr(loop, "train_and_evaluate", train_small)


@pytest.mark.usefixtures("small_runs")
class TestSnippets:
    @pytest.mark.parametrize("source", [s for page in PAGES for s in snippets(page)])
    def test_runs(self, source, request, tmp_path, monkeypatch):
        if "elpv_dataset" in source:  # 91 MB of photographs that no extra asks for
            pytest.importorskip("elpv_dataset")
        monkeypatch.chdir(tmp_path)
        exec(compile(source, request.node.callspec.id, "exec"), {})

    @pytest.mark.parametrize("page", PAGES, ids=name)
    def test_none_is_hidden(self, page):
        """What is only indented does not run here: nothing but an API page's import."""
        rest = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        hidden = re.findall(r"^ {4}(?:import|from) .*$", rest, flags=re.M)
        assert len(hidden) == (page.parent.name == "api")

    def test_own_loop_gives_finite_gradients(self, own_loop):
        gradient, stats = own_loop(100, only_right=False)
        assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient))
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
        assert stats.count == 8

    def test_own_loop_ramps_and_guides_right_predictions_only(self, own_loop):
        plain, half, full = (own_loop(step, True)[0]["conv"] for step in (0, 50, 100))
        everyone = own_loop(100, False)[0]["conv"]
        np.testing.assert_allclose(half - plain, (full - plain) / 2, atol=1e-5)
        assert jnp.linalg.norm(everyone - plain) > 1.1 * jnp.linalg.norm(full - plain)


def github_anchor(heading):
    """As GitHub names it; the site is configured to the same (mkdocs.yml)."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`|^ {4}.*?$", "", text, flags=re.DOTALL | re.M)


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=name)
    def test_targets_are_there(self, page):
        text = without_code(page.read_text())
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("https://", "http://")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.is_file(), f"{name(page)} links to {target}"
            assert file.is_relative_to(ROOT)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
                assert anchor in map(github_anchor, headings), f"{name(page)}: {target}"

    @pytest.mark.parametrize("page", PAGES, ids=name)
    def test_files_that_are_named_are_there(self, page):
        rooms = "ibsgl_jax|train|configs|benchmarks|tests|docs"
        for file in re.findall(rf"`((?:{rooms})/[^`\s*]*)`", page.read_text()):
            assert (ROOT / file).exists(), f"{name(page)}: {file}"

    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
    def test_notebooks_are_linked(self, notebook):
        assert f"docs/{notebook.name}" in (ROOT / "README.md").read_text()

    def test_every_page_is_on_the_site(self):
        listed = (ROOT / "mkdocs.yml").read_text()
        for page in (ROOT / "docs").rglob("*.md"):
            assert f" {page.relative_to(ROOT / 'docs')}\n" in listed + "\n", page


class TestReadme:
    def test_is_short(self):
        assert len(PAGES[0].read_text().splitlines()) <= MAX_README_LINES

    def test_your_own_photos_are_the_first_link(self):
        links = re.findall(r"\]\(([^)]+)\)", PAGES[0].read_text())
        assert links[0] == "docs/photos.md"


API = ROOT / "docs" / "api"
MODULES = {module.name for module in pkgutil.iter_modules(ibsgl_jax.__path__)}


class TestApi:
    def test_every_public_module_has_a_page(self):
        pages = {path.stem for path in API.glob("*.md")} - {"index"}
        assert pages == set(ibsgl_jax.__all__)

    @pytest.mark.parametrize("module", ibsgl_jax.__all__)
    def test_the_page_shows_it(self, module):
        text = (API / f"{module}.md").read_text()
        assert f"\n::: ibsgl_jax.{module}\n" in text
        assert f"from ibsgl_jax import {module}\n" in text
        assert f"[`ibsgl_jax.{module}`]({module}.md)" in (API / "index.md").read_text()

    @pytest.mark.parametrize(
        "module", sorted(MODULES - {*ibsgl_jax.__all__, "__main__"})
    )
    def test_any_other_is_said_to_be_none(self, module):
        assert f"`{module}`" in (API / "index.md").read_text()


def public_names(module):
    """The functions and classes that a module offers."""
    module = importlib.import_module(f"ibsgl_jax.{module}")
    for name in getattr(module, "__all__", vars(module)):
        member = getattr(module, name)
        is_own = getattr(member, "__module__", None) == module.__name__
        if name.startswith("_") or not (hasattr(module, "__all__") or is_own):
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            yield name


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


class TestNotebooks:
    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
    def test_outputs_are_stripped(self, notebook):
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None

    @pytest.mark.slow
    def test_explain_a_folder(self, tmp_path):
        shape = run_notebook("explain_a_folder.ipynb", "list(maps['ib'].shape)")
        assert shape == [4, 224, 224]

    @pytest.mark.slow
    def test_photos_in_a_notebook(self):
        notebook = execute_notebook(
            "photos_in_a_notebook.ipynb",
            "[table['accuracy'].to_dict(), sorted(set(frame['phase'])), "
            "[[float(m.max()), list(m.shape)] for m in maps.values()], "
            "[name for name in config.trackers]]",
        )
        value = json.loads(notebook.cells[-1].outputs[-1]["text"])
        accuracy, phases, maps, trackers = value
        assert set(accuracy) == {"plain", "guided"}
        assert min(accuracy.values()) > 0.7  # of two kinds, on 32 pictures
        assert phases == ["guided", "plain"]
        for most, shape in maps:
            assert most > 0 and shape == [1, 64, 64]
        there = (n for n in ("wandb", "mlflow") if importlib.util.find_spec(n))
        assert trackers == list(there)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        # The curve, the run's picture, and the explained photo are all seen.
        assert sum("image/png" in o.get("data", {}) for o in outputs) == 3

    @pytest.mark.slow
    def test_one_loss_in_your_loop(self):
        results = run_notebook(
            "one_loss_in_your_loop.ipynb",
            "{k: [float(x) for x in v] for k, v in results.items()}",
        )
        accuracy = {phase: values[0] for phase, values in results.items()}
        share = {phase: values[1] for phase, values in results.items()}
        assert accuracy["plain"] > 0.6  # ten classes
        assert accuracy["guided"] > accuracy["control"] - 0.03  # of 497 images
        assert share["guided"] > share["control"] + 0.01
        # The loss without its precautions, from random weights.
        assert accuracy["scratch, unsafe"] < 0.2 < accuracy["scratch, plain"]

    @pytest.fixture(autouse=True)
    def no_warnings_of_jupyter(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def run_notebook(file, expression):
    """Runs a notebook in a kernel of this environment; the value of an expression."""
    return json.loads(execute_notebook(file, expression).cells[-1].outputs[-1]["text"])


def execute_notebook(file, expression):
    """A notebook with its outputs, and a last cell that prints an expression."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(ROOT / "docs" / file, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))")
    )
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()
    return notebook


class TestSite:
    def test_builds_strictly(self, tmp_path):
        pytest.importorskip("mkdocs")
        result = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr
        for page in PAGES:
            place = page.relative_to(ROOT).as_posix().removeprefix("docs/")
            place = "index.md" if place == "README.md" else place
            html = (tmp_path / place).with_suffix(".html").read_text()
            for picture in re.findall(r'<img alt="[^"]*" src="([^"]*)"', html):
                assert (tmp_path / place).parent.joinpath(picture).is_file()
        for module in ibsgl_jax.__all__:
            html = (tmp_path / "api" / f"{module}.html").read_text()
            for shown in public_names(module):
                assert f'id="ibsgl_jax.{module}.{shown}"' in html
