"""ONNX files: the same maps in onnxruntime, whatever the batch size."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax

from ibsgl_jax import attribution, export, models, onnx_files, pretrained
from tests.tiny_classifier import loaded_fixture, run_fixture  # noqa: F401


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else [value]:
                if hasattr(inner, "jaxpr"):
                    yield from primitives(inner.jaxpr)


def strided(images):
    kernel = jnp.cos(jnp.arange(3 * 3 * 2 * 4.0)).reshape(3, 3, 2, 4)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        images, kernel, (2, 2), "SAME", dimension_numbers=numbers
    )


def pooled(images):
    window = (1, 3, 3, 1), (1, 2, 2, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, *window, "SAME")


def slope(fn):
    return jax.grad(lambda images: jnp.sum(jnp.sin(fn(images))))


def running(images):
    def step(total, row):
        return total + row, total * row

    total, rows = lax.scan(step, jnp.zeros_like(images[:, 0]), images.swapaxes(0, 1))
    return total + jnp.sum(rows, axis=0)


def chosen(images):
    return lax.platform_dependent(images, cpu=jnp.sin, default=jnp.sin)


FUNCTIONS = {
    "gaps": lambda x: lax.pad(x, 2.0, [(0, 0, 0), (1, 2, 2), (-1, -2, 1), (0, 0, 0)]),
    "strided": strided,
    "strided's gradient": slope(strided),
    "pooled": pooled,
    "pooled's gradient": slope(pooled),
    "scan": running,
    "scan's gradient": slope(running),
    "map": lambda images: lax.map(jnp.sin, images),
    "platforms": chosen,
    "platforms in a loop": lambda images: lax.map(chosen, images),
    "relu": jax.nn.relu,
    "remat": slope(jax.checkpoint(strided)),
}


class TestElementary:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_computes_the_same(self, name):
        images = jax.random.normal(jax.random.key(0), (2, 7, 8, 2))

        def fn(images):
            return (FUNCTIONS[name](images),)

        elementary_fn = onnx_files.elementary(fn, images)
        (expected,), (result,) = jax.jit(fn)(images), jax.jit(elementary_fn)(images)
        # Sums of products in another order.
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        left = set(primitives(jax.make_jaxpr(elementary_fn)(images).jaxpr))
        replaced = {"platform_index", "scan", "empty2", "select_and_scatter_add", "pad"}
        assert not left & (replaced | {"checkpoint", "custom_jvp_call"})


def deviations(model, variables, method, size):
    """Of onnxruntime's maps and logits, for 1 and 3 images, of their maximum."""
    features_fn = models.make_features_fn(model, variables)
    head_fn = models.make_head_fn(model, variables)
    functions = (
        attribution.make_attribution_fn(method, features_fn, head_fn),
        lambda images: head_fn(features_fn(images)),
    )
    blob = onnx_files.export_onnx(*functions, image_shape=(size, size, 3))
    session = onnxruntime.InferenceSession(blob)
    explain_fn = jax.jit(export.make_explain_fn(*functions))
    draws = np.random.default_rng(0)
    images = draws.normal(size=(3, size, size, 3)).astype(np.float32)
    classes = np.array([-1, 2, -1], np.int32)
    for n in (1, 3):
        given = {"images": images[:n], "classes": classes[:n]}
        results = session.run(["maps", "logits"], given)
        for result, expected in zip(results, explain_fn(**given), strict=True):
            assert result.shape == expected.shape
            yield np.max(np.abs(result - expected)) / np.max(np.abs(expected))


def network(name):
    if name != "pooled":
        return models.create(name, num_classes=10)
    return models.ResNet((1,), models.BasicBlock, num_filters=8, num_classes=10)


METHODS = ("hirescam", "grad_cam", "integrated_gradients")


class TestExport:
    @pytest.mark.parametrize(
        ("name", "size", "method"),
        [
            *(("small_resnet", 32, method) for method in METHODS),
            ("pooled", 32, "integrated_gradients"),
            *(
                pytest.param("small_vit", 48, method, marks=pytest.mark.slow)
                for method in METHODS
            ),
        ],
    )
    def test_maps_are_equal(self, name, size, method):
        model = network(name)
        image = np.zeros((1, size, size, 3), np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), image)
        assert max(deviations(model, variables, method, size)) < 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize("method", METHODS)
    def test_a_pretrained_network(self, method, optimized):
        name = "efficientnet_lite0"
        model, variables = pretrained.load(name)
        # Noise of 1e-7 on the image moves integrated gradients by 1.5e-3 of their
        # maximum, in jax alone; here they deviate by 7e-4, and by 3e-3 without the
        # passes that users' programs have.
        limit = 3e-3 if method == "integrated_gradients" else 1e-4
        assert max(deviations(model, variables, method, 64)) < limit


class TestCommand:
    def test_writes_a_model_and_what_it_needs(
        self,
        run,
        tmp_path,
        monkeypatch,
    ):
        monkeypatch.chdir(tmp_path)
        status, stdout, _ = run("export", "--format=onnx", "--method=hirescam")
        assert status == 0 and "onnxruntime.InferenceSession" in stdout
        description = json.loads((tmp_path / "attribution.onnx.json").read_text())
        images = np.zeros((2, 48, 48, 3), np.float32)
        scope = {"images": images, "classes": np.array([-1, 5], np.int32)}
        exec("\n".join(description["run"]), scope)
        assert scope["maps"].shape == (2, 48, 48) and scope["logits"].shape == (2, 6)

    def test_names_what_stops_it(self, run, tmp_path):
        out = tmp_path / "a.onnx"
        status, stdout, stderr = run(
            *("export", "--format=onnx", "--method=random", "--out", out)
        )
        (line,) = stderr.splitlines()[-1:]
        assert status == 2 and "random has no ONNX form" in line and "random_" in line
        assert stdout == "" and not list(tmp_path.glob("a.onnx*"))
