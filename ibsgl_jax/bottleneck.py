"""Information-bottleneck attribution: how many bits of each feature a class needs.

Noise is mixed into the features until the class is just still recognised; what has to
be let through is the map. Schulz et al., "Restricting the Flow: Information Bottlenecks
for Attribution", ICLR 2020 (IBA below). Many images at a time, each independent of its
neighbours; finite at any alpha. Imports jax, flax (through PooledLinear),
optax, chex and numpy only; does no I/O.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibsgl_jax import chunks, keys, saliency, targets, tokens
from ibsgl_jax.adam import make_adam
from ibsgl_jax.blur import make_blur
from ibsgl_jax.bottleneck_config import FAST, MAX_FEATURE, MIN_STD, BottleneckConfig
from ibsgl_jax.convolutions import fast_on_cpu
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.models.heads import PooledLinear
from ibsgl_jax.saliency import HeadFn

__all__ = [
    "FAST",
    "MIN_STD",
    "Attribution",
    "BottleneckConfig",
    "attribute",
    "capacity",
    "make_blur",
    "noise_share",
]

# The smallest share of noise: its log is finite, and so is its reciprocal times beta.
MIN_REST = 1e-30
# Elements of features that a CPU takes at a time: up to so many XLA leaves to one
# thread; handing parts of a step to a second one costs more than it saves.
CPU_PIECE = 2**14
# Images that a CPU takes at a time at most, and where one image has more elements.
CPU_IMAGES = 8
# Elements of features that a TPU takes at a time: eight float32 arrays of them, the
# loop's state and what it computes, then fit into the 128 MiB beside its cores.
TPU_PIECE = 2**21


class Attribution(NamedTuple):
    """What ``attribute`` returns.

    Attributes:
      capacity: float32 [N, H, W, K], nats; 0 where the element is inactive.
      saliency: float32 [N, H, W], bits: capacity summed over channels, at the
        resolution of the features. For bits per image pixel, upsample and multiply by
        (H W) / (H' W').
      alpha: float32 [N, H, W, K] after the last step. The map is read one step before
        it, where the reference code reads it.
      losses: float32 [num_steps, N], cross-entropy plus beta * mean capacity, each
        before its update.
    """

    capacity: chex.Array
    saliency: chex.Array
    alpha: chex.Array
    losses: chex.Array


def attribute(
    key: chex.PRNGKey,
    head_fn: HeadFn,
    features: chex.Array,
    labels: chex.Array,
    moments: Moments,
    *,
    config: BottleneckConfig | None = None,
    noise: chex.Array | None = None,
    loss: str | targets.LossFn = "softmax",
) -> Attribution:
    """The bottleneck attribution of one class per image.

    Minimises, per image, ``mean_s loss(head(Z_s), label) + beta * mean(capacity)`` over
    alpha, with ``Z = lam R + (1 - lam) eps``, ``eps ~ N(mean, std^2)`` and
    ``lam = blur(sigmoid(alpha))``.

    Args:
      key: one key, and every image sees the same draws, so that its map depends neither
        on its neighbours nor on its place in the batch; or keys [N], one per image.
      head_fn: features [N, H, W, K] -> logits [N, C], images independent. A
        ``models.PooledLinear`` takes the exact shortcut: only the spatial mean of the
        noise reaches the logits and that is drawn directly (not with ``relu`` or
        injected noise). Any other head is called on [N * num_samples, H, W, K].
      features: [N, H, W, K], any float dtype; the computation is in float32. Beyond
        1e9 in size, features and moments count as 1e9. Or tokens [N, T, D] with moments
        [T, D]: what is returned is then on their grid (``tokens``), [N, h, w, D], and
        the prefix has no noise.
      labels: int [N], the class to attribute, in [0, C); or what ``loss`` takes.
      moments: of the same layer on many images, from ``feature_stats.moments``.
      config: ``BottleneckConfig()`` if None.
      noise: standard-normal draws [num_steps, num_samples, N, H, W, K] to inject in
        place of the key's.
      loss: "softmax", the cross-entropy of the class; "sigmoid", the binary one of the
        label alone, for heads with several labels or one logit; or what the features
        are to keep, as a function (outputs [N, ...], labels [N, ...]) -> [N], lower for
        better, of whatever the head returns: images independent.

    Returns:
      An ``Attribution``. No gradient flows from it into features or head.

    Raises:
      ValueError: features that are neither, no key, an unknown loss or one that gives
        no [N], or a head that returns no logits [N, C], C >= 2 for "softmax".

    Reference: Schulz et al., ICLR 2020, equations 5 to 9 and the published code. Where
    we differ: 1 - lambda is computed as such and bounded away from zero, so that the
    logarithm is finite in float32 at any alpha.
    """
    config = config or BottleneckConfig()
    saliency.check_features(features)
    head_fn, features, layout = tokens.as_map(head_fn, features.astype(jnp.float32))
    moments = Moments(*(tokens.to_map(m, layout) for m in moments))
    if not callable(loss):
        chex.assert_rank(labels, 1)
    chex.assert_equal_shape_prefix([features, labels], 1)
    for moment in moments:
        chex.assert_shape(moment, features.shape[1:])
    if noise is not None:
        chex.assert_shape(
            noise, (config.num_steps, config.num_samples, *features.shape)
        )
    features = jax.lax.stop_gradient(features)
    features = jnp.clip(features, -MAX_FEATURE, MAX_FEATURE)
    mean, std, active = (m[:, :, None] for m in jax.lax.stop_gradient(moments))
    mean = jnp.clip(mean, -MAX_FEATURE, MAX_FEATURE)
    # Not a minimum: the variance of features beyond 1e19 overflows, to NaN at last.
    std = jnp.where(std < MAX_FEATURE, std, MAX_FEATURE)
    moments = Moments(mean, std, active)
    draws = noise
    if noise is None:
        draws = keys.split(keys.check(key, features.shape[0]), config.num_steps)
    if isinstance(head_fn, PooledLinear) and noise is None and not config.relu:
        solve = _solve_pooled
    else:
        solve = _solve_generic
    loss_fn = targets.make_loss_fn(loss)
    found = solve(head_fn, moments, config, features, labels, draws, loss_fn)
    return jax.lax.stop_gradient(found)


def _solve_generic(head_fn, moments, config, features, labels, draws, loss_fn):
    """``attribute`` for any head; draws [num_steps, ...] or keys for them."""
    shape = config.num_samples, *features.shape[1:]

    def noise_of(draw):
        if jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
            return keys.normal(draw, shape)
        return jnp.moveaxis(draw, 1, 0)

    features = _cells_first(features)
    blur = make_blur(features.shape[:2], config.blur_sigma)
    # In the loop a CPU would be slow at the gradients of a head's convolutions.
    value_and_grad = fast_on_cpu(
        _generic_value_and_grad(
            head_fn, features, labels, moments, blur, config, loss_fn
        )
    )
    return _descend(
        lambda alpha, draw: value_and_grad(alpha, noise_of(draw)),
        blur,
        features,
        moments,
        config,
        draws,
    )


def _solve_pooled(head_fn, moments, config, features, labels, draws, loss_fn):
    """``attribute`` for a pooled linear head, in the form that suits the platform."""
    # So few numbers are drawn at once; in the loop each draw has a cost of its own.
    shape = config.num_samples, features.shape[-1]
    draws = jax.lax.map(lambda key: keys.normal(key, shape), draws)

    num_shards = chunks.num_shards(features)

    def solve_on(platform):
        def solve(features, labels, draws):
            features = _cells_first(features)
            blur = make_blur(features.shape[:2], config.blur_sigma, platform=platform)
            value_and_grad = _pooled_value_and_grad(
                head_fn,
                features,
                labels,
                moments,
                blur,
                config,
                loss_fn,
                platform=platform,
            )
            return _descend(value_and_grad, blur, features, moments, config, draws)

        num, *sides = features.shape
        size = piece_size((num // num_shards, *sides), platform=platform)
        whole = size * num_shards == num
        return solve if whole else _in_pieces(solve, size, num_shards)

    # Compiled for one platform, only its own form is lowered.
    return jax.lax.platform_dependent(
        features,
        labels,
        draws,
        cpu=solve_on("cpu"),
        tpu=solve_on("tpu"),
        default=solve_on("other"),
    )


def _descend(value_and_grad, blur, features, moments, config, draws):
    """Adam on alpha and the map at its end; features [H, W, N, K]."""
    tx = make_adam(config.learning_rate, config.num_steps)
    # Spread over devices as the features are, which full_like may leave out.
    alpha = jnp.where(True, jnp.float32(config.initial_alpha), features)

    def step(carry, draw):
        alpha, opt_state = carry
        loss, gradient = value_and_grad(alpha, draw)
        updates, opt_state = tx.update(gradient, opt_state)
        return (optax.apply_updates(alpha, updates), opt_state), loss

    # The last step stands outside the loop: its update never shows in the map, so a
    # caller who reads only the map does not pay for it (dead code under jit).
    carry, losses = jax.lax.scan(step, (alpha, tx.init(alpha)), draws[:-1])
    (final_alpha, _), last_loss = step(carry, draws[-1])
    alpha, _ = carry
    r_squared = _squared_deviation(features, moments, config)
    nats = capacity(noise_share(alpha, blur), r_squared, moments.active)
    nats = _cells_last(nats)
    return Attribution(
        capacity=nats,
        saliency=jnp.sum(nats, axis=-1) / np.log(2.0).astype(np.float32),
        alpha=_cells_last(final_alpha),
        losses=jnp.concatenate([losses, last_loss[None]]),
    )


def piece_size(shape: tuple[int, ...], *, platform: str) -> int:
    """How many of the images [N, H, W, K] a pooled linear head's loop takes at a time.

    N itself where the platform ("cpu", "tpu", ...) has no fast memory to keep them in,
    or N does not divide.
    """
    num, *sides = shape
    size = num
    # Powers of two: they fill the rows of registers and divide usual batches.
    if platform == "cpu":
        fitting = CPU_PIECE // math.prod(sides)
        size = min(_power_of_two(fitting), CPU_IMAGES) if fitting else CPU_IMAGES
    elif platform == "tpu":
        size = _power_of_two(max(1, TPU_PIECE // math.prod(sides)))
    # An exported function has a batch size without a number.
    return size if isinstance(num, int) and num and num % size == 0 else num


def _power_of_two(number: int) -> int:
    """The largest one up to number."""
    return 1 << (number.bit_length() - 1)


def _in_pieces(solve, size, num_shards):
    """``solve`` for ``size`` images at a time, whose working set stays in fast memory.

    That is a CPU's cache or the memory beside a TPU's cores; the main memory is then
    read once, not in every step. Memory is bounded as well. Fewer images would read a
    wide head's weights too often.
    """

    def solve_in_pieces(features, labels, draws):
        own = None if draws.shape[1] == 1 else jnp.moveaxis(draws, 1, 0)

        def solve_piece(piece):
            features, labels, own = piece
            noise = draws if own is None else jnp.moveaxis(own, 0, 1)
            found = solve(features, labels, noise)
            return found._replace(losses=found.losses.T)

        found = chunks.map_chunks(
            solve_piece, (features, labels, own), size, num_shards=num_shards
        )
        return found._replace(losses=found.losses.T)

    return solve_in_pieces


def capacity(
    rest: chex.Array, r_squared: chex.Array, active: chex.Array | bool = True
) -> chex.Array:
    """The information that each element lets through, in nats.

    ``-1/2 (1 + log rest^2 - (lam r)^2 - rest^2)`` with ``lam = 1 - rest``: the
    Kullback-Leibler divergence of the mixed feature from pure noise.

    Args:
      rest: share of noise, 1 - lambda, in (0, 1], any shape.
      r_squared: the squared deviation ((R - mean) / std)^2, same shape.
      active: inactive elements carry nothing.

    Returns:
      The same shape, >= 0 up to rounding (about 1e-7).
    """
    through = jnp.square(1.0 - rest) * r_squared + jnp.square(rest)
    return jnp.where(active, 0.5 * (through - 1.0) - jnp.log(rest), 0.0)


def noise_share(
    alpha: chex.Array, blur: Callable[[chex.Array], chex.Array]
) -> chex.Array:
    """``1 - lambda`` of alpha [H, W, N, K], computed as ``blur(sigmoid(-alpha))``.

    The blur's weights add up to one, so this equals ``1 - blur(sigmoid(alpha))``
    without that difference's rounding to zero (in float32 from alpha = 17).
    """
    return jnp.clip(blur(jax.nn.sigmoid(-alpha)), MIN_REST, 1.0)


# Inside the loop the cells come first: features and alpha are [H, W, N, K], moments
# [H, W, 1, K]. A blur is then a matrix product without moving axes, a spatial mean a
# sum over whole rows; on a CPU that halves the time of a step.


def _cells_first(maps: chex.Array) -> chex.Array:
    return jnp.moveaxis(maps, 0, 2)


def _cells_last(maps: chex.Array) -> chex.Array:
    return jnp.moveaxis(maps, 2, 0)


def _squared_deviation(features, moments, config):
    std = jnp.maximum(moments.std, config.min_std)
    return jnp.square((features - moments.mean) / std)


def _generic_value_and_grad(head_fn, features, labels, moments, blur, config, loss_fn):
    """Loss [N] and its gradient for any head, by autodiff through the noisy copies."""
    height, width, _, num_channels = features.shape
    std = config.noise_scale * jnp.maximum(moments.std, config.min_std)
    r_squared = _squared_deviation(features, moments, config)

    def total_loss(alpha, noise):
        rest = noise_share(alpha, blur)
        signal = _cells_last((1.0 - rest) * features + rest * moments.mean)
        mixed = signal[:, None] + _cells_last(rest * std)[:, None] * noise
        mixed = jnp.where(_cells_last(moments.active)[:, None], mixed, 0.0)
        if config.relu:
            mixed = jax.nn.relu(mixed)
        outputs = head_fn(mixed.reshape(-1, height, width, num_channels))
        cross_entropy = loss_fn(outputs, labels, config.num_samples)
        nats = jnp.mean(capacity(rest, r_squared, moments.active), axis=(0, 1, 3))
        loss = jnp.mean(cross_entropy, axis=1) + config.beta * nats
        # The images are independent: the gradient of the sum is each one's own.
        return jnp.sum(loss), loss

    def value_and_grad(alpha, noise):
        (_, loss), gradient = jax.value_and_grad(total_loss, has_aux=True)(alpha, noise)
        return loss, gradient

    return value_and_grad


def _pooled_value_and_grad(
    head_fn,
    features,
    labels,
    moments,
    blur,
    config,
    loss_fn,
    *,
    platform=None,
):
    """Loss [N] and its gradient for a pooled linear head, in closed form.

    The noise reaches the logits only through its spatial mean, a Gaussian with
    per-channel mean ``mean_hw(lam R + (1 - lam) mean)`` and standard deviation
    ``sqrt(sum_hw ((1 - lam) std)^2) / (H W)``; one draw per channel stands for H x W of
    them (local reparameterisation, Kingma et al. 2015). The gradient is written out:
    it needs no logarithm, so a caller who does not read the losses never computes one.
    """
    height, width, _, num_channels = features.shape
    cells = height * width
    kernel = head_fn.kernel.astype(jnp.float32)
    bias = head_fn.bias.astype(jnp.float32)
    # Inactive elements are zero in the mixture: no mean, no noise, no offset.
    mean = jnp.mean(jnp.where(moments.active, moments.mean, 0.0), axis=(0, 1))
    offset = jnp.where(moments.active, features - moments.mean, 0.0)
    variance = jnp.square(jnp.maximum(moments.std, config.min_std))
    variance = jnp.where(moments.active, variance, 0.0)
    if platform == "cpu":
        # For every image: in the loop, a factor that the images share would keep a CPU
        # from vectorising all of its expression.
        variance = jnp.broadcast_to(variance, features.shape)
    transposed_blur = jax.linear_transpose(blur, features)
    ones = jnp.ones((cells,), jnp.float32)

    def sum_cells(x):
        # As a product of matrices: XLA's own column sum is slower on a CPU.
        merged = platform == "cpu" and not chunks.has_spread_axis(x)
        columns = x.reshape(cells, *((-1,) if merged else x.shape[2:]))
        total = jnp.tensordot(ones, columns, 1, precision="highest")
        return total.reshape(x.shape[2:])

    def value_and_grad(alpha, noise):
        noise = config.noise_scale * noise
        active = variance > 0
        r_squared = jnp.square(offset) / jnp.where(active, variance, 1.0)
        complement = jax.nn.sigmoid(-alpha)
        rest = jnp.clip(blur(complement), MIN_REST, 1.0)
        lam = 1.0 - rest
        spatial_mean = mean + sum_cells(lam * offset) / cells
        spread = jnp.sqrt(sum_cells(jnp.square(rest) * variance)) / cells

        def loss_of(spatial_mean, spread):
            pooled = spatial_mean[:, None] + spread[:, None] * noise
            logits = jnp.matmul(pooled, kernel, precision="highest")
            logits += bias[None, None]
            logits = logits.reshape(-1, logits.shape[-1])
            return jnp.mean(loss_fn(logits, labels, noise.shape[1]), axis=1)

        cross_entropy, vjp_fn = jax.vjp(loss_of, spatial_mean, spread)
        by_mean, by_spread = vjp_fn(jnp.ones_like(cross_entropy))
        # A channel without noise has no spread to change: 0, not 0 / 0.
        noisy = spread > 0
        by_spread = jnp.where(noisy, by_spread / jnp.where(noisy, spread, 1.0), 0.0)
        by_lam = (
            (by_mean / cells)[None, None] * offset
            - (by_spread / cells**2)[None, None] * rest * variance
            + jnp.where(active, 1.0 / rest + lam * r_squared - rest, 0.0)
            * (config.beta / (cells * num_channels))
        )
        (by_complement,) = transposed_blur(-by_lam)
        nats = jnp.mean(capacity(rest, r_squared, active), axis=(0, 1, 3))
        loss = cross_entropy + config.beta * nats
        return loss, -by_complement * complement * (1.0 - complement)

    return value_and_grad
