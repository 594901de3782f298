"""The drawing of the house holds: no import upward, no circle, no room too large."""

import pytest

from tests import layers

RULES = {
    layers.arrows_upward: set(),
    layers.circles: set(),
    layers.trainer_in_library: set(),
    layers.impure_mathematics: set(),
    layers.imports_inside_functions: set(),
    layers.long_functions: set(),
    layers.long_files: set(),
    layers.pmap_elsewhere: set(),
    layers.mocks: set(),
    layers.tables_elsewhere: set(),
    layers.platforms_asked: set(),
}


@pytest.fixture(scope="module")
def tree():
    return layers.Tree()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(tree, rule):
    assert sorted(set(rule(tree)) - RULES[rule]) == []


def test_the_tree_is_the_code(tree):
    assert {"train.run.loop", "ibsgl_jax.bottleneck", "configs.default"} <= set(
        tree.modules
    )
    rooms = {layers.room_and_floor(module)[0] for module in tree.modules}
    assert {room for floor in layers.FLOORS for room in floor} <= rooms


# One planted fault per rule, and beside it what is allowed.
FAULTS = {
    layers.arrows_upward: (
        {
            "train/data/a.py": "def f():\n    from train.measure import b",
            "train/measure/b.py": "from train.data import c\nfrom train import errors",
            "train/data/c.py": "from train.data.d import name",
            "train/data/d.py": "",
            "train/errors.py": "",
        },
        ["train.data.a imports train.measure.b, which is not below it"],
    ),
    layers.circles: (
        {
            "train/run/a.py": "from train.run import b",
            "train/run/b.py": "import train.run.c",
            "train/run/c.py": "def f():\n    from train.run.a import name",
            "train/run/d.py": "from train.run import a",
        },
        ["a circle of train.run.a, train.run.b, train.run.c"],
    ),
    layers.trainer_in_library: (
        {
            "ibsgl_jax/a.py": "import jax",
            "ibsgl_jax/app/b.py": "def f():\n    from configs.x import name",
            "configs/x.py": "",
        },
        ["ibsgl_jax.app.b imports configs.x"],
    ),
    layers.impure_mathematics: (
        {
            "ibsgl_jax/losses.py": "import math\nimport jax\nfrom PIL import Image",
            "ibsgl_jax/models/a.py": "from ibsgl_jax import app, losses",
            "ibsgl_jax/app/__init__.py": "import PIL",
        },
        [
            "ibsgl_jax.losses imports PIL.Image",
            "ibsgl_jax.models.a imports ibsgl_jax.app",
        ],
    ),
    layers.imports_inside_functions: (
        {
            "train/run/a.py": "class A:\n    def f(self):\n        import json",
            "train/run/b.py": "def f():\n    from PIL import Image\n\nimport json",
        },
        ["train.run.a imports json inside a function"],
    ),
    layers.long_functions: (
        {
            "train/a.py": "def f():\n" + "    x = 1\n" * 79,
            "train/b.py": "def g():\n" + "    x = 1\n" * 80,
        },
        ["train/b.py: g"],
    ),
    layers.long_files: (
        {
            "train/a.py": "x = 1\n" * 450,
            "train/b.py": "x = 1\n" * 451,
            "tests/test_a.py": "x = 1\n" * 450,
            "tests/test_b.py": "x = 1\n" * 451,
        },
        ["tests/test_b.py", "train/b.py"],
    ),
    layers.pmap_elsewhere: (
        {
            "train/devices.py": "import jax\njax.pmap(f)",
            "train/a.py": '"""pmap."""\nimport jax\njax.pmap(f)',
            "benchmarks/b.py": "from jax import pmap\npmap(f)",
            "train/c.py": '"""Not pmap."""',
        },
        ["benchmarks/b.py", "train/a.py"],
    ),
    layers.mocks: (
        {"train/a.py": "from unittest import mock", "train/b.py": "import json"},
        ["train/a.py"],
    ),
    layers.tables_elsewhere: (
        {
            "train/show/markdown.py": "rule = '|---|'",
            "benchmarks/a.py": "print('| a | b |')\nprint('|---|---|')",
            "train/b.py": "x = f'| --- | {y} |'",
            "train/c.py": "x = '---'",
        },
        ["benchmarks/a.py", "train/b.py"],
    ),
    layers.platforms_asked: (
        {
            "ibsgl_jax/a.py": "import jax\nx = jax.default_backend()",
            "ibsgl_jax/models/b.py": "import jax\ndef f():\n    jax.devices()",
            "ibsgl_jax/c.py": "import jax\njax.lax.platform_dependent(x, cpu=f)",
            "train/d.py": "import jax\njax.devices()",
        },
        ["ibsgl_jax/a.py", "ibsgl_jax/models/b.py"],
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_what_breaks_it(tmp_path, rule):
    files, expected = FAULTS[rule]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert sorted(rule(layers.Tree(tmp_path))) == expected
