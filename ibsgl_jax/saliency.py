"""Class saliency maps on features, and the class that competes with the true one.

A model is seen as ``logits = head_fn(features)``: everything before the tapped layer
is somebody else's business. Tokens [N, T, D] count as the map that ``tokens`` finds in
them. Imports jax, chex, numpy and ``tokens`` only; does no I/O.
"""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import tokens

HeadFn = Callable[[chex.Array], chex.Array]

WEIGHTINGS = ("elementwise", "pooled")


def class_saliency(
    head_fn: HeadFn,
    features: chex.Array,
    classes: chex.Array,
    *,
    weighting: str = "elementwise",
    rectify: bool = True,
) -> chex.Array:
    """The gradient saliency map of one class per image.

    ``L = ReLU(sum_k dy/dA_k * A_k)`` with ``y`` the raw logit of the class. With
    ``weighting="elementwise"`` the gradient is used as it is (HiResCAM); with
    ``"pooled"`` it is first averaged over space (Grad-CAM). The two coincide for a
    head of global average pooling and one linear layer.

    Args:
      head_fn: features [N, H, W, K] -> logits [N, C]; images must not interact (no
        batch statistics), because the gradient is taken of the sum over images.
      features: [N, H, W, K] or tokens [N, T, D] (``tokens``), any float dtype; the
        computation is in float32.
      classes: int [N], in [0, C). A class outside gives an all-zero map (nothing can
        be raised under jit).
      weighting: "elementwise" or "pooled".
      rectify: clip negative evidence to zero; False keeps the sign.

    Returns:
      float32 [N, H, W], differentiable in the features (twice, through head_fn).

    Raises:
      ValueError: unknown weighting.

    Reference: Algorithm 1, line 3, of "Improving Interpretability by Information
    Bottleneck Saliency Guided Localization", BMVC 2022. The paper prints the
    elementwise product; we offer Grad-CAM's average beside it.
    """
    chex.assert_rank(classes, 1)
    maps = class_saliencies(
        head_fn, features, classes[:, None], weighting=weighting, rectify=rectify
    )
    return maps[:, 0]


def class_saliencies(
    head_fn: HeadFn,
    features: chex.Array,
    classes: chex.Array,
    *,
    weighting: str = "elementwise",
    rectify: bool = True,
) -> chex.Array:
    """The saliency maps of several classes per image, from one forward pass.

    Args:
      head_fn, features, weighting, rectify: as in ``class_saliency``.
      classes: int [N, M].

    Returns:
      float32 [N, M, H, W].
    """
    return logits_and_saliencies(
        head_fn, features, classes, weighting=weighting, rectify=rectify
    )[1]


def logits_and_saliencies(
    head_fn: HeadFn,
    features: chex.Array,
    classes: chex.Array | Callable[[chex.Array], chex.Array],
    *,
    weighting: str = "elementwise",
    rectify: bool = True,
) -> tuple[chex.Array, chex.Array]:
    """Logits and saliency maps from the same forward pass through the head.

    Args:
      classes: int [N, M], or a function logits [N, C] -> int [N, M] for classes that
        depend on the logits (the runner-up, the prediction).

    Returns:
      (logits [N, C], maps float32 [N, M, H, W]).
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: choose one of {WEIGHTINGS}")
    check_features(features)
    features = features.astype(jnp.float32)
    head_fn, features, _ = tokens.as_map(head_fn, features)
    logits, vjp_fn = jax.vjp(head_fn, features)
    check_logits(logits)
    if callable(classes):
        classes = classes(logits)
    chex.assert_rank(classes, 2)

    def one_map(one_class):
        cotangent = jax.nn.one_hot(one_class, logits.shape[-1], dtype=logits.dtype)
        (gradient,) = vjp_fn(cotangent)
        if weighting == "pooled":
            gradient = jnp.mean(gradient, axis=(1, 2), keepdims=True)
        return jnp.sum(gradient * features, axis=-1)

    columns = (classes[:, i] for i in range(classes.shape[1]))
    maps = jnp.stack([one_map(column) for column in columns], axis=1)
    return logits, jax.nn.relu(maps) if rectify else maps


def check_features(features) -> None:
    """ValueError unless features are one array [N, H, W, K] or tokens [N, T, D]."""
    found = _described(features)
    if found is not None:
        raise ValueError(f"the features are {found}: give one array [N, H, W, K]")
    if len(features.shape) not in (3, 4):
        raise ValueError(
            f"features have shape {tuple(features.shape)}: a map needs [N, H, W, K], "
            "or tokens [N, T, D]; take a layer that has one"
        )


def check_logits(logits) -> None:
    """ValueError unless logits are one array of floats [N, C]."""
    found = _described(logits)
    if found is not None:
        place: str | int = "logits" if isinstance(logits, Mapping) else 0
        raise ValueError(
            f"the head returns {found}: it must return the logits [N, C] alone; pick "
            f"them, as lambda features: head_fn(features)[{place!r}] does"
        )
    if len(logits.shape) == 1:
        raise ValueError(
            f"the head returns shape {tuple(logits.shape)}, one logit per image: it "
            "must return [N, C]; for two classes targets.two_classes(head_fn)"
        )
    if len(logits.shape) != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"the head returns {logits.dtype}{list(logits.shape)}: it must return "
            "logits [N, C], floats"
        )


def _described(value) -> str | None:
    """What stands in an array's place; None for an array or the shape of one."""
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return None
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} with {', '.join(map(repr, value)) or 'nothing in it'}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"


def runner_up(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """The class other than the label with the highest logit.

    Args:
      logits: [N, C] with C >= 2.
      labels: int [N], or of a multi-label head all of an image's, [N, C] in {0, 1}.

    Returns:
      int32 [N]; the lowest index wins a tie. 0 where every class is a label.

    Reference: the paper's "non-ground truth class with the highest classification
    probability" (class p).
    """
    chex.assert_rank([logits, labels], [2, {1, 2}])
    if logits.shape[-1] < 2:
        raise ValueError(
            "runner_up needs at least two classes; logits have one: "
            "targets.two_classes(head_fn) makes two of it"
        )
    if labels.ndim == 2:
        chex.assert_equal_shape([logits, labels])
        is_label = labels.astype(bool)
    else:
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    # Even where every other logit is -inf, the label alone must be out of the running.
    others = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    return jnp.argmax(jnp.where(is_label, -jnp.inf, others), axis=-1).astype(jnp.int32)


def upsample(maps: chex.Array, size: tuple[int, int]) -> chex.Array:
    """Resize maps bilinearly to the image (half-pixel centres, clamped edges).

    Args:
      maps: [..., h, w].
      size: (H, W) of the image.

    Returns:
      [..., H, W]; larger maps are averaged down without antialiasing.
    """
    return jax.image.resize(
        maps, (*maps.shape[:-2], *size), method="bilinear", antialias=False
    )


def normalize(maps: chex.Array) -> chex.Array:
    """Each map divided by its own maximum; a map without a positive value becomes 0.

    Args:
      maps: [..., H, W], non-negative.

    Returns:
      [..., H, W] in [0, 1]; finite gradient everywhere.
    """
    peak = jax.lax.stop_gradient(jnp.max(maps, axis=(-2, -1), keepdims=True))
    positive = peak > 0
    # First by a constant: the derivative of x / y has y^-2, which overflows at 1e-20.
    maps = jnp.where(positive, maps / jnp.where(positive, peak, 1.0), 0.0)
    peak = jnp.max(maps, axis=(-2, -1), keepdims=True)
    return jnp.where(positive, maps / jnp.where(positive, peak, 1.0), 0.0)
