"""Wrote tests/data/torch/, the only place where PyTorch (2.13) was needed.

Tiny networks with torchvision's layers and names, random weights, and their logits.
Run inside tests/data: `python make_torch_files.py`.
"""

import collections
import os

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    """torchvision's residual block, basic or with a bottleneck (version 1.5)."""

    def __init__(self, width_in, width, stride, bottleneck):
        super().__init__()
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        self.num = len(sizes)
        width_out = width * 4 if bottleneck else width
        widths = [width_in] + [width] * (self.num - 1) + [width_out]
        for i, (size, step) in enumerate(sizes):
            conv = nn.Conv2d(
                widths[i], widths[i + 1], size, step, size // 2, bias=False
            )
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.downsample = None
        if stride != 1 or width_in != width_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False),
                nn.BatchNorm2d(width_out),
            )

    def forward(self, x):
        y = x
        for i in range(1, self.num + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.num else y
        x = self.downsample(x) if self.downsample else x
        return (x + y).relu()


class ResNet(nn.Module):
    def __init__(self, stage_sizes, width, bottleneck, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width_in = width
        for i, size in enumerate(stage_sizes):
            blocks = []
            for j in range(size):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Block(width_in, width * 2**i, stride, bottleneck))
                width_in = width * 2**i * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.num_stages = len(stage_sizes)
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


class VGG16(nn.Module):
    def __init__(self, widths, dense, num_classes):
        super().__init__()
        layers, width_in = [], 3
        for width, size in zip(widths, (2, 2, 3, 3, 3), strict=True):
            for _ in range(size):
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
                width_in = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(width_in * 49, dense), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(dense, dense), nn.ReLU(), nn.Dropout()),
            nn.Linear(dense, num_classes),
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def randomize(model):
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or "bn" in name and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5)
        elif not name.endswith("num_batches_tracked") and tensor.ndim == 1:
            tensor.normal_(0, 0.3)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
    return model.eval()


torch.manual_seed(0)
os.makedirs("torch", exist_ok=True)
basic = randomize(ResNet((1, 2), 4, False, 5))
bottleneck = randomize(ResNet((2, 1), 2, True, 5))
vgg = randomize(VGG16((2, 2, 3, 3, 2), 4, 5))
# Odd sizes, where the padding's side matters.
small = torch.randint(-8, 9, (2, 3, 45, 38)) / 4
large = torch.randint(-8, 9, (1, 3, 64, 48)) / 4
with torch.no_grad():
    np.savez_compressed(
        "torch/logits.npz",
        small_times_4=(4 * small).permute(0, 2, 3, 1).to(torch.int8),
        large_times_4=(4 * large).permute(0, 2, 3, 1).to(torch.int8),
        basic=basic(small),
        bottleneck=bottleneck(small),
        vgg=vgg(large),
    )

torch.save(
    basic.state_dict(), "torch/basic_legacy.pth", _use_new_zipfile_serialization=False
)
wrapped = {f"module.{k}": v for k, v in bottleneck.state_dict().items()}
torch.save({"epoch": 3, "state_dict": wrapped}, "torch/bottleneck.pth")
torch.save(vgg.state_dict(), "torch/vgg.pth")

base = torch.arange(24.0).reshape(4, 6)
kinds = collections.OrderedDict(
    base=base,
    view=base[1:, ::2],
    transposed=base.T,
    empty=torch.zeros(0, 3),
    scalar=torch.tensor(7, dtype=torch.int64),
    half=torch.tensor([0.5, -2.0], dtype=torch.float16),
    bfloat16=torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    boolean=torch.tensor([True, False]),
    parameter=nn.Parameter(torch.ones(2)),
)
torch.save(kinds, "torch/kinds.pth")
torch.save(kinds, "torch/kinds_legacy.pth", _use_new_zipfile_serialization=False)
