"""What a training run carries from step to step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ibsgl_jax import feature_stats, tapping
from ibsgl_jax.models import make_features_fn, make_head_fn

# The teacher's layer by its stride: the last of twice the features' resolution, or the
# features themselves where the model has none.
FINER = "2x"


class TrainState(struct.PyTreeNode):
    """Everything that a step changes and a checkpoint keeps.

    Attributes:
      step: int32 [], steps done in this phase.
      params, batch_stats: of the model.
      opt_state: of optax.
      feature_stats: moving moments of the features that the bottleneck is on.
      ema_params: moving average of params, or an empty dict without one.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    feature_stats: feature_stats.FeatureStats
    ema_params: Any

    @property
    def variables(self):
        """The model as it is to be used: with the averaged parameters if there are."""
        params = self.ema_params or self.params
        return {"params": params, "batch_stats": self.batch_stats}


def create_state(
    key, model, tx, image_size: int, *, ema: bool = False, layer: str = ""
) -> TrainState:
    """A fresh state for square images of the given side; options as for ``restart``."""
    images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    # Jitted: initialising layer by layer takes seconds for a deep network.
    variables = jax.jit(model.init)(key, images)
    batch_stats = variables.get("batch_stats", {})
    params = variables["params"]
    return restart(model, tx, params, batch_stats, image_size, ema=ema, layer=layer)


def restart(
    model,
    tx,
    params,
    batch_stats,
    image_size: int,
    *,
    ema: bool = False,
    layer: str = "",
) -> TrainState:
    """The state of a new phase that takes over the weights of another.

    Args:
      model, tx, params, batch_stats: of the phase.
      image_size: side of the images.
      ema: with a moving average of the parameters.
      layer: inner layer whose features the statistics are of (a name of
        ``tapping.layer_names``, or ``FINER``); "" for the features before the head.

    Raises:
      ValueError: the model has no such layer, or it does not cut it.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    shape = image_size, image_size, 3
    features = jax.eval_shape(
        lambda variables, images: tap(model, variables, layer, shape)[0](images),
        variables,
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        feature_stats=feature_stats.init(features.shape[1:]),
        # A copy: no two arrays of a state that a step donates may be the same.
        ema_params=jax.tree.map(jnp.array, params) if ema else {},
    )


def state_options(config, phase) -> dict:
    """What ``create_state`` and ``restart`` take from a config and one of its phases.

    Fields that a run of an earlier version lacks are off.
    """
    has_bottleneck = phase.get("teacher", "mask") != "mask"
    return {
        "image_size": config.image_size,
        "ema": config.get("ema_decay", 0) > 0,
        "layer": phase.get("teacher_layer", "") if has_bottleneck else "",
    }


def layer_name(model, layer: str, image_shape) -> str:
    """A layer's name; for ``FINER`` that of ``tapping.finer_layer``, "" without one."""
    if layer != FINER:
        return layer
    try:
        return _finer_layer(model, tuple(image_shape))
    except TypeError:  # a model with options that have no hash
        return _finer_layer.__wrapped__(model, tuple(image_shape))


@functools.cache
def _finer_layer(model, image_shape):
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    try:
        return tapping.finer_layer(model, variables, image_shape)
    except ValueError:
        return ""


def tap(model, variables, layer: str, image_shape):
    """(features_fn, head_fn) of a network in evaluation mode; layer as for ``restart``.

    image_shape is (H', W', 3). Call both under jit.
    """
    layer = layer_name(model, layer, image_shape)
    if layer:
        return tapping.linen(
            model, variables, layer, image_shape=image_shape, train=False
        )
    return make_features_fn(model, variables), make_head_fn(model, variables)
