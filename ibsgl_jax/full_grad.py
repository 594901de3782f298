"""FullGrad: a logit split over the input and the biases inside the network.

A bare function does not show its biases: ``make_tapped_fn`` makes one that does.
Imports jax, flax, chex and this library only; does no I/O.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.tracers import current_trace

from ibsgl_jax import saliency


def full_gradients(
    tapped_fn: Callable, images: chex.Array, classes: chex.Array
) -> tuple[chex.Array, list[chex.Array]]:
    """The logit of a piecewise linear network, split over its input and its biases.

    Args:
      tapped_fn: (images, perturbations) -> (logits [N, C], biases), where biases is a
        list with one array per affine layer, of the shape of that layer's output
        [N, ...], and perturbations is None or a list of the same shapes, to be added
        to those outputs. ``make_tapped_fn`` builds one for a Linen model.
      images: [N, H', W', 3].
      classes: int [N].

    Returns:
      (x * dy/dx, [bias * dy/d output for every layer]). Their sum over everything but
      the batch is the class logit, for networks of affine layers, ReLU and pooling
      (not ReLU6, whose upper corner acts as a bias that no layer owns).

    Reference: Srinivas and Fleuret, "Full-gradient representation for neural network
    visualization", 2019, equation 4.
    """
    shapes = jax.eval_shape(lambda x: tapped_fn(x, None)[1], images)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    logits, vjp_fn, biases = jax.vjp(tapped_fn, images, zeros, has_aux=True)
    saliency.check_logits(logits)
    cotangent = jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
    by_images, by_outputs = vjp_fn(cotangent)
    return images * by_images, jax.tree.map(jnp.multiply, biases, by_outputs)


def full_grad(
    tapped_fn: Callable, images: chex.Array, classes: chex.Array
) -> chex.Array:
    """FullGrad's map: the absolute full gradients, each channel scaled to [0, 1].

    Args:
      tapped_fn, images, classes: as in ``full_gradients``.

    Returns:
      float32 [N, H', W'], non-negative; layers without space (dense) do not show.

    Reference: Srinivas and Fleuret, 2019, section 4. Where we differ: every channel is
    scaled by itself, as in pytorch-grad-cam; the authors' code scales a layer at once.
    """
    at_input, at_biases = full_gradients(tapped_fn, images, classes)
    size = images.shape[1:3]
    # Resizing is linear: once per layer does for all its channels.
    return sum(
        saliency.upsample(
            jnp.sum(_unit_range(jnp.abs(values.astype(jnp.float32))), axis=-1), size
        )
        for values in (at_input, *at_biases)
        if values.ndim == 4
    )


def _unit_range(values: chex.Array) -> chex.Array:
    """Each channel of [N, H, W, K] moved and scaled to [0, 1]."""
    values = values - jnp.min(values, axis=(1, 2), keepdims=True)
    return values / (1e-7 + jnp.max(values, axis=(1, 2), keepdims=True))


def make_tapped_fn(model: nn.Module, variables, **apply_options) -> Callable:
    """The function that ``full_grad`` takes, of a Linen model in eval mode.

    Every Conv, Dense and BatchNorm with a bias is tapped. The bias is what the layer
    answers to zero: BatchNorm's running mean is counted as the bias it acts as.

    Args:
      model: called as ``model.apply(variables, images)`` -> logits [N, C].
      variables: params and batch_stats.
      **apply_options: further keywords of the call (``train=False``).

    Returns:
      tapped_fn, a pytree that carries the variables.
    """

    def tapped_fn(variables, images, perturbations):
        biases = []
        outside = current_trace()

        def tap(next_fn, args, kwargs, context):
            layer = context.module
            if context.method_name != "__call__" or not (
                isinstance(layer, nn.BatchNorm)
                or (isinstance(layer, nn.Conv | nn.Dense) and layer.use_bias)
            ):
                return next_fn(*args, **kwargs)
            if current_trace() != outside:
                raise ValueError(
                    f"layer {'/'.join(layer.path)!r} runs inside nn.remat, nn.scan or "
                    "nn.jit, which hide its bias: build the model without them (the "
                    "variables of nn.remat stay the same)"
                )
            # One more example, all zeros, goes along: a layer can be called only once.
            inputs, *rest = args
            inputs = jnp.concatenate([inputs, jnp.zeros_like(inputs[:1])])
            outputs = next_fn(inputs, *rest, **kwargs)
            outputs, at_zero = outputs[:-1], outputs[-1:]
            if perturbations is not None:
                outputs = outputs + perturbations[len(biases)]
            biases.append(jnp.broadcast_to(at_zero, outputs.shape))
            return outputs

        with nn.intercept_methods(tap):
            logits = model.apply(variables, images, **apply_options)
        return logits, biases

    return jax.tree_util.Partial(tapped_fn, variables)
