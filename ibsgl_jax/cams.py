"""Class activation maps and their kin: maps [N, H, W] at the features' resolution.

Each is a plain function of (head_fn, features, classes); features are [N, H, W, K], or
tokens [N, T, D] whose grid ``tokens`` finds. Imports jax, chex and this
library only; does no I/O.
"""

import chex
import jax
import jax.numpy as jnp

from ibsgl_jax import bottleneck, keys, saliency, tokens
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.gradients import class_gradient
from ibsgl_jax.saliency import HeadFn
from ibsgl_jax.targets import LossFn


def information_bottleneck(
    head_fn: HeadFn,
    features: chex.Array,
    classes: chex.Array,
    *,
    key: chex.PRNGKey,
    moments: Moments,
    config: BottleneckConfig | None = None,
    loss: str | LossFn = "softmax",
) -> chex.Array:
    """Bits per cell of the features: ``bottleneck.attribute``'s map, no gradient."""
    return bottleneck.attribute(
        key, head_fn, features, classes, moments, config=config, loss=loss
    ).saliency


def hirescam(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, rectify: bool = True
) -> chex.Array:
    """``sum_k dy/dA_k * A_k``, elementwise (``saliency.class_saliency``).

    Reference: Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful
    explanations of convolutional neural networks", 2020.
    """
    return saliency.class_saliency(head_fn, features, classes, rectify=rectify)


def grad_cam(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, rectify: bool = True
) -> chex.Array:
    """``sum_k mean_hw(dy/dA_k) * A_k`` (``saliency.class_saliency``, pooled).

    Reference: Selvaraju et al., "Grad-CAM", ICCV 2017.
    """
    return saliency.class_saliency(
        head_fn, features, classes, weighting="pooled", rectify=rectify
    )


def grad_cam_pp(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, rectify: bool = True
) -> chex.Array:
    """Grad-CAM++: channels weighted by ``sum_hw a * ReLU(g)``.

    ``a = g^2 / (2 g^2 + sum_hw(A) g^3 + 1e-6)`` with ``g = dy/dA`` of the raw logit.

    Args:
      head_fn: features [N, H, W, K] -> logits [N, C], images independent.
      features: [N, H, W, K].
      classes: int [N].
      rectify: clip negative evidence to zero.

    Returns:
      float32 [N, H, W].

    Reference: Chattopadhay et al., "Grad-CAM++", WACV 2018, equation 19. Where we
    differ: the logit itself, not its exponential, is differentiated, as in common use.
    """
    saliency.check_features(features)
    features = features.astype(jnp.float32)
    head_fn, features, _ = tokens.as_map(head_fn, features)
    gradient = class_gradient(head_fn, features, classes)
    total = jnp.sum(features, axis=(1, 2), keepdims=True)
    denominator = 2 * gradient**2 + total * gradient**3 + 1e-6
    # Only positive gradients count; elsewhere the denominator may vanish.
    counts = (gradient > 0) & (denominator != 0)
    share = gradient**2 / jnp.where(counts, denominator, 1.0)
    weights = jnp.sum(
        jnp.where(counts, share * gradient, 0.0), axis=(1, 2), keepdims=True
    )
    maps = jnp.sum(weights * features, axis=-1)
    return jax.nn.relu(maps) if rectify else maps


def layer_cam(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, rectify: bool = True
) -> chex.Array:
    """``sum_k ReLU(dy/dA_k) * A_k``.

    Reference: Jiang et al., "LayerCAM: exploring hierarchical class activation maps
    for localization", 2021.
    """
    saliency.check_features(features)
    features = features.astype(jnp.float32)
    head_fn, features, _ = tokens.as_map(head_fn, features)
    gradient = class_gradient(head_fn, features, classes)
    maps = jnp.sum(jax.nn.relu(gradient) * features, axis=-1)
    return jax.nn.relu(maps) if rectify else maps


def random_map(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, key: chex.PRNGKey
) -> chex.Array:
    """The control: uniform draws in [0, 1), as coarse as the features.

    One key gives every image the same map; keys [N] give each its own.
    """
    del classes
    saliency.check_features(features)
    key = keys.check(key, features.shape[0])
    size = tokens.map_size(head_fn, features)
    if key.ndim == 0:
        return jnp.broadcast_to(
            jax.random.uniform(key, size), (features.shape[0], *size)
        )
    return jax.vmap(lambda k: jax.random.uniform(k, size))(key)
