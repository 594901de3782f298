"""The house's conventions, checked by reflection."""

import ast
import importlib
import inspect
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import ibsgl_jax

ROOT = pathlib.Path(ibsgl_jax.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "ibsgl_jax.")
    if not module.name.endswith("__main__")
)
CORE = ("saliency", "losses", "bottleneck", "guidance", "feature_stats")

# Arrays that may be left out keep their place behind the other arrays; everything
# else with a default is an option and keyword-only.
OPTIONAL_ARRAYS = {
    ("feature_stats", "update"): {"mask"},
    ("feature_stats", "update_moving"): {"mask"},
    ("losses", "saliency_suppression"): {"mask"},
    ("bottleneck", "capacity"): {"active"},
}

HEAVY = (
    "PIL",
    "grain",
    "h5py",
    "matplotlib",
    "ml_collections",
    "orbax",
    "safetensors",
    "skimage",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
)
# ml_dtypes comes with jax itself.
LIGHT = {"chex", "flax", "ibsgl_jax", "jax", "ml_dtypes", "numpy", "optax"}


def public_functions(module_name):
    module = importlib.import_module(module_name)
    return [
        (name, member)
        for name, member in vars(module).items()
        if inspect.isfunction(member)
        and member.__module__ == module_name
        and not name.startswith("_")
    ]


FUNCTIONS = [
    pytest.param(function, id=f"{module.removeprefix('ibsgl_jax.')}.{name}")
    for module in MODULES
    for name, function in public_functions(module)
]
CORE_FUNCTIONS = [
    pytest.param(module, name, function, id=f"{module}.{name}")
    for module in CORE
    for name, function in public_functions(f"ibsgl_jax.{module}")
]


def imports_of(tree):
    """The top-level packages that the statements of a tree import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module.split(".")[0]


def sources():
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in ROOT.rglob("*.py")]


def test_every_core_module_is_covered():
    assert {f"ibsgl_jax.{name}" for name in CORE} <= set(MODULES)
    assert len(CORE_FUNCTIONS) > 15


@pytest.mark.parametrize("function", FUNCTIONS)
class TestEveryPublicFunction:
    def test_has_a_docstring(self, function):
        assert function.__doc__ and not function.__doc__.strip()[0].islower()

    def test_calls_randomness_key_and_takes_it_first_or_by_name(self, function):
        parameters = inspect.signature(function).parameters
        assert not {"rng", "rngs", "prng", "prng_key", "rng_key"} & set(parameters)
        if (
            "key" in parameters
            and parameters["key"].kind != inspect.Parameter.KEYWORD_ONLY
        ):
            assert next(iter(parameters)) == "key"


@pytest.mark.parametrize(("module", "name", "function"), CORE_FUNCTIONS)
def test_options_of_the_core_are_keyword_only(module, name, function):
    allowed = OPTIONAL_ARRAYS.get((module, name), set())
    positional_options = {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty
        and parameter.kind is not parameter.KEYWORD_ONLY
    }
    assert positional_options == allowed


@pytest.mark.parametrize("name", sorted(ibsgl_jax.__all__))
def test_exports_exist(name):
    assert hasattr(ibsgl_jax, name)


def test_importing_the_library_is_light():
    code = (
        "import sys; from ibsgl_jax import *; "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    loaded = set(result.stdout.split())
    assert "jax" in loaded
    assert not loaded & {*HEAVY, "train", "configs"}


@pytest.mark.parametrize("path", sources())
class TestEverySource:
    def test_never_imports_the_trainer(self, path):
        tree = ast.parse(path.read_text())
        assert not {"train", "configs", "tests", "benchmarks"} & set(imports_of(tree))

    def test_imports_heavy_packages_only_inside_functions(self, path):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.Pass()]
        heavy = set(imports_of(tree)) - LIGHT - set(sys.stdlib_module_names)
        assert not heavy

    def test_says_what_it_is_for(self, path):
        assert ast.get_docstring(ast.parse(path.read_text()))
