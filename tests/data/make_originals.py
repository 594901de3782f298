"""Writes tests/data/originals/: networks of timm, torchvision, Hugging Face, tiny.

    python tests/data/make_originals.py [--full FOLDER]

in an environment of its own with torch, torchvision, timm and transformers, of which
the tests need none. Every file holds the network's tensors under its own names
("tensors/..."), images [N, H, W, 3], its logits, and of the logit of class 1 what
PyTorch's autograd gives: gradient and integrated gradients in the image, HiResCAM,
Grad-CAM and LayerCAM of what the last attention reads (of what is pooled, where that
is not the class token). ``--full`` writes networks of the real sizes, with random
weights, for ``python -m benchmarks.originals FOLDER``. Each network has a seed of its
own, and files that are there stay: delete one to have it made anew. Weights that
leave a map zero everywhere are drawn again.
"""

import argparse
import pathlib
import tempfile
import zlib
from functools import partial

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
import transformers

HERE = pathlib.Path(__file__).parent / "originals"
# (width, depth, heads, patch, image side, classes)
TINY = (12, 2, 2, 8, 32, 5)
SMALL = (384, 12, 6, 16, 224, 1000)
BASE = (768, 12, 12, 16, 224, 1000)
CONVNEXT = (96, 192, 384, 768)
SWIN = (3, 6, 12, 24)
RELUS = ("vgg", "efficientnet")


def timm_vit(name, size):
    width, depth, heads, patch, side, classes = size
    return timm.create_model(
        name,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        img_size=side,
        num_classes=classes,
    )


def torchvision_vit(size):
    width, depth, heads, patch, side, classes = size
    return torchvision.models.VisionTransformer(
        side, patch, depth, heads, width, 4 * width, num_classes=classes
    )


def hugging_face(kind, size, **options):
    width, depth, heads, patch, side, classes = size
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=side,
        num_labels=classes,
        **options,
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def hugging_face_vit(size):
    return hugging_face("ViT", size, intermediate_size=4 * size[0])


def dinos(name, width_name, size):
    return {
        f"{name}.timm": partial(
            timm_vit, f"vit_{width_name}_patch14_reg4_dinov2", size
        ),
        f"{name}.hugging_face": partial(
            hugging_face, "Dinov2WithRegisters", size, num_register_tokens=4
        ),
    }


def convnexts(name, widths, depths, classes=1000):
    setting = [
        torchvision.models.convnext.CNBlockConfig(a, b, n)
        for a, b, n in zip(widths, [*widths[1:], None], depths, strict=True)
    ]
    config = transformers.ConvNextConfig(
        hidden_sizes=widths, depths=depths, num_labels=classes
    )
    return {
        f"{name}.timm": partial(
            timm.create_model,
            "convnext_tiny",
            dims=widths,
            depths=depths,
            num_classes=classes,
        ),
        f"{name}.torchvision": partial(
            torchvision.models.ConvNeXt, setting, num_classes=classes
        ),
        f"{name}.hugging_face": partial(
            transformers.ConvNextForImageClassification, config
        ),
    }


def swins(name, depths, heads=SWIN, *, width=96, window=7, side=224, classes=1000):
    alike = {"embed_dim": width, "depths": depths, "num_heads": heads}
    config = transformers.SwinConfig(
        image_size=side, window_size=window, num_labels=classes, **alike
    )
    return {
        f"{name}.timm": partial(
            timm.create_model,
            "swin_tiny_patch4_window7_224",
            img_size=side,
            window_size=window,
            num_classes=classes,
            **alike,
        ),
        f"{name}.torchvision": partial(
            torchvision.models.SwinTransformer,
            patch_size=[4, 4],
            window_size=[window, window],
            num_classes=classes,
            **alike,
        ),
        f"{name}.hugging_face": partial(
            transformers.SwinForImageClassification, config
        ),
    }


def tiny_networks():
    """Name -> (function that makes the network, size of the images)."""
    made = {
        "vit_small16.timm": partial(timm_vit, "vit_small_patch16_224", TINY),
        "vit_base16.torchvision": partial(torchvision_vit, TINY),
        "vit_base16.hugging_face": partial(hugging_face_vit, TINY),
        **dinos("dinov2_small14_reg4", "small", TINY),
        **convnexts("convnext_tiny", (4, 6, 8, 12), (1, 1, 2, 1), 5),
        **swins(
            "swin_tiny", (2, 2, 2), (1, 2, 3), width=6, window=2, side=32, classes=5
        ),
    }
    sizes = {name: (32, 32) for name in made}
    sizes |= {name: (64, 96) for name in made if "conv" in name}  # two by three cells
    # Maps of 9 x 11, 5 x 6 and 3 x 3, padded for windows and for merging.
    sizes["swin_tiny.torchvision"] = (36, 44)
    return {name: (make, sizes[name]) for name, make in made.items()}


def full_networks():
    """As ``tiny_networks``."""
    made = {
        **{
            f"{kind}_{width}16.timm": partial(
                timm_vit, f"{kind}_{width}_patch16_224", size
            )
            for kind in ("vit", "deit")
            for width, size in (("small", SMALL), ("base", BASE))
        },
        "deit_base16.torchvision": partial(torchvision_vit, BASE),
        "vit_base16.hugging_face": partial(hugging_face_vit, BASE),
        **dinos("dinov2_small14_reg4", "small", (*SMALL[:3], 14, 518, 1000)),
        **dinos("dinov2_base14_reg4", "base", (*BASE[:3], 14, 518, 1000)),
        **convnexts("convnext_tiny", CONVNEXT, (3, 3, 9, 3)),
        **convnexts("convnext_small", CONVNEXT, (3, 3, 27, 3)),
        **swins("swin_tiny", (2, 2, 6, 2)),
        **swins("swin_small", (2, 2, 18, 2)),
    }
    sizes = {name: 518 if "dino" in name else 224 for name in made}
    for number, side in enumerate((224, 240, 260)):
        name = f"efficientnet_lite{number}.timm"
        made[name] = partial(timm.create_model, f"tf_efficientnet_lite{number}")
        sizes[name] = side
    for name in ("resnet50", "vgg16"):
        made[f"{name}.timm"] = partial(timm.create_model, name)
        made[f"{name}.torchvision"] = getattr(torchvision.models, name)
        sizes |= {f"{name}.timm": 224, f"{name}.torchvision": 224}
    return {name: (make, (sizes[name],) * 2) for name, make in made.items()}


@torch.no_grad()
def randomise(network, gain=1.0):
    """Weights of a size that lets every layer matter, so that none can be left out.

    A gain of 2 makes up for the half that every ReLU takes where no shortcut goes
    round it; without it what twenty of them leave of an image is less than rounding.
    """
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():  # a counter of batches, places in a table
            continue
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim > 1:
            fan = tensor[0].numel() if tensor.ndim in (2, 4) else 4.0
            tensor.copy_(torch.randn(tensor.shape) * (gain / fan) ** 0.5)
        else:
            centre = 0.0 if "bias" in name or "running_mean" in name else 0.8
            tensor.copy_(centre + 0.2 * torch.randn(tensor.shape))


def names_in_a_file(network):
    """The tensors under the names that a saved file has."""
    if not isinstance(network, transformers.PreTrainedModel):
        return network.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return safetensors.torch.load_file(f"{folder}/model.safetensors")


def logits_of(network, images):
    found = network(images)
    return getattr(found, "logits", found)


def pytorchs(images, *, grad=False):
    found = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return found.requires_grad_(grad)


def tapped(name, network):
    """The module that gives the features."""
    model, source = name.split(".")
    if "swin" in model:
        return network.swin.layernorm if source == "hugging_face" else network.norm
    if "resnet" in model:
        return network.layer4
    if "vgg" in model:
        return network.features[29]
    if source == "timm":
        if "efficientnet" in model:
            return network.bn2
        return network.stages if "conv" in model else network.blocks[-1].norm1
    if source == "torchvision":
        if "conv" in model:
            return network.features
        return network.encoder.layers[-1].ln_1
    if "conv" in model:
        return network.convnext.encoder.stages[-1].layers[-1]
    if "dino" in model:
        return network.dinov2_with_registers.layernorm
    return network.vit.layers[-1].layernorm_before


def integrated_gradients(network, images):
    """Of the logit of class 1, three steps from zero, [N, H, W, 3]."""
    slopes = []
    for point in (1 / 6, 3 / 6, 5 / 6):
        part = pytorchs(np.float32(point) * images, grad=True)
        logits_of(network, part)[:, 1].sum().backward()
        slopes.append(part.grad)
    return (sum(slopes) / 3 * pytorchs(images)).permute(0, 2, 3, 1).numpy()


def explained(name, network, images):
    """Logits, and what autograd gives for that of class 1."""
    kept = {}

    def keep(module, inputs, found):
        found.retain_grad()
        kept["features"] = found

    handle = tapped(name, network).register_forward_hook(keep)
    pixels = pytorchs(images, grad=True)
    logits = logits_of(network, pixels)
    logits[:, 1].sum().backward()
    handle.remove()
    features, slope = kept["features"].detach(), kept["features"].grad
    if features.ndim == 4 and "swin" not in name:
        features, slope = (x.permute(0, 2, 3, 1) for x in (features, slope))
    elif features.ndim == 3:
        side = int(features.shape[1] ** 0.5)
        features, slope = (
            x[:, -(side**2) :].unflatten(1, (side, side)) for x in (features, slope)
        )
    pooled = slope.mean((1, 2), keepdim=True)
    found = {
        "logits": logits.detach(),
        "gradient": pixels.grad.permute(0, 2, 3, 1),
        "hirescam": (slope * features).sum(-1).relu(),
        "grad_cam": (pooled * features).sum(-1).relu(),
        "layer_cam": (slope.relu() * features).sum(-1).relu(),
    }
    return {key: value.numpy() for key, value in found.items()}


def arrays_of(name, network, size, draw):
    """What is stored of a network; None if a map of these weights is blank."""
    images = draw.normal(size=(2, *size, 3)).astype(np.float32)
    found = {"images": images, **explained(name, network, images)}
    if not all(found[key].any() for key in ("hirescam", "grad_cam", "layer_cam")):
        return None
    found["integrated_gradients"] = integrated_gradients(network, images)
    if name == "dinov2_small14_reg4.hugging_face" and size == (32, 32):
        # Images of another size than the positions, which are interpolated.
        large = draw.normal(size=(2, 48, 48, 3)).astype(np.float32)
        with torch.no_grad():
            logits = logits_of(network, pytorchs(large)).numpy()
        found |= {"large": large, "large_logits": logits}
    tensors = names_in_a_file(network).items()
    return found | {f"tensors/{key}": tensor.numpy() for key, tensor in tensors}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=pathlib.Path)
    folder = parser.parse_args().full
    save = np.savez if folder else np.savez_compressed
    networks = full_networks() if folder else tiny_networks()
    target = folder or HERE
    target.mkdir(parents=True, exist_ok=True)
    for name, (make, size) in networks.items():
        path = target / f"{name}.npz"
        if path.exists():
            continue
        seed = zlib.crc32(name.encode())
        torch.manual_seed(seed)
        draw, arrays = np.random.default_rng(seed), None
        while arrays is None:
            network = make().eval()
            randomise(network, gain=2.0 if name.startswith(RELUS) else 1.0)
            arrays = arrays_of(name, network, size, draw)
        save(path, **arrays)
        print(name, sum(t.numel() for t in network.state_dict().values()), flush=True)


if __name__ == "__main__":
    main()
