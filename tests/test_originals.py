"""Transformers, ConvNeXt and Swin against the networks that they are copies of.

The files come from timm, torchvision and transformers: data/make_originals.py.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import originals
from ibsgl_jax import attribution, feature_stats, guidance, models, pretrained, tokens
from ibsgl_jax.bottleneck import BottleneckConfig

FOLDER = pathlib.Path(__file__).parent / "data" / "originals"
FILES = sorted(path.stem for path in FOLDER.glob("*.npz"))
TINY_VIT = {"width": 12, "depth": 2, "num_heads": 2, "patch_size": 8}
TINY_CONVNEXT = {"stage_widths": (4, 6, 8, 12), "stage_sizes": (1, 1, 2, 1)}
TINY_SWIN = {"stage_sizes": (2, 2, 2), "num_heads": (1, 2, 3), "width": 6, "window": 2}
TINY = {"convnext_tiny": TINY_CONVNEXT, "swin_tiny": TINY_SWIN}


def _quick(file):
    """The maps of one network are looked at by default: those with registers."""
    slow = file != "dinov2_small14_reg4.timm"
    return pytest.param(file, marks=pytest.mark.slow if slow else ())


@functools.cache
def original(file):
    """(model name, options, arrays, tensors) of a file."""
    name = file.split(".")[0]
    with np.load(FOLDER / f"{file}.npz") as stored:
        arrays = dict(stored)
    tensors = {
        key.removeprefix("tensors/"): value
        for key, value in arrays.items()
        if key.startswith("tensors/")
    }
    return name, TINY.get(name, TINY_VIT), arrays, tensors


def fill(file, **options):
    name, tiny, _, tensors = original(file)
    return pretrained.fill(name, tensors, **tiny, **options)


def test_all_sources_are_there():
    assert len(FILES) == 11
    assert original("swin_tiny.torchvision")[2]["images"].shape[1:3] == (36, 44)


@pytest.mark.parametrize("file", FILES)
def test_logits_are_the_originals(file):
    _, _, arrays, _ = original(file)
    model, variables = fill(file)
    assert model.num_classes == 5
    logits = jax.jit(model.apply)(variables, arrays["images"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=1e-4)
    halves = (
        models.make_features_fn(model, variables),
        models.make_head_fn(model, variables),
    )
    again = jax.jit(lambda f, h, x: h(f(x)))(*halves, arrays["images"])
    np.testing.assert_allclose(again, logits, atol=1e-5)


@pytest.mark.parametrize("file", [_quick(file) for file in FILES])
def test_maps_are_the_originals(file):
    """Of class 1, by PyTorch's autograd through the original."""
    _, _, arrays, _ = original(file)
    model, variables = fill(file)
    head_fn = models.make_head_fn(model, variables)
    features_fn = models.make_features_fn(model, variables)
    classes = jnp.ones(2, jnp.int32)

    @jax.jit
    def maps(images):
        features = features_fn(images)
        logits_fn = lambda x: head_fn(features_fn(x))  # noqa: E731
        found = {
            method: attribution.METHODS[method](head_fn, features, classes)
            for method in ("hirescam", "grad_cam", "layer_cam")
        }
        found["gradient"] = attribution.gradient(logits_fn, images, classes)
        found["integrated_gradients"] = attribution.integrated_gradients(
            logits_fn, images, classes, num_steps=3, rule="riemann_middle"
        )
        return found

    for method, values in maps(jnp.asarray(arrays["images"])).items():
        expected = arrays[method]
        np.testing.assert_allclose(
            values, expected, rtol=1e-3, atol=1e-4 * abs(expected).max(), err_msg=method
        )


def test_positions_are_interpolated_as_by_the_original():
    _, _, arrays, _ = original("dinov2_small14_reg4.hugging_face")
    model, variables = fill("dinov2_small14_reg4.hugging_face", image_size=48)
    assert model.token_layout == ((6, 6), 5)
    logits = jax.jit(model.apply)(variables, arrays["large"])
    np.testing.assert_allclose(logits, arrays["large_logits"], atol=1e-4, rtol=1e-4)


def test_swins_head_is_linear_in_a_map_of_cells_rounded_up():
    _, _, arrays, _ = original("swin_tiny.torchvision")
    model, variables = fill("swin_tiny.torchvision")
    assert isinstance(models.make_head_fn(model, variables), models.PooledLinear)
    features_fn = models.make_features_fn(model, variables)
    features = jax.eval_shape(features_fn, arrays["images"])
    assert features.shape == (2, 3, 3, 24) and model.signed_features


@pytest.mark.slow
def test_other_methods_explain_a_transformer():
    _, _, arrays, _ = original("dinov2_small14_reg4.hugging_face")
    model, variables = fill("dinov2_small14_reg4.hugging_face")
    features_fn = models.make_features_fn(model, variables)
    head_fn = models.make_head_fn(model, variables)
    assert isinstance(head_fn, tokens.TokenHead)
    images = jnp.asarray(arrays["images"])
    features = jax.jit(features_fn)(images)
    assert features.shape == (2, 5 + 16, 12) and float(features.min()) < 0
    moments = feature_stats.moments(
        feature_stats.update(feature_stats.init(features.shape[1:]), features)
    )
    options = {
        "ib": {"config": BottleneckConfig(num_steps=2, num_samples=2)},
        "smooth_grad": {"num_samples": 2},
    }
    classes = jnp.array([1, 3])
    maps_fn = {
        method: attribution.make_attribution_fn(
            method,
            features_fn,
            head_fn,
            key=jax.random.key(0),
            moments=moments,
            **options.get(method, {}),
        )
        for method in ("ib", "grad_cam_pp", "random", "smooth_grad")
    }
    found = jax.jit(lambda x: {m: fn(x, classes) for m, fn in maps_fn.items()})(images)
    for method, maps in found.items():
        assert maps.shape == (2, 32, 32) and jnp.isfinite(maps).all(), method
        assert float(jnp.abs(maps).max()) > 0, method


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "dtype"),
    [
        ("vit_small16.timm", jnp.bfloat16),
        ("convnext_tiny.timm", jnp.float16),
        ("swin_tiny.torchvision", jnp.bfloat16),
    ],
)
def test_half_precision(file, dtype):
    _, _, arrays, _ = original(file)
    model, variables = fill(file, dtype=dtype)
    images, labels = jnp.asarray(arrays["images"]), jnp.array([0, 4])
    head_fn = models.make_head_fn(model, variables)

    @jax.jit
    def guided(images):
        features = models.make_features_fn(model, variables)(images)
        config = guidance.GuidanceConfig(rectify_features=False)
        size = tokens.map_size(head_fn, features)
        teacher = jnp.ones((2, *size))
        found = guidance.guide(
            None, head_fn, features, labels, None, config=config, teacher=teacher
        )
        return features, found

    features, found = guided(images)
    assert features.dtype == dtype and found.logits.dtype == jnp.float32
    np.testing.assert_allclose(found.logits, arrays["logits"], atol=0.1, rtol=0.05)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in found)


class TestMismatches:
    def tensors(self, **changes):
        _, _, _, tensors = original("vit_small16.timm")
        return {k: v for k, v in (tensors | changes).items() if v is not None}

    def error(self, **changes):
        with pytest.raises(ValueError) as info:
            pretrained.fill("vit_small16", self.tensors(**changes), **TINY_VIT)
        assert "\n" not in str(info.value)
        return str(info.value)

    def test_all_come_at_once(self):
        message = self.error(
            **{
                "norm.bias": None,
                "extra": np.zeros(3),
                "blocks.0.mlp.fc1.weight": np.zeros((3, 4)),
                "blocks.1.mlp.fc1.bias": np.full(48, np.nan),
            }
        )
        for part in (
            "no tensor for 'norm/bias'",
            "no place for 'extra'",
            "'blocks.0.mlp.fc1.weight' has shape (3, 4), not one for (12, 48)",
            "'blocks.1.mlp.fc1.bias' holds NaN",
            "not weights of vit_small16",
        ):
            assert part in message

    def test_many_are_counted(self):
        message = self.error(**{f"extra{i}": np.zeros(1) for i in range(9)})
        assert "'extra3' and 5 more" in message

    def test_positions_that_are_no_square(self):
        message = self.error(pos_embed=np.zeros((1, 12, 12), np.float32))
        assert "11 positions are no square grid" in message

    def test_another_depth(self):
        name, tiny, _, tensors = original("vit_small16.timm")
        with pytest.raises(ValueError, match="no place for 'blocks.1.norm1.weight'"):
            pretrained.fill(name, tensors, **tiny | {"depth": 1})

    def test_a_prefix_is_dropped(self, caplog):
        name, tiny, arrays, tensors = original("vit_small16.timm")
        prefixed = {f"module.{key}": value for key, value in tensors.items()}
        model, variables = pretrained.fill(name, prefixed, **tiny)
        logits = jax.jit(model.apply)(variables, arrays["images"])
        np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=1e-4)
        assert "drops the prefix 'module.'" in caplog.text

    def test_the_authors_names_of_convnext(self):
        """timm's file under the names of facebookresearch/ConvNeXt."""
        name, tiny, arrays, tensors = original("convnext_tiny.timm")
        replaced = (
            ("head.fc", "head"),
            ("head.norm", "norm"),
            ("stem", "downsample_layers.0"),
            (".blocks", ""),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
        )
        renamed = {}
        for key, value in tensors.items():
            for old, new in replaced:
                key = key.replace(old, new)
            if "downsample." in key:
                stage, rest = key.removeprefix("stages.").split(".downsample.")
                key = f"downsample_layers.{stage}.{rest}"
            renamed[key] = value
        model, variables = pretrained.fill(name, renamed, **tiny)
        logits = jax.jit(model.apply)(variables, arrays["images"])
        np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=1e-4)

    def test_the_authors_names_of_swin(self):
        """timm's file under the names of microsoft/Swin-Transformer."""
        name, tiny, arrays, tensors = original("swin_tiny.timm")
        renamed = {"layers.0.blocks.1.attn_mask": np.zeros((4, 4, 4))}
        renamed["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4))
        for key, value in tensors.items():
            key = key.replace("head.fc", "head")
            for stage in (1, 2):  # a merge belongs to the stage before it
                new = f"layers.{stage - 1}.downsample"
                key = key.replace(f"layers.{stage}.downsample", new)
            renamed[key] = value
        model, variables = pretrained.fill(name, renamed, **tiny)
        logits = jax.jit(model.apply)(variables, arrays["images"])
        np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4, rtol=1e-4)


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "millions", "layout"),
        [
            ("vit_small16", 22.1, ((14, 14), 1)),
            ("deit_base16", 86.6, ((14, 14), 1)),
            ("dinov2_small14_reg4", 22.4, ((16, 16), 5)),
            ("convnext_tiny", 28.6, None),
            ("convnext_small", 50.2, None),
            ("swin_tiny", 28.3, None),
            ("swin_small", 49.6, None),
            ("efficientnet_lite1", 5.4, None),
            ("efficientnet_lite2", 6.1, None),
        ],
    )
    def test_parameters(self, name, millions, layout):
        model = models.create(name, num_classes=1000)
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        assert count / 1e6 == pytest.approx(millions, abs=0.3)
        assert getattr(model, "token_layout", None) == layout

    @pytest.mark.slow
    def test_images_that_are_not_square(self):
        model = models.create(
            "small_vit", num_classes=3, image_size=(16, 24), depth=2, width=8
        )
        images = jnp.ones((2, 16, 24, 3))
        variables = jax.jit(model.init)(jax.random.key(0), images)
        maps = attribution.attribute(
            "hirescam",
            models.make_features_fn(model, variables),
            models.make_head_fn(model, variables),
            images,
        )
        assert model.token_layout.grid == (4, 6) and maps.shape == (2, 16, 24)
        with pytest.raises(ValueError, match="images are 24 x 16, the model takes 16"):
            model.apply(variables, jnp.ones((2, 24, 16, 3)))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"pool": "cls"}, "pool='cls': choose one of"),
            ({"image_size": 3}, "image_size=3: smaller than a patch of 4"),
        ],
    )
    def test_options_that_cannot_be(self, options, words):
        model = models.create("small_vit", num_classes=3, **options)
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 48, 48, 3)))


@pytest.mark.slow
def test_the_benchmark_makes_a_row():
    name, source, *cells = originals.compare(
        FOLDER / "vit_small16.timm.npz", **TINY_VIT
    )
    assert (name, source, len(cells)) == ("vit_small16", "timm", 6)
    assert all(float(cell) < 1e-3 for cell in cells)
