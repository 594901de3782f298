"""Writes tests/data/originals/: networks of timm, torchvision, Hugging Face, tiny.

    python tests/data/make_originals.py [--full FOLDER]

in an environment of its own with torch, torchvision, timm and transformers, of which
the tests need none. Every file holds the network's tensors under its own names
("tensors/..."), images [N, H, W, 3], its logits, and of the logit of class 1 what
PyTorch's autograd gives: gradient and integrated gradients in the image, HiResCAM,
Grad-CAM and LayerCAM of what the last attention reads (of what is pooled, where that
is not the class token). ``--full`` writes networks of the real sizes, with random
weights, for ``python -m benchmarks.originals FOLDER``.
"""

import argparse
import pathlib
import tempfile

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


def timm_vit(name, size, **options):
    width, depth, heads, patch, side, classes = size
    return timm.create_model(
        name,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        img_size=side,
        num_classes=classes,
        **options,
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


def convnexts(widths, depths, classes):
    setting = [
        torchvision.models.convnext.CNBlockConfig(a, b, n)
        for a, b, n in zip(widths, [*widths[1:], None], depths, strict=True)
    ]
    config = transformers.ConvNextConfig(
        hidden_sizes=widths, depths=depths, num_labels=classes
    )
    return {
        "timm": timm.create_model(
            "convnext_tiny", dims=widths, depths=depths, num_classes=classes
        ),
        "torchvision": torchvision.models.ConvNeXt(setting, num_classes=classes),
        "hugging_face": transformers.ConvNextForImageClassification(config),
    }


def networks(full):
    """Name -> (network, side of the images)."""
    small, base = (SMALL, BASE) if full else (TINY, TINY)
    dino = (*SMALL[:3], 14, 518 if full else 32, 1000) if full else TINY
    found = {
        "vit_small16.timm": timm_vit("vit_small_patch16_224", small),
        "deit_small16.timm": timm_vit("deit_small_patch16_224", small),
        "vit_base16.torchvision": torchvision_vit(base),
        "vit_base16.hugging_face": hugging_face(
            "ViT", base, intermediate_size=4 * base[0]
        ),
        "dinov2_small14_reg4.timm": timm_vit("vit_small_patch14_reg4_dinov2", dino),
        "dinov2_small14_reg4.hugging_face": hugging_face(
            "Dinov2WithRegisters", dino, num_register_tokens=4
        ),
    }
    if not full:
        found.pop("deit_small16.timm")
    sizes = {"convnext_tiny": ((96, 192, 384, 768), (3, 3, 9, 3), 1000)}
    if full:
        sizes["convnext_small"] = ((96, 192, 384, 768), (3, 3, 27, 3), 1000)
        for number in (1, 2):
            found[f"efficientnet_lite{number}.timm"] = timm.create_model(
                f"tf_efficientnet_lite{number}"
            )
    else:
        sizes["convnext_tiny"] = ((4, 6, 8, 12), (1, 1, 2, 1), 5)
    for name, size in sizes.items():
        found |= {f"{name}.{source}": net for source, net in convnexts(*size).items()}
    sides = {name: dino[4] if "dino" in name else small[4] for name in found}
    return {name: (net, sides[name]) for name, net in found.items()}


@torch.no_grad()
def randomise(network):
    """Weights of a size that lets every layer matter, so that none can be left out."""
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 0:  # a counter of batches
            continue
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim > 1:
            fan = tensor[0].numel() if tensor.ndim in (2, 4) else 4.0
            tensor.copy_(torch.randn(tensor.shape) / fan**0.5)
        else:
            centre = 0.0 if "bias" in name else 0.8
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


def explained(name, network, images):
    """What autograd gives for the logit of class 1."""
    kept = {}

    def keep(module, inputs, found):
        found.retain_grad()
        kept["features"] = found

    handle = tapped(name, network).register_forward_hook(keep)
    pixels = pytorchs(images, grad=True)
    logits_of(network, pixels)[:, 1].sum().backward()
    handle.remove()
    features, slope = kept["features"].detach(), kept["features"].grad
    if features.ndim == 4:
        features, slope = (x.permute(0, 2, 3, 1) for x in (features, slope))
    else:
        side = int(features.shape[1] ** 0.5)
        features, slope = (
            x[:, -(side**2) :].unflatten(1, (side, side)) for x in (features, slope)
        )
    pooled = slope.mean((1, 2), keepdim=True)
    slopes = []
    for point in (1 / 6, 3 / 6, 5 / 6):
        part = pytorchs(np.float32(point) * images, grad=True)
        logits_of(network, part)[:, 1].sum().backward()
        slopes.append(part.grad)
    found = {
        "gradient": pixels.grad.permute(0, 2, 3, 1),
        "integrated_gradients": (sum(slopes) / 3 * pixels.detach()).permute(0, 2, 3, 1),
        "hirescam": (slope * features).sum(-1).relu(),
        "grad_cam": (pooled * features).sum(-1).relu(),
        "layer_cam": (slope.relu() * features).sum(-1).relu(),
    }
    return {key: value.numpy() for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=pathlib.Path)
    folder = parser.parse_args().full
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    for name, (network, side) in networks(folder is not None).items():
        network.eval()
        randomise(network)
        size = (side, side)
        if "convnext" in name and folder is None:
            size = (64, 96)  # two by three cells
        images = draw.normal(size=(2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            logits = logits_of(network, pytorchs(images))
        arrays = {"images": images, "logits": logits.numpy()}
        arrays |= explained(name, network, images)
        if name == "dinov2_small14_reg4.hugging_face":
            # Images of another size than the positions, which are interpolated.
            large = draw.normal(size=(2, 48, 48, 3)) if folder is None else None
            if large is not None:
                arrays["large"] = large.astype(np.float32)
                with torch.no_grad():
                    logits = logits_of(network, pytorchs(arrays["large"]))
                arrays["large_logits"] = logits.numpy()
        tensors = names_in_a_file(network)
        arrays |= {f"tensors/{key}": t.numpy() for key, t in tensors.items()}
        target = folder or HERE
        target.mkdir(parents=True, exist_ok=True)
        save = np.savez if folder else np.savez_compressed
        save(target / f"{name}.npz", **arrays)
        print(name, sum(t.numel() for t in tensors.values()))


if __name__ == "__main__":
    main()
