"""Every attribution method behind one interface: image-sized, chunked, jitted.

``attribute(method, features_fn, head_fn, images)`` is the door. The methods themselves
are plain functions that return their raw values: maps at the features' resolution from
``(head_fn, features, classes)``, or values per image channel from
``(logits_fn, images, classes)``. Imports jax, flax, chex and numpy only; does no I/O.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ibsgl_jax import bottleneck, convolutions, saliency
from ibsgl_jax.bottleneck import BottleneckConfig
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.saliency import HeadFn

FeaturesFn = Callable[[chex.Array], chex.Array]
LogitsFn = Callable[[chex.Array], chex.Array]

CHANNELS = ("abs_sum", "sum")
RULES = ("gausslegendre", "riemann_trapezoid", "riemann_middle")


# Methods on features: maps [N, H, W] at the features' resolution.


def information_bottleneck(
    head_fn: HeadFn,
    features: chex.Array,
    classes: chex.Array,
    *,
    key: chex.PRNGKey,
    moments: Moments,
    config: BottleneckConfig | None = None,
) -> chex.Array:
    """Bits per cell of the features: ``bottleneck.attribute``'s map, no gradient."""
    return bottleneck.attribute(
        key, head_fn, features, classes, moments, config=config
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
    features = features.astype(jnp.float32)
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
    features = features.astype(jnp.float32)
    gradient = class_gradient(head_fn, features, classes)
    maps = jnp.sum(jax.nn.relu(gradient) * features, axis=-1)
    return jax.nn.relu(maps) if rectify else maps


def random_map(
    head_fn: HeadFn, features: chex.Array, classes: chex.Array, *, key: chex.PRNGKey
) -> chex.Array:
    """The control: uniform draws in [0, 1), as coarse as the features.

    One key gives every image the same map; keys [N] give each its own.
    """
    del head_fn, classes
    size = features.shape[1:3]
    if key.ndim == 0:
        return jnp.broadcast_to(
            jax.random.uniform(key, size), (features.shape[0], *size)
        )
    return jax.vmap(lambda k: jax.random.uniform(k, size))(key)


# Methods on images: signed values [N, H', W', 3], one per channel.


def class_gradient(
    logits_fn: LogitsFn, inputs: chex.Array, classes: chex.Array
) -> chex.Array:
    """Gradient of each image's class logit in the inputs (images or features)."""
    logits, vjp_fn = jax.vjp(logits_fn, inputs)
    chex.assert_rank([logits, classes], [2, 1])
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
    return images * class_gradient(logits_fn, images, classes)


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
    low = jnp.min(images, axis=(1, 2, 3), keepdims=True)
    high = jnp.max(images, axis=(1, 2, 3), keepdims=True)
    std = noise_level * jax.lax.stop_gradient(high - low)

    def add_sample(total, sample):
        noise = _normal(_fold_in(key, sample), images.shape)
        return total + class_gradient(logits_fn, images + std * noise, classes), None

    total, _ = jax.lax.scan(add_sample, jnp.zeros_like(images), jnp.arange(num_samples))
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
    points, weights = _quadrature(rule, num_steps)
    offset = images - baseline

    def add_point(total, point_and_weight):
        point, weight = point_and_weight
        at_point = class_gradient(logits_fn, baseline + point * offset, classes)
        return total + weight * at_point, None

    total, _ = jax.lax.scan(add_point, jnp.zeros_like(images), (points, weights))
    return offset * total


def _quadrature(rule: str, num_steps: int) -> tuple[chex.Array, chex.Array]:
    """Points in [0, 1] and their weights, float32 [num_steps] each."""
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
    return jnp.asarray(points, jnp.float32), jnp.asarray(weights, jnp.float32)


# FullGrad needs the biases inside the network, which a bare function does not show.


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
        saliency.upsample(jnp.sum(_unit_range(jnp.abs(values)), axis=-1), size)
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

        def tap(next_fn, args, kwargs, context):
            layer = context.module
            if context.method_name != "__call__" or not (
                isinstance(layer, nn.BatchNorm)
                or (isinstance(layer, nn.Conv | nn.Dense) and layer.use_bias)
            ):
                return next_fn(*args, **kwargs)
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


# One interface.

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
      ValueError: unknown method, classes that do not fit the images or the model, or a
        missing key, moments or tapped_fn; the line says what to give.

    Example:
      head_fn = models.make_head_fn(model, variables)
      maps = attribute("hirescam", features_fn, head_fn, images)
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: choose one of {', '.join(METHODS)}")
    if channels not in CHANNELS:
        raise ValueError(f"channels={channels!r}: choose one of {CHANNELS}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
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
    key = _check_key(method, key, images.shape[0])
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

    For callers with a jit of their own, and for ``jax.export``; the batch size may be
    symbolic. Several of them under one jit share the pass through the network. The
    arguments are those of ``attribute``.

    Returns:
      (images, classes=None) -> float32 maps [N, H', W'].
    """

    def logits_fn(images):
        return head_fn(features_fn(images))

    def attribution_fn(images, classes=None):
        size = images.shape[1:3]
        features = features_fn(images)
        if classes is None:
            classes = jnp.argmax(head_fn(features), axis=-1)
        arguments = dict(options)
        if method in RANDOM_METHODS:
            arguments["key"] = key
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
            maps = jnp.sum(jnp.abs(maps) if channels == "abs_sum" else maps, axis=-1)
        return maps.astype(jnp.float32)

    # The chunks, the bottleneck's steps and the sums over noise or path are loops.
    return convolutions.in_fast_order(attribution_fn)


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
    return _map_chunks(lambda x: head_fn(features_fn(x)), images, chunk_size)


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


def _check_key(method, key, num_images):
    """A typed key [] or keys [N], or None where the method draws nothing."""
    if method not in RANDOM_METHODS:
        return None
    if key is None:
        raise ValueError(
            f"method {method!r} draws at random: give key=jax.random.key(0)"
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (num_images,)):
        raise ValueError(
            f"key has shape {key.shape}: give one key or {num_images}, one per image"
        )
    return key


def _fold_in(key, data):
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def _normal(key, shape):
    """Draws [1, ...] that all images share, or [N, ...] from keys [N]."""
    if key.ndim == 0:
        return jax.random.normal(key, (1, *shape[1:]))
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(key)


def _as_pytree(fn):
    """A callable that jit takes as an argument: a pytree of arrays, or static."""
    leaves = jax.tree.leaves(fn)
    if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
        return fn
    return jax.tree_util.Partial(fn)
