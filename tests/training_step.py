"""A small network and its training steps, plain and guided, for the tests of them."""

import functools
import inspect

import jax
import numpy as np
import optax

from ibsgl_jax import guidance, models
from train.method.guided import make_guided_penalty
from train.method.state import create_state
from train.method.step import train_step
from train.method.teacher import make_teacher

AXIS = "devices"
IMAGE_STATS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
GUIDED = dict(
    config=guidance.GuidanceConfig(step_size=0.3),
    mu=lambda step: 3.0,
    decay=0.9,
    only_right=False,  # untrained networks are wrong nearly everywhere
)
LEARNING_RATE = 0.1


def make_model(**options):
    # Zero-initialised blocks would leave most of the network without a gradient.
    options = {"stage_sizes": (1, 1), "stage_strides": (1, 2), **options}
    return models.create("small_resnet", num_classes=10, zero_init=False, **options)


def make_batch(num=16, size=32):
    generator = np.random.default_rng(0)
    return {
        "image": generator.integers(0, 256, (num, size, size, 3), np.uint8),
        "label": generator.integers(0, 10, num).astype(np.int32),
        "place": np.arange(num, dtype=np.int32),
        "mask": (generator.random((num, size, size)) < 0.3).astype(np.uint8),
    }


def make_step(kind, model, *, axis_name=None, **options):
    """The step of ``kind``; options of teacher, penalty and step together."""

    def own(fn):
        names = inspect.signature(fn).parameters
        return {k: v for k, v in options.items() if k in names}

    if kind == "guided":
        options = GUIDED | options
        teacher_fn = make_teacher(
            model,
            **own(make_teacher) | {"config": options["config"].bottleneck},
            axis_name=axis_name,
        )
        options["penalty_fn"] = make_guided_penalty(
            model, **own(make_guided_penalty), teacher_fn=teacher_fn
        )
    return functools.partial(
        train_step,
        **own(train_step),
        model=model,
        tx=optax.sgd(LEARNING_RATE, momentum=0.9),
        base_key=jax.random.key(7),
        image_stats=IMAGE_STATS,
        axis_name=axis_name,
    )


@functools.cache
def make_state(model, size=32, layer=""):
    """On the host: a step that donates its state leaves this one whole."""
    tx = optax.sgd(LEARNING_RATE, momentum=0.9)
    state = create_state(jax.random.key(0), model, tx, size, layer=layer)
    return jax.device_get(state)


def pmap_step(step, num_devices):
    """As ``devices.over_devices`` wraps it."""
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=jax.devices()[:num_devices],
    )


def shard(batch, num_devices):
    return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
