"""``ibsgl`` with a small network of random weights, for the tests of its commands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibsgl_jax import models, pretrained
from ibsgl_jax.app import classifier, cli

PREPROCESSING = pretrained.Preprocessing(48, 54, (0.5,) * 3, (0.25,) * 3)
CLASS_NAMES = [f"{colour} thing" for colour in "red green blue white".split()]
CLASS_NAMES += ["black cat", "tabby cat"]


@pytest.fixture(scope="module", name="loaded")
def loaded_fixture():
    model = models.ResNet(
        stage_sizes=(1, 1),
        block=models.BasicBlock,
        num_filters=8,
        num_classes=6,
        stem=(5, 3, 1),
    )
    image = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
    draws = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.float32(draws.normal(size=leaf.shape) / 4)
            + ("var" in jax.tree_util.keystr(path)) * 2
        ),
        jax.eval_shape(model.init, jax.random.key(0), image),
    )
    return classifier.Classifier(
        "tiny_resnet", model, variables, CLASS_NAMES, PREPROCESSING, None
    )


@pytest.fixture(name="run")
def run_fixture(loaded, monkeypatch, capsys, tmp_path):
    """run(*arguments) -> (status, stdout, stderr), with the small model."""
    monkeypatch.setattr(classifier, "load", lambda *names, **files: loaded)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


@pytest.fixture(name="photos")
def photos_fixture(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i, size in enumerate([(60, 50), (80, 200), (48, 48)]):
        pixels = draws.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo{i}.png")
    return folder
