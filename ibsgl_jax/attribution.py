"""Every attribution method behind one interface: image-sized, chunked, jitted.

``attribute(method, features_fn, head_fn, images)`` is the door. The methods themselves
are plain functions that return their raw values: ``cams`` has those on features,
``gradients`` those on images, ``full_grad`` the one that needs the biases inside the
network. Imports jax, chex, numpy and this library only; does no I/O.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import convolutions, saliency
from ibsgl_jax import keys as random_keys
from ibsgl_jax.cams import (
    grad_cam,
    grad_cam_pp,
    hirescam,
    information_bottleneck,
    layer_cam,
    random_map,
)
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.full_grad import full_grad, full_gradients, make_tapped_fn
from ibsgl_jax.gradients import (
    RULES,
    LogitsFn,
    class_gradient,
    gradient,
    input_x_gradient,
    integrated_gradients,
    smooth_grad,
)
from ibsgl_jax.saliency import HeadFn

__all__ = [
    "CHANNELS",
    "FEATURE_METHODS",
    "IMAGE_METHODS",
    "METHODS",
    "RANDOM_METHODS",
    "RULES",
    "FeaturesFn",
    "HeadFn",
    "LogitsFn",
    "attribute",
    "check_classes",
    "class_gradient",
    "full_grad",
    "full_gradients",
    "grad_cam",
    "grad_cam_pp",
    "gradient",
    "hirescam",
    "information_bottleneck",
    "input_x_gradient",
    "integrated_gradients",
    "layer_cam",
    "make_attribution_fn",
    "make_tapped_fn",
    "predict",
    "random_map",
    "smooth_grad",
]

FeaturesFn = Callable[[chex.Array], chex.Array]

CHANNELS = ("abs_sum", "sum")

FEATURE_METHODS = {
    "ib": information_bottleneck,
    "hirescam": hirescam,
    "grad_cam": grad_cam,
    "grad_cam_pp": grad_cam_pp,
    "layer_cam": layer_cam,
    "random": random_map,
}
IMAGE_METHODS = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "smooth_grad": smooth_grad,
    "integrated_gradients": integrated_gradients,
    "full_grad": full_grad,
}
METHODS = FEATURE_METHODS | IMAGE_METHODS
RANDOM_METHODS = ("ib", "smooth_grad", "random")


def attribute(
    method: str,
    features_fn: FeaturesFn,
    head_fn: HeadFn,
    images: chex.Array,
    classes: chex.Array | None = None,
    *,
    key: chex.PRNGKey | None = None,
    moments: Moments | None = None,
    tapped_fn: Callable | None = None,
    channels: str = "abs_sum",
    chunk_size: int = 16,
    **options,
) -> chex.Array:
    """Where in each image the evidence for its class is.

    One jitted call, compiled once per method, functions, shapes and options; images go
    through it chunk by chunk, so that a thousand need the memory of ``chunk_size``
    beyond their own (and that of a copy where the chunks do not divide them). A map
    depends neither on the image's neighbours nor on its place.

    Args:
      method: a key of ``METHODS``.
      features_fn: images [N, H', W', 3] -> features [N, H, W, K] at the chosen layer.
      head_fn: features -> logits [N, C]. Both treat images independently. A callable
        pytree of arrays (``models.PooledLinear``, ``jax.tree_util.Partial``) hands its
        arrays over as arguments; any other callable is part of the compiled function,
        which is reused as long as you pass the same object.
      images: float [N, H', W', 3] as the model takes them, N >= 1.
      classes: int [N]; the predicted class of each image if None.
      key: for "ib", "smooth_grad" and "random": one key, and every image sees the same
        draws; or keys [N].
      moments: for "ib": ``feature_stats.moments`` of this layer over many images.
      tapped_fn: for "full_grad": see ``full_gradients`` and ``make_tapped_fn``.
      channels: how a method on images turns its values per channel into a map: the
        "abs_sum" of magnitudes, or the signed "sum".
      chunk_size: images worked on at once, >= 1. "ib" at an inner layer works on
        ``config.num_samples`` copies of each.
      **options: of the method (``METHODS[method]``): ``config`` of "ib", ``rectify``
        of the CAMs, ``num_steps``, ``rule`` and a number ``baseline`` of
        "integrated_gradients", ``num_samples`` and ``noise_level`` of "smooth_grad".

    Returns:
      float32 [N, H', W']. "ib": bits per pixel; the others in units of the logit or,
      for "full_grad" and "random", of no unit. Differentiable in images and functions
      except for "ib" and "random", which have no gradient.

    Raises:
      ValueError: unknown method; classes that do not fit the images or the model; a
        head without logits [N, C], or one logit for "ib"; a layer without [N, H, W, K]
        for a method on features; no key, moments or tapped_fn. It says what to give.

    Example:
      maps = attribute("hirescam", features_fn, head_fn, images)
    """
    _check_method(method, channels, moments, tapped_fn)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    images, classes = _check_arrays(images, classes)
    key = _check_key(method, key, images.shape[0])
    features_fn, head_fn = _as_pytree(features_fn), _as_pytree(head_fn)
    chunk_size = min(chunk_size, images.shape[0])
    if classes is not None and not isinstance(classes, jax.core.Tracer):
        logits = _predict.eval_shape(
            features_fn, head_fn, images, chunk_size=chunk_size
        )
        check_classes(classes, logits.shape[-1])
    return _attribute(
        features_fn,
        head_fn,
        _as_pytree(tapped_fn) if method == "full_grad" else None,
        images,
        classes,
        key,
        moments if method == "ib" else None,
        method=method,
        channels=channels,
        chunk_size=chunk_size,
        options=tuple(sorted(options.items())),
    )


def predict(
    features_fn: FeaturesFn,
    head_fn: HeadFn,
    images: chex.Array,
    *,
    chunk_size: int = 16,
) -> chex.Array:
    """Logits [N, C] of images [N, H', W', 3], in the memory of one chunk."""
    return _predict(
        _as_pytree(features_fn),
        _as_pytree(head_fn),
        jnp.asarray(images),
        chunk_size=min(chunk_size, len(images)),
    )


def check_classes(classes: chex.Array, num_classes: int) -> None:
    """ValueError unless every class is in [0, num_classes)."""
    for one_class in np.asarray(classes):
        if not 0 <= one_class < num_classes:
            raise ValueError(
                f"class {one_class} is out of range: the model's classes are 0 to "
                f"{num_classes - 1}"
            )


def make_attribution_fn(
    method: str,
    features_fn: FeaturesFn,
    head_fn: HeadFn,
    *,
    key: chex.PRNGKey | None = None,
    moments: Moments | None = None,
    tapped_fn: Callable | None = None,
    channels: str = "abs_sum",
    **options,
) -> Callable[..., chex.Array]:
    """One method as a plain function: neither jitted, chunked nor checked.

    For callers with a jit of their own, and for ``jax.export``: the batch size may be
    symbolic, and every platform gets the form that is fast there. Several of them
    under one jit share the pass through the network.

    The arguments are those of ``attribute``.

    Returns:
      (images, classes=None) -> float32 maps [N, H', W'].
    """

    _check_method(method, channels, moments, tapped_fn)

    def logits_fn(images):
        return _logits(features_fn, head_fn, images)

    def attribution_fn(images, classes=None):
        size = images.shape[1:3]
        features = features_fn(images)
        if classes is None:
            logits = head_fn(features)
            saliency.check_logits(logits)
            classes = jnp.argmax(logits, axis=-1)
        arguments = dict(options)
        if method in RANDOM_METHODS:
            arguments["key"] = _check_key(method, key, images.shape[0])
        if method == "ib":
            arguments["moments"] = moments
        if method in FEATURE_METHODS:
            maps = METHODS[method](head_fn, features, classes, **arguments)
            if method == "ib":  # bits per cell -> bits per pixel
                maps = maps * (maps.shape[1] * maps.shape[2] / (size[0] * size[1]))
            maps = saliency.upsample(maps, size)
        elif method == "full_grad":
            maps = full_grad(tapped_fn, images, classes, **arguments)
        else:
            maps = METHODS[method](logits_fn, images, classes, **arguments)
            maps = maps.astype(jnp.float32)
            maps = jnp.sum(jnp.abs(maps) if channels == "abs_sum" else maps, axis=-1)
        return maps.astype(jnp.float32)

    # The chunks, the bottleneck's steps and the sums over noise or path are loops.
    return convolutions.fast_on_cpu(attribution_fn)


@functools.partial(
    jax.jit, static_argnames=("method", "channels", "chunk_size", "options")
)
def _attribute(
    features_fn,
    head_fn,
    tapped_fn,
    images,
    classes,
    key,
    moments,
    *,
    method,
    channels,
    chunk_size,
    options,
):
    shared_key = key is None or key.ndim == 0

    def explain(chunk):
        images, classes, keys = chunk
        attribution_fn = make_attribution_fn(
            method,
            features_fn,
            head_fn,
            key=key if shared_key else keys,
            moments=moments,
            tapped_fn=tapped_fn,
            channels=channels,
            **dict(options),
        )
        return attribution_fn(images, classes)

    keys = None if shared_key else key
    return _map_chunks(explain, (images, classes, keys), chunk_size)


@functools.partial(jax.jit, static_argnames="chunk_size")
def _predict(features_fn, head_fn, images, *, chunk_size):
    return _map_chunks(lambda x: _logits(features_fn, head_fn, x), images, chunk_size)


def _logits(features_fn, head_fn, images):
    logits = head_fn(features_fn(images))
    saliency.check_logits(logits)
    return logits


def _map_chunks(fn, batch, chunk_size):
    """fn over chunks of the leading axis, one after the other.

    The last chunk is filled up with copies of the last example.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    num_chunks = -(-size // chunk_size)
    if num_chunks == 1:
        return fn(batch)
    padding = num_chunks * chunk_size - size

    def split(x):
        if padding:
            x = jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)])
        return x.reshape(num_chunks, chunk_size, *x.shape[1:])

    def join(x):
        return x.reshape(num_chunks * chunk_size, *x.shape[2:])[:size]

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, batch)))


def _check_method(method, channels, moments, tapped_fn):
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    if channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}: choose one of {CHANNELS}")
    if method == "ib" and moments is None:
        raise ValueError(
            "method 'ib' needs moments: feature_stats.moments of the layer's features "
            "on many images"
        )
    if method == "full_grad" and tapped_fn is None:
        raise ValueError(
            "method 'full_grad' needs tapped_fn, which shows the network's biases: "
            "attribution.make_tapped_fn(model, variables) builds it for a Linen model"
        )


def _check_arrays(images, classes):
    """Images and classes as arrays, with shapes and dtypes that a method can take."""
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[0] < 1:
        raise ValueError(f"images of shape {images.shape}: give [N, H, W, 3], N >= 1")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}: give floats, preprocessed for the model"
        )
    if classes is not None:
        classes = jnp.asarray(classes)
        if classes.shape != images.shape[:1]:
            raise ValueError(
                f"classes has shape {classes.shape} for {images.shape[0]} images: "
                "give one class per image"
            )
        if not jnp.issubdtype(classes.dtype, jnp.integer):
            raise ValueError(f"classes are {classes.dtype}: give integers")
    return images, classes


def _check_key(method, key, num_images):
    """A typed key [] or keys [N], or None where the method draws nothing."""
    if method not in RANDOM_METHODS:
        return None
    if key is None:
        raise ValueError(
            f"method {method!r} draws at random: give key=jax.random.key(0)"
        )
    return random_keys.check(key, num_images)


def _as_pytree(fn):
    """A callable that jit takes as an argument: a pytree of arrays, or static."""
    leaves = jax.tree.leaves(fn)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fn
    return jax.tree_util.Partial(fn)
