"""What a configuration leaves open: chosen from the pictures and the machine.

A field at 0 is open (``OPEN`` and each phase's ``OPEN_IN_PHASES``), where the data are
somebody's own pictures. A run that goes on takes what its config.json says.
"""

import json
import math
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from ibsgl_jax import pretrained
from ibsgl_jax.images import ImageError
from train.data import dataset, decoded, labels_csv, layouts, splitting
from train.files import flatten
from train.method.build import make_model

OPEN = ("image_size", "batch_size")
OPEN_IN_PHASES = ("num_epochs", "learning_rate")
# Share of the pictures that a phase learns from, where the splits are to be made.
TRAIN_SHARE = splitting.SHARES["train"]
HEADERS = 50  # that tell how large the pictures are
# Examples that the plain phase sees on a CPU and on an accelerator, and its epochs.
SEEN = {"cpu": (2000, 2, 8), "other": (30_000, 5, 30)}
# What a step costs in passes forward of its batch, all layers, the head, and guided;
# and a batch of the final table. On a CPU depthwise convolutions are slow backward.
STEP_PASSES = {"cpu": 9.0, "other": 3.5}
HEAD_PASSES, GUIDED_SHARE, TEST_PASSES = 1.1, 1.1, 10.0


def complete(config, workdir, *, examples=None):
    """The configuration without open fields, and a dict of the chosen ones.

    What is wrong with the data or with a field is told elsewhere: a field is chosen all
    the same, so that it is not another fault.

    Args:
      config: ConfigDict; it is not changed.
      workdir: of the run; what its config.json says is taken.
      examples: given from Python, in the place of ``config.data``.
    """
    config = config.copy_and_resolve_references()
    if examples is not None:
        config.data = dataset.GIVEN
    elif config.get("data"):
        config.data = str(Path(os.path.expanduser(config.data)).absolute())
    fields = [field for field in _open_fields(config) if _get(config, field) == 0]
    if not fields or not (config.get("data") or config.get("dataset") == ""):
        return config, {}
    before = _recorded(workdir)
    number, side = _number_and_side(config, examples)
    chosen = {}
    for field in fields:
        value = before.get(field) or _choose(config, field, number, side)
        section, _, name = field.rpartition(".")
        (config[section] if section else config)[name] = chosen[field] = value
    return config, chosen


def _open_fields(config):
    phases = (name for name in config.phases if name in config)
    return [*OPEN, *(f"{name}.{f}" for name in phases for f in OPEN_IN_PHASES)]


def _get(config, field):
    section, _, name = field.rpartition(".")
    return (config[section] if section else config).get(name)


def _recorded(workdir) -> dict:
    try:
        return flatten(json.loads((Path(workdir) / "config.json").read_text()))
    except (OSError, ValueError, AttributeError):
        return {}  # what is wrong with it is told where it is read in earnest


def _number_and_side(config, examples):
    """Pictures to learn from, and the median of their shorter sides."""
    if examples is not None:
        train = examples
        share = TRAIN_SHARE
        if hasattr(examples, "keys"):
            names = {labels_csv.SPLIT_NAMES.get(str(k).lower()): k for k in examples}
            train = examples[names["train"]] if "train" in names else []
            share = 1.0 if len(examples) == len(splitting.SPLITS) else TRAIN_SHARE
        number = len(train) if hasattr(train, "__len__") else 0
        return max(1, round(share * number)), None
    if not config.data:
        return 1, None
    link = config.get("link", "softmax")
    pictures = layouts.recognise(config.data, link).pictures
    own = [p for p in pictures if p.split == config.train_split]
    sides = []
    for picture in pictures[:: max(1, len(pictures) // HEADERS)]:
        try:
            sides.append(min(decoded.upright_size(picture.path)))
        except ImageError:
            continue
    number = len(own) or round(TRAIN_SHARE * len(pictures))
    return max(1, number), statistics.median(sides) if sides else None


def _choose(config, field, number, side):
    """The value of an open field; fields before it have theirs."""
    is_cpu = jax.default_backend() == "cpu"
    phase, _, name = field.rpartition(".")
    if name == "image_size":
        return _image_size(config.model, number, side, is_cpu)
    if name == "batch_size":
        return _batch_size(number, is_cpu)
    is_later = config[phase].init == "best"
    if name == "learning_rate":
        if config[phase].layers == "head":
            return 3e-3
        rate = 5e-4 * math.sqrt(max(1, config.batch_size) / 16)
        return float(f"{rate / 2 if is_later else rate:.2g}")
    seen, least, most = SEEN["cpu" if is_cpu else "other"]
    epochs = min(max(round(seen / number), least), most)
    return float(max(1, epochs // 2) if is_later else epochs)


def _image_size(model, number, side, is_cpu):
    """The size that the weights know; less on a CPU and for small pictures."""
    try:
        size, least = pretrained.preprocessing(model).size, 96
    except ValueError:
        size, least = 96, 32
    if is_cpu:
        size = min(size, 128 if number > 3000 else 160)
    if side is not None:
        size = min(size, max(least, 32 * math.ceil(side / 32)))
    return size


def _batch_size(number, is_cpu):
    """A power of two times the devices, of which an epoch has four at least."""
    devices = jax.device_count()
    # On a CPU 32 would take 4 GiB and not be faster.
    size = 16 if is_cpu else 128 if number > 3000 else 64
    while size > 2 and size * 4 > number:
        size //= 2
    return devices * max(1, size // devices)


def describe(chosen: dict, seconds: float | None = None) -> str:
    """The chosen fields as lines of text, with the time that all will take."""
    width = max(map(len, chosen))
    lines = [f"  {name:{width}}  {value:g}" for name, value in chosen.items()]
    head = "chosen from the pictures and the machine (--config.FIELD=VALUE overrides):"
    if seconds is not None:
        lines.append(f"training and its table take {in_words(seconds)} here")
    return "\n".join([head, *lines])


def in_words(seconds: float) -> str:
    """About how long that is."""
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} seconds"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


def estimate_seconds(config, plans, data) -> float:
    """About how long a run will take, from one timed pass of one batch.

    Compiling is counted too; what is done already of a run that goes on is not.
    """
    model = make_model(config, data.num_classes)
    local = max(1, config.batch_size // jax.device_count())
    images = jnp.zeros((local, config.image_size, config.image_size, 3), jnp.float32)
    start = time.perf_counter()
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    forward = jax.jit(lambda variables, images: model.apply(variables, images))
    jax.block_until_ready(forward(variables, images))
    compiling = time.perf_counter() - start
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(forward(variables, images))
        times.append(time.perf_counter() - start)
    one = min(times)
    if jax.default_backend() == "cpu":  # devices of a CPU share its cores
        one *= jax.device_count()

    def batches(source):
        return math.ceil(len(source) / config.batch_size)

    passes = 0.0
    full = STEP_PASSES["cpu" if jax.default_backend() == "cpu" else "other"]
    for plan in plans:
        step = full if plan.phase.layers == "all" else HEAD_PASSES
        step *= GUIDED_SHARE if plan.phase.method != "plain" else 1.0
        validations = plan.num_steps / plan.save_every
        passes += step * plan.num_steps + validations * batches(data.validation)
        passes += TEST_PASSES * batches(data.test)
        passes += min(batches(data.train), 1024 / config.batch_size)
    return passes * one + len(plans) * 3 * compiling
