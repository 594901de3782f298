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

from ibsgl_jax import convolutions, saliency, targets, tokens
from ibsgl_jax import keys as random_keys
from ibsgl_jax.cams import (
    grad_cam,
    grad_cam_pp,
    hirescam,
    information_bottleneck,
    layer_cam,
    random_map,
)
from ibsgl_jax.chunks import (
    as_pytree,
    batch_sharding,
    is_traced,
    map_chunks,
    num_shards,
)
from ibsgl_jax.feature_stats import FeatureStats, Moments
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
    target: targets.Target | None = None,
    output: targets.Output | None = None,
    **options,
) -> chex.Array:
    """Where in each image the evidence for its class is.

    One jitted call, compiled once per method, functions, shapes and options; images go
    through it in the memory of ``chunk_size`` of them (and of a copy where the chunks
    do not divide them). A map depends neither on neighbours nor on the place.

    Args:
      method: a key of ``METHODS``.
      features_fn: images -> features [N, H, W, K] of the layer, or tokens [N, T, D].
      head_fn: features -> logits [N, C]. Both treat images independently. A callable
        pytree of arrays (``models.PooledLinear``, ``jax.tree_util.Partial``) hands its
        arrays over as arguments; any other callable is part of the compiled function,
        which is reused as long as you pass the same object.
      images: float [N, H', W', 3] as the model takes them, N >= 1.
      classes: int [N]; the predicted ones if None; or [N, M], several of each image.
        With a target: [N, ...], what it takes.
      key: for ``RANDOM_METHODS``: one, and all images see the same draws; or keys [N].
      moments: for "ib": ``feature_stats.moments`` of the layer on many images.
      tapped_fn: for "full_grad": see ``full_gradients`` and ``make_tapped_fn``.
      channels: a method on images gives the "abs_sum" over channels, or the "sum".
      chunk_size: images worked on at once, >= 1, on each device that they are spread
        over. "ib" at an inner layer works on ``config.num_samples`` copies of each.
      target: of another number than a class's logit: output -> [N], or (output,
        classes) -> [N]; images independent. Not for "ib", which takes a ``loss``.
      output: place or key of the logits, or a function of what the head returns.
      **options: of the method (``METHODS[method]``): ``config`` and ``loss`` of "ib",
        ``rectify`` of the CAMs, ``num_steps``, ``rule`` and a number ``baseline`` of
        "integrated_gradients", ``num_samples`` and ``noise_level`` of "smooth_grad".

    Returns:
      float32 [N, H', W'], or [N, M, H', W']. "ib": bits per pixel; "full_grad" and
      "random": no unit; the others: the logit's. "ib" and "random" have no gradient.

    Raises:
      ValueError: what does not fit, in a line that says what to give.

    Example:
      maps = attribute("hirescam", features_fn, head_fn, images)
    """
    _check_method(method, channels, moments, tapped_fn, target)
    are_classes = target is None and not callable(options.get("loss"))
    images = _check_images(images, chunk_size)
    classes = _check_arrays(images, classes, are_classes)
    key = _check_key(method, key, images.shape[0])
    features_fn, head_fn = as_pytree(features_fn), as_pytree(head_fn)
    sizes = {"chunk_size": chunk_size, "num_shards": num_shards(images)}
    if are_classes and _is_readable(classes):
        shape_fn = functools.partial(_predict.eval_shape, output=output, **sizes)
        check_classes(classes, shape_fn(features_fn, head_fn, images).shape[-1])
    return _attribute(
        features_fn,
        head_fn,
        as_pytree(tapped_fn) if method == "full_grad" else None,
        images,
        classes,
        key,
        moments if method == "ib" else None,
        method=method,
        channels=channels,
        options=_static(**options, target=target, output=output),
        **sizes,
    )


def predict(
    features_fn: FeaturesFn,
    head_fn: HeadFn,
    images: chex.Array,
    *,
    chunk_size: int = 16,
    output: targets.Output | None = None,
) -> chex.Array:
    """Logits [N, C] of images [N, H', W', 3], in the memory of one chunk.

    ``output`` is that of ``attribute``.
    """
    images = _check_images(images, chunk_size)
    return _predict(
        as_pytree(features_fn),
        as_pytree(head_fn),
        images,
        chunk_size=chunk_size,
        num_shards=num_shards(images),
        output=output,
    )


def check_classes(classes: chex.Array, num_classes: int) -> None:
    """ValueError unless every class is in [0, num_classes)."""
    for one_class in np.asarray(classes).flat:
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
    target: targets.Target | None = None,
    output: targets.Output | None = None,
    **options,
) -> Callable[..., chex.Array]:
    """One method as a plain function: neither jitted, chunked nor checked.

    For callers with a jit of their own, and for ``jax.export``: the batch size may be
    symbolic, and every platform gets the form that is fast there. Several of them
    under one jit share the pass through the network.

    The arguments are those of ``attribute``.

    Returns:
      (images, classes=None) -> float32 maps [N, H', W'], or [N, M, H', W'].
    """

    _check_method(method, channels, moments, tapped_fn, target)
    has_loss = callable(options.get("loss"))

    def tapped_target_fn(images, perturbations, given):
        outputs, biases = tapped_fn(images, perturbations)
        value_fn = targets.pick(lambda outputs: outputs, output)
        if target is not None:
            value_fn = targets.scalar(value_fn, target, given)
        return value_fn(outputs), biases

    def one_map(images, given, features, head, classes):
        size = images.shape[1:3]
        arguments = dict(options)
        if method in RANDOM_METHODS:
            arguments["key"] = _check_key(method, key, images.shape[0])
        if method == "ib":
            arguments["moments"] = moments
        if method in FEATURE_METHODS:
            maps = METHODS[method](head, features, classes, **arguments)
            if method == "ib":  # bits per cell -> bits per pixel
                maps = maps * (maps.shape[1] * maps.shape[2] / (size[0] * size[1]))
            maps = saliency.upsample(maps, size)
        elif method == "full_grad":
            shown_fn = functools.partial(tapped_target_fn, given=given)
            maps = full_grad(shown_fn, images, classes, **arguments)
        else:
            maps = METHODS[method](
                lambda x: _logits(features_fn, head, x), images, classes, **arguments
            )
            maps = maps.astype(jnp.float32)
            maps = jnp.sum(jnp.abs(maps) if channels == "abs_sum" else maps, axis=-1)
        return maps.astype(jnp.float32)

    def attribution_fn(images, classes=None):
        given, features = classes, features_fn(images)
        head, layout = targets.pick(head_fn, output), None
        if method in FEATURE_METHODS:
            layout = tokens.layout_of(head, features, images.shape[1:3])
        if target is not None:
            head = targets.scalar(head, target, given)
        if layout is not None:
            head = tokens.on_grid(head, grid=layout.grid, prefix=layout.prefix)
        if target is not None or (has_loss and given is None):
            classes = jnp.zeros(images.shape[:1], jnp.int32)
        elif given is None:
            classes = jnp.argmax(_checked(head(features)), axis=-1)
        if target is not None or has_loss or classes.ndim == 1:
            return one_map(images, given, features, head, classes)
        # Of the passes up to the head, all alike, the compiler keeps one.
        columns = (classes[:, i] for i in range(classes.shape[1]))
        maps = [one_map(images, None, features, head, column) for column in columns]
        return jnp.stack(maps, axis=1)

    # The chunks, the bottleneck's steps and the sums over noise or path are loops.
    return convolutions.fast_on_cpu(attribution_fn)


@functools.partial(
    jax.jit,
    static_argnames=("method", "channels", "chunk_size", "num_shards", "options"),
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
    num_shards,
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
    batch = images, classes, keys
    return map_chunks(explain, batch, chunk_size, num_shards=num_shards)


@functools.partial(jax.jit, static_argnames=("chunk_size", "num_shards", "output"))
def _predict(features_fn, head_fn, images, *, chunk_size, num_shards, output=None):
    head_fn = targets.pick(head_fn, output)
    return map_chunks(
        lambda x: _logits(features_fn, head_fn, x),
        images,
        chunk_size,
        num_shards=num_shards,
    )


def _is_readable(classes):
    """Whether all classes are here and have values."""
    is_array = isinstance(classes, jax.Array) and not is_traced(classes)
    return is_array and classes.is_fully_addressable


def _logits(features_fn, head_fn, images):
    return _checked(head_fn(features_fn(images)))


def _checked(logits):
    saliency.check_logits(logits)
    return logits


def _check_method(method, channels, moments, tapped_fn, target):
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    if channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}: choose one of {CHANNELS}")
    if method == "ib" and target is not None:
        raise ValueError(
            "method 'ib' keeps a loss low and takes no target: give loss=, a function "
            "(outputs, classes) -> [N]"
        )
    if method == "ib" and moments is None:
        raise ValueError(
            "method 'ib' needs moments: feature_stats.moments of the layer's features "
            "on many images"
        )
    if method == "ib" and isinstance(moments, FeatureStats):
        raise ValueError("moments is a FeatureStats: give feature_stats.moments of it")
    if method == "full_grad" and tapped_fn is None:
        raise ValueError(
            "method 'full_grad' needs tapped_fn, which shows the network's biases: "
            "attribution.make_tapped_fn(model, variables) builds it for a Linen model"
        )


def _static(**options):
    """The options as jit takes them, in one order."""
    for name, value in options.items():
        if isinstance(value, jax.Array | np.ndarray | list):
            raise ValueError(
                f"{name} is an array of shape {np.shape(value)}: an option is part of "
                "the compiled function; give a number"
            )
    return tuple(sorted(options.items()))


def _check_images(images, chunk_size):
    """Images as an array, of one at least."""
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[0] < 1:
        raise ValueError(f"images of shape {images.shape}: give [N, H, W, 3], N >= 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    return images


def _check_arrays(images, classes, are_classes):
    """Classes as an array, if both have shapes and dtypes that a method can take."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}: give floats, preprocessed for the model"
        )
    if classes is not None:
        classes = jnp.asarray(classes)
        ranks = (1, 2) if are_classes else range(1, classes.ndim + 1)
        fits = classes.ndim in ranks and len(classes) == len(images)
        if not fits or (are_classes and not classes.size):
            raise ValueError(
                f"classes has shape {classes.shape} for {images.shape[0]} images: "
                "give one class per image, or [N, M]"
            )
        if are_classes and not jnp.issubdtype(classes.dtype, jnp.integer):
            raise ValueError(f"classes are {classes.dtype}: give integers")
        if batch_sharding(images) is not None:
            classes = jax.device_put(classes, batch_sharding(images))
    return classes


def _check_key(method, key, num_images):
    """A typed key [] or keys [N], or None where the method draws nothing."""
    if method not in RANDOM_METHODS:
        return None
    if key is None:
        raise ValueError(
            f"method {method!r} draws at random: give key=jax.random.key(0)"
        )
    return random_keys.check(key, num_images)
