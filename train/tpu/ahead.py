"""The real step of a phase, compiled for TPUs that are not there, and what it costs."""

import dataclasses
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from ibsgl_jax import bottleneck, feature_stats
from train.devices import AXIS
from train.errors import CompileError
from train.method.build import (
    make_model,
    make_optimizer,
    make_schedule,
    make_step,
    mask_readers,
)
from train.method.guided import guidance_config
from train.method.state import create_state, layer_name, state_options, tap
from train.method.teacher import teaches_by_bottleneck
from train.tpu import hlo

# Memory of a chip in GiB, from Google's documentation of Cloud TPU.
CHIP_GIB = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# Of a chip, a second: bfloat16 operations, bytes of its memory, bytes of its links to
# the others; from the same pages.
PEAKS = {"v5e": (197e12, 819e9, 1600e9 / 8)}
# How libtpu, of any age, says what a program needs and what there is.
_SIZE = r"([\d.]+[KMG])"
_USED = re.compile(rf"{_SIZE}\)?(?: of | exceeds available \w+ \(){_SIZE}")


def describe(topology: str):
    """The devices of a slice, without having one.

    Raises:
      CompileError: libtpu is not installed, or knows no such slice.
    """
    # Else libtpu asks the machine which TPU it has, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

    if importlib.util.find_spec("libtpu") is None:
        raise CompileError('libtpu is missing: pip install -e ".[train,tpu]"')
    try:
        found = topologies.get_topology_desc(topology, platform="tpu")
    except Exception as error:  # noqa: BLE001  (whatever libtpu raises)
        reason = str(error).splitlines()[0]
        raise CompileError(f"topology {topology!r}: {reason}") from error
    return found.devices


def compile_step(config, phase, devices, num_classes: int):
    """The phase's step over all devices, compiled.

    Args:
      config, phase: the configuration and one of its phases.
      devices: of a topology, or real ones.
      num_classes: of the data set.

    Returns:
      jax's compiled object of one step, state donated as in ``run/loop.py``.

    Raises:
      CompileError: the batch does not divide, or needs more memory than a chip has.
    """
    if config.batch_size % (len(devices) * config.accumulate_steps):
        raise CompileError(
            f"batch_size={config.batch_size} is not divisible by {len(devices)} chips"
            f" times accumulate_steps={config.accumulate_steps}"
        )
    model = make_model(config, num_classes, axis_name=AXIS)
    schedule = make_schedule(phase.learning_rate, 1000, 0)
    tx = make_optimizer(config.optimizer, schedule)
    step = make_step(
        config,
        phase,
        1000,
        generation=0,
        model=model,
        tx=tx,
        platform=devices[0].platform,
    )
    state = jax.eval_shape(
        lambda: create_state(
            jax.random.key(0), model, tx, **state_options(config, phase)
        )
    )
    size, side = config.batch_size, config.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "place": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    if config.get("link") == "sigmoid":
        batch["positives"] = jax.ShapeDtypeStruct((size, num_classes), jnp.uint8)
    if mask_readers(phase):
        batch["mask"] = jax.ShapeDtypeStruct((size, side, side), jnp.uint8)
    # A frozen teacher is an earlier phase's network.
    teachers = (state.variables,) if phase.get("teacher") in config.phases else ()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1), (AXIS,))

    # pmap cannot be compiled for a topology. check_vma=False: the step averages its
    # gradients itself, as under pmap.
    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(AXIS)) + (jax.P(),) * len(teachers),
        out_specs=jax.P(),
        check_vma=False,
    )
    lowered = jax.jit(sharded, donate_argnums=0).lower(
        _placed(mesh, jax.P(), state),
        _placed(mesh, jax.P(AXIS), batch),
        *_placed(mesh, jax.P(), teachers),
    )
    try:
        return lowered.compile()
    except Exception as error:  # noqa: BLE001  (whatever the compiler raises)
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "memory" not in text:
            raise
        used = _USED.search(text)
        figure = f"{used[1]} of {used[2]}" if used else text.splitlines()[0]
        raise CompileError(
            f"a batch of {config.batch_size} does not fit: {size // len(devices)} "
            f"images on a chip need {figure}; lower --config.batch_size or raise "
            "--config.accumulate_steps"
        ) from error


def measure(compiled) -> dict:
    """Memory in bytes and work of one chip, and its collectives.

    flops is the compiler's own count, which takes the body of a loop once, not times
    its trip count (see ``repeated_flops``); ``memory`` is what lives at the worst
    moment, bytes_accessed what moves (see ``hlo.main_memory_bytes``) in a step that is
    guided, if some are, bytes_unguided in one that is not.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    collectives = hlo.count_collectives(text)
    return {
        "memory_arguments": memory.argument_size_in_bytes,
        "memory_temporary": memory.temp_size_in_bytes,
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "flops": cost.get("flops", 0.0),
        "bytes_accessed": hlo.main_memory_bytes(text),
        "bytes_unguided": hlo.main_memory_bytes(text, branch=min),
        "collectives": sum(count for count, _ in collectives.values()),
        "collective_bytes": sum(volume for _, volume in collectives.values()),
        "by_kind": {kind: list(pair) for kind, pair in collectives.items()},
    }


def repeated_flops(config, phase, devices, num_images: int, num_classes: int) -> float:
    """Operations of the bottleneck's steps that the compiler does not count.

    It takes the body of a loop once, whatever the number of trips: that over the steps
    and that over the pieces of the batch around it. One step is the difference between
    an attribution of all steps and one of a single step, which has no loop, both of
    one piece and compiled for the same chips: from above, because reading the map also
    costs more after a loop than at alpha's constant start.

    Returns:
      flops of one chip and its images; 0 without a bottleneck.
    """
    if phase.method != "guided" or not teaches_by_bottleneck(phase):
        return 0.0
    model = make_model(config, num_classes)
    options = guidance_config(phase, model, config.get("link", "softmax")).bottleneck
    side = config.image_size
    layer = layer_name(model, phase.teacher_layer, (side, side, 3))

    def features_and_variables(key, images):
        variables = model.init(key, images)
        features_fn, _ = tap(model, variables, layer, images.shape[1:])
        return features_fn(images), variables

    def shapes_for(num_images):
        images = jax.ShapeDtypeStruct((num_images, side, side, 3), jnp.float32)
        return jax.eval_shape(features_and_variables, jax.random.key(0), images)

    piece = num_images
    if not layer and hasattr(model, "pooled_linear") and not options.relu:
        (platform,) = {device.platform for device in devices}
        shape = shapes_for(num_images)[0].shape
        piece = bottleneck.piece_size(shape, platform=platform)
    pieces = num_images // piece
    features, variables = shapes_for(piece)
    given = (
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), piece)),
        variables,
        features,
        jax.ShapeDtypeStruct((piece,), jnp.int32),
        jax.eval_shape(lambda: feature_stats.init(features.shape[1:])),
    )
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1), (AXIS,))

    def flops_of(num_steps):
        def attribute(keys, variables, features, labels, stats):
            _, head_fn = tap(model, variables, layer, (side, side, 3))
            return bottleneck.attribute(
                keys,
                head_fn,
                features,
                labels,
                feature_stats.moments(stats),
                config=dataclasses.replace(options, num_steps=num_steps),
            ).saliency

        everywhere = jax.shard_map(
            attribute, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False
        )
        lowered = jax.jit(everywhere).lower(*_placed(mesh, jax.P(), given))
        return lowered.compile().cost_analysis().get("flops", 0.0)

    single = flops_of(1)
    step = max(flops_of(options.num_steps) - single, 0.0)
    # The last step has no update; of all this, one piece with one trip was counted.
    done = pieces * (single + (options.num_steps - 1) * step)
    return done - (single + step)


def bounds(row: dict, kind: str) -> dict:
    """Least milliseconds of one step, by what could limit it, at the published rates.

    Args:
      row: of ``measure``.
      kind: of the chip, a key of ``PEAKS``.

    Returns:
      dict arithmetic, memory, links. A ring sends about twice what it reduces.
    """
    operations, memory_bytes, link_bytes = PEAKS[kind]
    return {
        "arithmetic": 1e3 * row["flops"] / operations,
        "memory": 1e3 * row["bytes_accessed"] / memory_bytes,
        "links": 1e3 * 2 * row["collective_bytes"] / link_bytes,
    }


def _placed(mesh, spec, tree):
    """The shapes of a tree, laid out on the devices of the mesh."""
    sharding = jax.NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def choose_phase(config, name=None) -> str:
    """The name of the phase to compile."""
    if name is not None and name not in config.phases:
        raise CompileError(f"no phase {name!r}; the config has {config.phases}")
    guided = [p for p in config.phases if config[p].method == "guided"]
    return name or (guided[-1] if guided else config.phases[-1])
