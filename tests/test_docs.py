"""README, docs and the site: what they show runs, what they link to is there."""

import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ibsgl_jax
from ibsgl_jax import feature_stats
from tests.layers import ROOT
from tests.pages import (
    NOTEBOOKS,
    PAGES,
    name,
    promotion_as_users_have_it,  # noqa: F401
)
from train.run import loop

MAX_README_LINES = 200


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
    for name in getattr(module, "__all__", vars(module)):  # noqa: F402
        member = getattr(module, name)
        is_own = getattr(member, "__module__", None) == module.__name__
        if name.startswith("_") or not (hasattr(module, "__all__") or is_own):
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            yield name


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
