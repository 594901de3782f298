"""python -m benchmarks.against_torch [--json]: a plain step beside PyTorch's, on a CPU.

The same ResNet-50, batch, loss and Adam with weight decay, in both, in turns in one
process; PyTorch with channels first and last. A turn is a few steps, as in a training:
the first pays for memory that the system took back since the last turn. It needs torch
beside, which is no extra of this project. Both have memory as the trainer asks for it
(``train/memory.py``; ``GLIBC_TUNABLES= python -m ...``: as the system gives it).
"""

import argparse
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.step import make_phases, make_step, turn
from configs import default
from ibsgl_jax import models
from train import memory
from train.method.build import make_optimizer
from train.method.state import create_state
from train.show.markdown import markdown

STEPS = 3  # in one turn, after one that is not counted
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


def torch_resnet50(num_classes):
    """He et al., CVPR 2016, with the stride in the 3 x 3 convolution, as here."""
    from torch import nn

    def convolution(before, after, size, stride=1):
        padding = size // 2
        return nn.Conv2d(before, after, size, stride, padding, bias=False)

    class Block(nn.Module):
        def __init__(self, before, width, stride):
            super().__init__()
            after = 4 * width
            self.body = nn.Sequential(
                convolution(before, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                convolution(width, width, 3, stride),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                convolution(width, after, 1),
                nn.BatchNorm2d(after),
            )
            self.shortcut = nn.Identity()
            if stride != 1 or before != after:
                self.shortcut = nn.Sequential(
                    convolution(before, after, 1, stride), nn.BatchNorm2d(after)
                )
            self.last = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.last(self.body(x) + self.shortcut(x))

    layers = [convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    before = 64
    for width, count, stride in STAGES:
        for i in range(count):
            layers.append(Block(before, width, stride if i == 0 else 1))
            before = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)]
    return nn.Sequential(*layers)


def torch_step(images, labels, *, channels_last, num_classes):
    """A function that takes one step on normalised images [N, H, W, 3]."""
    import torch

    model = torch_resnet50(num_classes).train()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    order = torch.channels_last if channels_last else torch.contiguous_format
    model, pixels = (
        model.to(memory_format=order),
        pixels.contiguous(memory_format=order),
    )
    labels = torch.from_numpy(labels).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()

    return step


def jax_step(pixels, labels, *, num_classes):
    """The same of this project's plain training step, on uint8 images."""
    model = models.create("resnet50", num_classes=num_classes)
    tx = make_optimizer(default.get_config().optimizer, lambda step: 1e-3)
    state = create_state(jax.random.key(0), model, tx, pixels.shape[1])
    batch = {"image": jnp.asarray(pixels), "label": jnp.asarray(labels)}
    fn = jax.jit(make_step(model, tx, make_phases("")["plain"]))
    fn = fn.lower(state, batch).compile()
    return lambda: jax.block_until_ready(fn(state, batch))


def measure(*, batch_size, side, num_classes, num_rounds):
    """dict name -> seconds of a step in every turn."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (batch_size, side, side, 3), dtype=np.uint8)
    labels = draw.integers(0, num_classes, batch_size).astype(np.int32)
    images = ((pixels / 255.0 - 0.5) / 0.25).astype(np.float32)
    steps = {
        "this project": jax_step(pixels, labels, num_classes=num_classes),
        **{
            f"torch, channels {name}": torch_step(
                images, labels, channels_last=last, num_classes=num_classes
            )
            for name, last in (("first", False), ("last", True))
        },
    }
    times = {name: [] for name in steps}
    for i in range(num_rounds):
        for name, step in steps.items():
            times[name].append(turn(lambda _, step=step: step(), range(STEPS)))
        print(f"round {i + 1}/{num_rounds}", file=sys.stderr, flush=True)
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="two small images")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("error: this needs torch beside: pip install torch", file=sys.stderr)
        return 2
    torch.set_num_threads(os.cpu_count())
    size = dict(batch_size=8, side=224, num_classes=1000)
    if args.quick:
        size = dict(batch_size=2, side=32, num_classes=3)
    times = measure(**size, num_rounds=args.rounds)
    ours = np.array(times["this project"])
    rows = []
    for name, seconds in times.items():
        ratio = np.percentile(ours / np.array(seconds), (50, 25, 75))
        rows.append({"step": name, "seconds": float(np.median(seconds))})
        rows[-1]["ours_over_it"] = [float(r) for r in ratio]
    about = {"jax": jax.__version__, "torch": torch.__version__}
    about |= {"cores": os.cpu_count(), **size}
    if args.json:
        print(json.dumps(about | {"rows": rows}))
        return 0
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    lines = [
        (
            row["step"],
            f"{1e3 * row['seconds']:.0f}",
            "{:.2f} ({:.2f}-{:.2f})".format(*row["ours_over_it"]),
        )
        for row in rows
    ]
    print(markdown(("step", "ms", "ours / it (quartiles)"), lines))
    return 0


if __name__ == "__main__":
    memory.restart()
    sys.exit(main())
