"""Gradients of a class logit in the image: signed values [N, H', W', 3], per channel.

Each is a plain function of (logits_fn, images, classes). The model is
called in the images' own dtype, sums are at least float32. Imports jax, chex, numpy and
this library only; does no I/O.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import keys, saliency

LogitsFn = Callable[[chex.Array], chex.Array]

RULES = ("gausslegendre", "riemann_trapezoid", "riemann_middle")


def class_gradient(
    logits_fn: LogitsFn, inputs: chex.Array, classes: chex.Array
) -> chex.Array:
    """Gradient of each image's class logit in the inputs (images or features)."""
    logits, vjp_fn = jax.vjp(logits_fn, inputs)
    saliency.check_logits(logits)
    chex.assert_rank(classes, 1)
    return vjp_fn(jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype))[0]


def gradient(
    logits_fn: LogitsFn, images: chex.Array, classes: chex.Array
) -> chex.Array:
    """``dy/dx`` of the raw logit, signed.

    Reference: Simonyan et al., "Deep inside convolutional networks", 2013.
    """
    return class_gradient(logits_fn, images, classes)


def input_x_gradient(
    logits_fn: LogitsFn, images: chex.Array, classes: chex.Array
) -> chex.Array:
    """``x * dy/dx``, signed."""
    slope = class_gradient(logits_fn, images, classes)
    return _exact(images) * _exact(slope)


def smooth_grad(
    logits_fn: LogitsFn,
    images: chex.Array,
    classes: chex.Array,
    *,
    key: chex.PRNGKey,
    num_samples: int = 25,
    noise_level: float = 0.15,
) -> chex.Array:
    """The mean gradient over noisy copies of the image, signed.

    Args:
      logits_fn: images -> logits [N, C].
      images: [N, H', W', 3].
      classes: int [N].
      key: one key, and every image sees the same draws; or keys [N].
      num_samples: copies, >= 1; one at a time, so memory does not grow with them.
      noise_level: standard deviation of the noise, as a share of the image's own range
        max - min.

    Returns:
      [N, H', W', 3].

    Reference: Smilkov et al., "SmoothGrad", 2017.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: must be at least 1")
    key = keys.check(key, images.shape[0])
    exact = _exact(images)
    low = jnp.min(exact, axis=(1, 2, 3), keepdims=True)
    high = jnp.max(exact, axis=(1, 2, 3), keepdims=True)
    std = noise_level * jax.lax.stop_gradient(high - low)

    def add_sample(total, sample):
        noise = keys.normal(keys.fold_in(key, sample), images.shape[1:])
        noisy = (exact + std * noise.astype(exact.dtype)).astype(images.dtype)
        return total + _exact(class_gradient(logits_fn, noisy, classes)), None

    total, _ = jax.lax.scan(add_sample, jnp.zeros_like(exact), jnp.arange(num_samples))
    return total / num_samples


def integrated_gradients(
    logits_fn: LogitsFn,
    images: chex.Array,
    classes: chex.Array,
    *,
    num_steps: int = 50,
    rule: str = "gausslegendre",
    baseline: float | chex.Array = 0.0,
) -> chex.Array:
    """``(x - x0)`` times the mean gradient on the way from the baseline x0 to x.

    Args:
      logits_fn: images -> logits [N, C].
      images: [N, H', W', 3].
      classes: int [N].
      num_steps: gradients evaluated, >= 1 (>= 2 for the trapezoid), one at a time.
      rule: "gausslegendre", "riemann_trapezoid" or "riemann_middle". The trapezoid's
        weights add up to 1 - 1/num_steps, as in captum's.
      baseline: x0, a number or an array that broadcasts to the images; 0 is mid-grey
        for images scaled to be symmetric around zero.

    Returns:
      [N, H', W', 3], signed; its sum is about ``y(x) - y(x0)``.

    Reference: Sundararajan et al., "Axiomatic attribution for deep networks", 2017.
    """
    exact = _exact(images)
    points, weights = _quadrature(rule, num_steps, exact.dtype)
    baseline = jnp.broadcast_to(jnp.asarray(baseline, exact.dtype), images.shape)
    offset = exact - baseline

    def add_point(total, point_and_weight):
        point, weight = point_and_weight
        at_point = (baseline + point * offset).astype(images.dtype)
        slope = _exact(class_gradient(logits_fn, at_point, classes))
        return total + weight * slope, None

    total, _ = jax.lax.scan(add_point, jnp.zeros_like(exact), (points, weights))
    return offset * total


def _exact(values: chex.Array) -> chex.Array:
    """The values in float32, or in their own dtype where that is wider."""
    with jax.numpy_dtype_promotion("standard"):
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _quadrature(
    rule: str, num_steps: int, dtype: chex.ArrayDType
) -> tuple[chex.Array, chex.Array]:
    """Points in [0, 1] and their weights, [num_steps] each."""
    if num_steps < (2 if rule == "riemann_trapezoid" else 1):
        raise ValueError(f"num_steps={num_steps}: too few for rule={rule!r}")
    weights = np.full(num_steps, 1 / num_steps)
    if rule == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(num_steps)
        points, weights = (points + 1) / 2, weights / 2
    elif rule == "riemann_trapezoid":
        points = np.linspace(0, 1, num_steps)
        weights[[0, -1]] /= 2
    elif rule == "riemann_middle":
        points = (np.arange(num_steps) + 0.5) / num_steps
    else:
        raise ValueError(f"rule={rule!r}: choose one of {RULES}")
    return jnp.asarray(points, dtype), jnp.asarray(weights, dtype)
