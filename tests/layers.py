"""The layers of the code, read from its imports: python -m tests.layers [FOLDER].

Every rule is a function of a ``Tree`` that gives one line per fault; ``test_layers``
asks that there are none. As a command it prints the counts.
"""

import ast
import functools
import pathlib
import re
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("ibsgl_jax", "train", "configs", "benchmarks")

# Rooms of train/ from the ground up: an import goes down, or stays in its room. Every
# other file of train/ is a command, on the top floor.
FLOORS = (
    ("errors", "memory"),
    ("files",),
    ("configuration", "command", "arguments"),
    ("devices", "programs"),
    ("data",),
    ("method",),
    ("measure", "tpu"),
    ("show",),
    ("run",),
)
# Rooms of the library that do nothing but mathematics, and what they may import.
MATHEMATICAL = {
    "adam",
    "attribution",
    "blur",
    "bootstrap",
    "bottleneck",
    "bottleneck_config",
    "boxes",
    "cams",
    "chunks",
    "convolutions",
    "feature_stats",
    "full_grad",
    "gradients",
    "guidance",
    "imputation",
    "keys",
    "localization",
    "losses",
    "map_measures",
    "metrics",
    "models",
    "perturbation",
    "predictions",
    "saliency",
    "tapping",
    "taps",
    "targets",
    "tokens",
}
NUMERICAL = {"jax", "flax", "optax", "chex", "numpy"}
# Optional or slow to import: these may be imported inside a function. Of flax, linen
# and nnx are meant, of which a user has one.
OPTIONAL = {
    "PIL",
    "cloudpickle",
    "flatbuffers",
    "flax",
    "grain",
    "h5py",
    "imagehash",
    "jax2onnx",
    "jinja2",
    "matplotlib",
    "mlflow",
    "orbax",
    "pandas",
    "safetensors",
    "scipy",
    "skimage",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "wandb",
}
MOST_LINES = {"function": 80, "file": 450}


class Import(NamedTuple):
    """``module`` is imported by ``importer``, inside a function or not."""

    importer: str
    module: str
    inside: bool


class Tree:
    """The Python files of some packages below a folder; the texts of their tests."""

    def __init__(self, root=ROOT, packages=PACKAGES):
        paths = [p for name in packages for p in (root / name).rglob("*.py")]
        self.texts = {str(p.relative_to(root)): p.read_text() for p in sorted(paths)}
        self.parsed = {path: ast.parse(text) for path, text in self.texts.items()}
        self.modules = {_module(path): path for path in self.texts}
        paths = sorted((root / "tests").glob("*.py"))
        self.tests = {str(p.relative_to(root)): p.read_text() for p in paths}

    @functools.cached_property
    def imports(self) -> list[Import]:
        """All of them; names from a package are its modules where it has such ones."""
        return [
            Import(module, name, inside)
            for module, path in self.modules.items()
            for node, inside in _nodes(self.parsed[path])
            for name in self._imported(node)
        ]

    def _imported(self, node):
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        ours = [name if name in self.modules else node.module for name in full]
        # Of others, what is a module is not known: unittest.mock may be either.
        return ours if node.module.split(".")[0] in PACKAGES else full

    def functions(self):
        """(path, name, number of lines) of every function."""
        for path, tree in self.parsed.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, node.name, node.end_lineno - node.lineno + 1


def _module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _nodes(tree):
    """Every node, and whether it lies inside a function."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    return [(node, id(node) in inner) for node in ast.walk(tree)]


def room_and_floor(module: str):
    """(room, floor) of a module of train/; (None, None) for any other."""
    package, _, rest = module.partition(".")
    if package != "train" or not rest:
        return None, None
    room = rest.split(".")[0]
    for floor, rooms in enumerate(FLOORS):
        if room in rooms:
            return room, floor
    return room, len(FLOORS)


def arrows_upward(tree: Tree) -> list[str]:
    """Imports from one room of train/ of another that is not below it."""
    faults = []
    for importer, module, _ in tree.imports:
        (room, floor), (other, below) = map(room_and_floor, (importer, module))
        if room and other and room != other and below >= floor:
            faults.append(f"{importer} imports {module}, which is not below it")
    return faults


def circles(tree: Tree) -> list[str]:
    """Modules that import each other, over others or not; one line a circle."""
    reached = {}
    edges = {module: set() for module in tree.modules}
    for importer, module, _ in tree.imports:
        if module in edges and module != importer:
            edges[importer].add(module)
    for module in edges:
        seen, waiting = set(), [module]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[module] = seen
    found = {
        frozenset(m for m in seen if module in reached[m])
        for module, seen in reached.items()
        if module in seen
    }
    return [f"a circle of {', '.join(sorted(circle))}" for circle in found]


def trainer_in_library(tree: Tree) -> list[str]:
    """Imports of the programs from the library."""
    return [
        f"{importer} imports {module}"
        for importer, module, _ in tree.imports
        if importer.split(".")[0] == "ibsgl_jax"
        and module.split(".")[0] in ("train", "configs", "benchmarks", "tests")
    ]


def impure_mathematics(tree: Tree) -> list[str]:
    """Imports of a mathematical room that are neither numerical nor mathematical."""

    def is_mathematical(module):
        package, _, rest = module.partition(".")
        return package == "ibsgl_jax" and rest.split(".")[0] in MATHEMATICAL

    allowed = NUMERICAL | set(sys.stdlib_module_names)
    return [
        f"{importer} imports {module}"
        for importer, module, _ in tree.imports
        if is_mathematical(importer)
        and not is_mathematical(module)
        and module.split(".")[0] not in allowed
    ]


def imports_inside_functions(tree: Tree) -> list[str]:
    """Those of packages that are neither optional nor slow to import."""
    return [
        f"{importer} imports {module} inside a function"
        for importer, module, inside in tree.imports
        if inside and module.split(".")[0] not in OPTIONAL
    ]


def long_functions(tree: Tree) -> list[str]:
    """Over 80 lines, as "path: name"."""
    most = MOST_LINES["function"]
    return [f"{path}: {name}" for path, name, size in tree.functions() if size > most]


def long_files(tree: Tree) -> list[str]:
    """Over 450 lines, as paths; tests are held to it too."""
    most, texts = MOST_LINES["file"], tree.texts | tree.tests
    return [path for path, text in texts.items() if len(text.splitlines()) > most]


def pmap_elsewhere(tree: Tree) -> list[str]:
    """Files other than train/devices.py that map over devices by themselves."""
    return [
        path
        for path, parsed in tree.parsed.items()
        if path != "train/devices.py"
        and any(
            "pmap" in (getattr(node, "attr", None), getattr(node, "id", None))
            for node in ast.walk(parsed)
        )
    ]


def mocks(tree: Tree) -> list[str]:
    """Files that use unittest.mock."""
    return [
        tree.modules[importer]
        for importer, module, _ in tree.imports
        if module.startswith("unittest")
    ]


def tables_elsewhere(tree: Tree) -> list[str]:
    """Files other than train/show/markdown.py that rule a table in Markdown."""
    return [
        path
        for path, parsed in tree.parsed.items()
        if path != "train/show/markdown.py"
        and any(
            isinstance(node, ast.Constant) and re.search(r"\| ?---", str(node.value))
            for node in ast.walk(parsed)
        )
    ]


def platforms_asked(tree: Tree) -> list[str]:
    """Files of the library that ask the process for its platform or its devices."""
    asking = {"default_backend", "devices", "local_devices", "device_count"}
    return [
        path
        for path, parsed in tree.parsed.items()
        if path.startswith("ibsgl_jax/")
        and any(
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("jax", name) for name in asking}
            for node in ast.walk(parsed)
        )
    ]


def counts(tree: Tree) -> dict:
    """What the command prints."""
    sizes = {path: len(text.splitlines()) for path, text in tree.texts.items()}
    path, name, size = max(tree.functions(), key=lambda row: row[2])
    longest = max(sizes, key=sizes.get)
    return {
        "files": len(sizes),
        "lines": sum(sizes.values()),
        "longest file": f"{longest} ({sizes[longest]})",
        "files over 450 lines": len(long_files(tree)),
        "longest function": f"{path}: {name} ({size})",
        "functions over 80 lines": len(long_functions(tree)),
        "imports inside functions": sum(row.inside for row in tree.imports),
        "of them neither optional nor heavy": len(imports_inside_functions(tree)),
        "arrows upward": len(arrows_upward(tree)),
        "circles": len(circles(tree)),
        "files with pmap beside train/devices.py": len(pmap_elsewhere(tree)),
        "files with unittest.mock": len(mocks(tree)),
        "files that write tables beside train/show/markdown.py": len(
            tables_elsewhere(tree)
        ),
        "files of the library that ask for the platform": len(platforms_asked(tree)),
    }


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for title, value in counts(Tree(folder)).items():
        print(f"{title}: {value}")
