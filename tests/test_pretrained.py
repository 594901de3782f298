"""Weights into models: PyTorch's numbers, real ImageNet weights, and bad files."""

import functools
import io
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ibsgl_jax import imagenet_classes, models, pretrained, torch_files

FOLDER = Path(__file__).parent / "data" / "torch"

# What tests/data/make_torch_files.py built: file, model, attributes, images.
FILES = {
    "basic": (
        "basic_legacy.pth",
        "resnet18",
        dict(stage_sizes=(1, 2), num_filters=4),
        "small",
    ),
    "bottleneck": (
        "bottleneck.pth",
        "resnet50",
        dict(stage_sizes=(2, 1), num_filters=2),
        "small",
    ),
    "vgg": (
        "vgg.pth",
        "vgg16",
        dict(stage_widths=(2, 2, 3, 3, 2), dense_features=4),
        "large",
    ),
}


@functools.cache
def basic():
    file, name, options, _ = FILES["basic"]
    tensors = torch_files.read(FOLDER / file)
    return tensors, functools.partial(pretrained.fill, name, **options)


def leaves_equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


class TestLoad:
    @pytest.mark.parametrize("case", FILES)
    def test_same_logits_as_pytorch(self, case):
        file, name, options, size = FILES[case]
        golden = np.load(FOLDER / "logits.npz")
        model, variables = pretrained.load(name, FOLDER / file, **options)
        assert model.num_classes == 5
        images = golden[f"{size}_times_4"].astype(np.float32) / 4
        logits = jax.jit(model.apply)(variables, images)
        assert np.std(golden[case]) > 0.1
        # Float32 sums in another order.
        np.testing.assert_allclose(logits, golden[case], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
    def test_other_formats(self, suffix, tmp_path):
        tensors, fill = basic()
        path = tmp_path / f"weights{suffix}"
        tensors = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
        if suffix == ".npz":
            np.savez(path, **tensors)
        else:
            save_file(tensors, path)
        _, variables = pretrained.load("resnet18", path, **FILES["basic"][2])
        assert leaves_equal(variables, fill(tensors)[1])

    def test_bfloat16_safetensors(self, tmp_path):
        tensors, fill = basic()
        path = tmp_path / "weights.safetensors"
        tensors = {
            name: np.ascontiguousarray(t).astype(jnp.bfloat16)
            for name, t in tensors.items()
        }
        save_file(tensors, path)
        _, variables = pretrained.load("resnet18", path, **FILES["basic"][2])
        assert leaves_equal(variables, fill(tensors)[1])

    def test_no_installed_weights(self):
        with pytest.raises(
            ValueError, match="no weights of resnet50 .*: download http"
        ):
            pretrained.load("resnet50")

    def test_unknown_model(self):
        with pytest.raises(ValueError, match="'small_resnet'; there are some for resn"):
            pretrained.load("small_resnet")

    def test_missing_file(self, tmp_path):
        for suffix in (".pth", ".npz", ".safetensors"):
            with pytest.raises(FileNotFoundError, match="none"):
                pretrained.load("resnet18", tmp_path / f"none{suffix}")

    @pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".txt"])
    @pytest.mark.parametrize("contents", [b"", b"PK\3\4 no archive", b"text"])
    def test_broken_file_is_one_line(self, suffix, contents, tmp_path):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=f"broken{suffix}: ") as caught:
            pretrained.load("resnet18", path)
        assert "\n" not in str(caught.value)


class TestFill:
    def test_every_parameter_moves_with_its_tensor(self):
        tensors, fill = basic()
        _, variables = fill(tensors)
        _, moved = fill({name: t + 1 for name, t in tensors.items()})
        difference = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), moved, variables
        )
        for leaf in jax.tree.leaves(difference):
            np.testing.assert_allclose(leaf, 1.0, rtol=1e-6)
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))

    def test_missing_tensor(self):
        tensors, fill = basic()
        tensors = {n: t for n, t in tensors.items() if "layer2.1.bn1" not in n}
        with pytest.raises(
            ValueError, match=r"no tensor 'layer2.1.bn1.\w+' and 3 more"
        ):
            fill(tensors)

    def test_missing_head(self):
        tensors, fill = basic()
        tensors = {n: t for n, t in tensors.items() if not n.startswith("fc")}
        with pytest.raises(ValueError, match="no tensor 'fc.weight': not weights of"):
            fill(tensors)

    def test_unused_tensor(self):
        tensors, fill = basic()
        with pytest.raises(ValueError, match="no place for tensor 'layer9.weight'"):
            fill(tensors | {"layer9.weight": np.ones(3)})

    def test_wrong_shape(self):
        tensors, fill = basic()
        wrong = tensors | {"bn1.weight": np.ones(5)}
        with pytest.raises(
            ValueError, match=r"'bn1.weight' has shape \(5,\), not \(4,"
        ):
            fill(wrong)

    def test_another_model(self):
        tensors, _ = basic()
        with pytest.raises(ValueError, match="not weights of vgg16"):
            pretrained.fill("vgg16", tensors)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value):
        tensors, fill = basic()
        weight = np.array(tensors["conv1.weight"])
        weight[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="'conv1.weight' holds NaN or infinite"):
            fill(tensors | {"conv1.weight": weight})

    def test_half_precision(self):
        tensors, fill = basic()
        half = {name: t.astype(np.float16) for name, t in tensors.items()}
        _, variables = fill(half)
        np.testing.assert_array_equal(
            variables["params"]["fc"]["bias"], half["fc.bias"].astype(np.float32)
        )

    def test_timm_vgg_has_dense_layers_as_convolutions(self):
        file, name, options, _ = FILES["vgg"]
        tensors = torch_files.read(FOLDER / file)
        fill = functools.partial(pretrained.fill, name, **options)
        timm = {}
        for key, tensor in tensors.items():
            key = key.replace("classifier.0", "pre_logits.fc1")
            key = key.replace("classifier.3", "pre_logits.fc2")
            key = key.replace("classifier.6", "head.fc")
            if key == "pre_logits.fc1.weight":
                tensor = tensor.reshape(4, 2, 7, 7)
            if key == "pre_logits.fc2.weight":
                tensor = tensor.reshape(4, 4, 1, 1)
            timm[key] = tensor
        assert leaves_equal(fill(timm)[1], fill(tensors)[1])


@functools.cache
def lite0():
    return pretrained.load("efficientnet_lite0")


def prepare(photo, rules):
    """The photo `[H, W, 3]` of bytes as the network's input `[size, size, 3]`."""
    scale = rules.resize / min(photo.shape[:2])
    shape = (*(round(n * scale) for n in photo.shape[:2]), 3)
    image = np.array(jax.image.resize(photo / np.float32(255), shape, "bilinear"))
    top, left = ((n - rules.size) // 2 for n in image.shape[:2])
    image = image[top : top + rules.size, left : left + rules.size]
    return (image - np.float32(rules.mean)) / np.float32(rules.std)


class TestEfficientNetLite0:
    def test_cat_and_coffee(self):
        skimage_data = pytest.importorskip("skimage.data")
        model, variables = lite0()
        rules = pretrained.preprocessing("efficientnet_lite0")
        photos = (skimage_data.chelsea(), skimage_data.coffee())
        images = np.stack([prepare(photo, rules) for photo in photos])
        probabilities = jax.nn.softmax(jax.jit(model.apply)(variables, images))
        assert 281 <= int(probabilities[0].argmax()) <= 285
        assert float(probabilities[0, 281:286].sum()) > 0.8
        assert int(probabilities[1].argmax()) == 967
        names = imagenet_classes.names()
        assert names[967] == "espresso" and names[281] == "tabby"

    def test_head_is_pooled_linear(self):
        assert models.make_head_fn(*lite0()).kernel.shape == (1280, 1000)

    def test_timm_names(self):
        path = pretrained._packaged_file(
            "efficientnet_lite0", pretrained._SOURCES["efficientnet_lite0"]
        )
        tensors = pretrained.read_tensors(path)
        starts, blocks = {}, 0
        # The published number of blocks of each stage.
        for stage, size in enumerate((1, 2, 2, 3, 3, 4, 1)):
            for j in range(size):
                starts[str(blocks)] = (stage, j)
                blocks += 1
        ends = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head"}
        ends |= {"_bn1": "bn2", "_fc": "classifier"}
        later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
        later |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
        first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1"}
        first |= {"_project_conv": "conv_pw", "_bn2": "bn2"}
        timm = {}
        for name, tensor in tensors.items():
            if name.startswith("_blocks"):
                _, index, layer, leaf = name.split(".")
                stage, j = starts[index]
                layer = (later if stage else first)[layer]
                timm[f"blocks.{stage}.{j}.{layer}.{leaf}"] = tensor
            else:
                layer, leaf = name.split(".")
                timm[f"{ends[layer]}.{leaf}"] = tensor
        _, variables = pretrained.fill("efficientnet_lite0", timm)
        assert leaves_equal(variables, lite0()[1])


class TestPreprocessing:
    def test_lite_is_the_pixel_less_127_over_128(self):
        rules = pretrained.preprocessing("efficientnet_lite0")
        pixel = 255 * (3.0 * np.array(rules.std) + np.array(rules.mean))
        np.testing.assert_allclose((pixel - 127) / 128, 3.0, rtol=1e-12)

    def test_torchvision(self):
        rules = pretrained.preprocessing("resnet50")
        assert (rules.size, rules.resize) == (224, 256)
        assert rules.mean == (0.485, 0.456, 0.406)


class TestImagenetClasses:
    def test_a_name_for_each_class(self):
        names = imagenet_classes.names()
        assert len(names) == len(set(names)) == 1000
        assert names[0] == "tench" and names[999] == "toilet tissue"
        assert names[134] == "crane (134)" and names[639] == "maillot (tank suit)"


class TestPrefixes:
    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net.", "any_x."]
    )
    def test_dropped_and_said(self, prefix, caplog):
        tensors, fill = basic()
        wrapped = {prefix + name: t for name, t in tensors.items()}
        _, variables = fill(wrapped | {"n_averaged": np.array(3)})
        assert leaves_equal(variables, fill(tensors)[1])
        assert caplog.messages == [
            f"drops the prefix '{prefix}' of the weights' names, and 'n_averaged' "
            "without it"
        ]

    def test_the_average_is_not_taken(self, caplog):
        tensors, fill = basic()
        both = {f"ema.{name}": t + 1 for name, t in tensors.items()}
        both |= {f"net.{name}": t for name, t in tensors.items()}
        assert leaves_equal(fill(both)[1], fill(tensors)[1])
        assert "'net.'" in caplog.text and "weights under 'ema.'" in caplog.text

    def test_one_output(self):
        tensors, fill = basic()
        one = tensors | {n: tensors[n][:1] for n in ("fc.weight", "fc.bias")}
        model, variables = fill(one)
        assert model.num_classes == 1
        assert variables["params"]["fc"]["kernel"].shape[-1] == 1

    @pytest.mark.parametrize("dtype", ["U3", "complex64", "M8[s]", [("a", "f4")]])
    def test_no_numbers(self, dtype):
        tensors, fill = basic()
        with pytest.raises(ValueError, match="'bn1.bias' holds .*no real numbers"):
            fill(tensors | {"bn1.bias": np.zeros(4, dtype)})


class TestArrayFiles:
    def header(self, shape, dtype="<f4"):
        file = io.BytesIO()
        about = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        return file.getvalue()

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (lambda self: self.header((2**40,)), "not of its length"),
            (lambda self: self.header((2**62, 2**62)), "not of its length"),
            (lambda self: self.header((1,), "|O") + b"N.", "objects"),
            (lambda self: bytes(2**27), "inflates to more"),
            (lambda self: b"text", "not an npz file"),
        ],
    )
    def test_npz(self, contents, message, tmp_path):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("\x1b[31m.npy", contents(self))
        with pytest.raises(ValueError, match=message) as caught:
            pretrained.read_tensors(path)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("length", [0, 2**20, 2**63, 2**64 - 1])
    def test_safetensors(self, length, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="not a safetensors file"):
            pretrained.read_tensors(path)
