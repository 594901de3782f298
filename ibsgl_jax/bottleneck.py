"""Information-bottleneck attribution: how many bits of each feature a class needs.

Noise is mixed into the features until the class is just still recognised; what has to
be let through is the map. Schulz et al., "Restricting the Flow: Information Bottlenecks
for Attribution", ICLR 2020 (IBA below). Many images at a time, each independent of its
neighbours; finite at any alpha. Imports jax, flax (through PooledLinear),
optax, chex and numpy only; does no I/O.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibsgl_jax.convolutions import in_fast_order
from ibsgl_jax.feature_stats import Moments
from ibsgl_jax.models.heads import PooledLinear
from ibsgl_jax.saliency import HeadFn

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
# Cells up to which a TPU blurs in one matrix product.
MAX_FLAT_CELLS = 256


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Options of the attribution; the defaults are those of IBA's reference code.

    Attributes:
      beta: weight of the mean capacity against the cross-entropy, >= 0.
      num_steps: Adam steps on alpha, >= 1. At the last layer 10 steps do not converge
        there (alpha moves by about 1 a step, from 5); 20 do.
      num_samples: noise draws per step, >= 1.
      learning_rate: of Adam, > 0.
      blur_sigma: standard deviation in cells of the Gaussian that smooths lambda, > 0,
        or None for no smoothing.
      initial_alpha: lambda starts at sigmoid(initial_alpha).
      min_std: features that vary less are treated as varying this much, > 0.
      active_threshold: for ``feature_stats.moments``; not read by ``attribute``.
      relu: clip the noisy features at zero before the head.
      noise_scale: the head sees noise of so many standard deviations, > 0. Below 1 a
        gradient from few samples varies less; the capacity is still that of full noise.
    """

    beta: float = 10.0
    num_steps: int = 10
    num_samples: int = 10
    learning_rate: float = 1.0
    blur_sigma: float | None = 1.0
    initial_alpha: float = 5.0
    min_std: float = 0.01
    active_threshold: float = 0.01
    relu: bool = False
    noise_scale: float = 1.0

    def __post_init__(self):
        for name in ("num_steps", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "min_std", "noise_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: must not be negative")
        if self.blur_sigma is not None and not self.blur_sigma > 0:
            raise ValueError(
                f"blur_sigma={self.blur_sigma}: must be positive, or None for no blur"
            )


# At an inner layer: eight passes behind it for one map, where the default takes ninety.
FAST = BottleneckConfig(
    num_steps=9, num_samples=1, learning_rate=1.5, initial_alpha=3.0, noise_scale=0.7
)


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
) -> Attribution:
    """The bottleneck attribution of one class per image.

    Minimises, per image, ``mean_s CE(head(Z_s), label) + beta * mean(capacity)`` over
    alpha, with ``Z = lam R + (1 - lam) eps``, ``eps ~ N(mean, std^2)`` and
    ``lam = blur(sigmoid(alpha))``.

    Args:
      key: one key, and every image sees the same draws, so that its map depends neither
        on its neighbours nor on its place in the batch; or keys [N], one per image.
      head_fn: features [N, H, W, K] -> logits [N, C], images independent. A
        ``models.PooledLinear`` takes the exact shortcut: only the spatial mean of the
        noise reaches the logits and that is drawn directly (not with ``relu`` or
        injected noise). Any other head is called on [num_samples * N, H, W, K].
      features: [N, H, W, K], any float dtype; the computation is in float32.
      labels: int [N], the class to attribute, in [0, C).
      moments: of the same layer on many images, from ``feature_stats.moments``.
      config: ``BottleneckConfig()`` if None.
      noise: standard-normal draws [num_steps, num_samples, N, H, W, K] to inject in
        place of the key's.

    Returns:
      An ``Attribution``. No gradient flows from it into features or head.

    Reference: Schulz et al., ICLR 2020, equations 5 to 9 and the published code. Where
    we differ: 1 - lambda is computed as such and bounded away from zero, so that the
    logarithm is finite in float32 at any alpha.
    """
    config = config or BottleneckConfig()
    chex.assert_rank([features, labels], [4, 1])
    chex.assert_equal_shape_prefix([features, labels], 1)
    for moment in moments:
        chex.assert_shape(moment, features.shape[1:])
    if noise is not None:
        chex.assert_shape(
            noise, (config.num_steps, config.num_samples, *features.shape)
        )
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
    moments = Moments(*(m[:, :, None] for m in jax.lax.stop_gradient(moments)))
    draws = _step_keys(key, config.num_steps) if noise is None else noise
    if isinstance(head_fn, PooledLinear) and noise is None and not config.relu:
        # So few numbers are drawn at once; in the loop each draw has a cost of its own.
        shape = config.num_samples, features.shape[-1]
        draws = jax.lax.map(lambda key: _normal(key, shape), draws)
        solve = functools.partial(
            _solve, head_fn, moments, config, _pooled_value_and_grad
        )
        size = piece_size(features.shape)
        if size != features.shape[0]:
            solve = _in_pieces(solve, size)
    else:
        solve = functools.partial(
            _solve, head_fn, moments, config, _generic_value_and_grad
        )
    return jax.lax.stop_gradient(solve(features, labels, draws))


def _solve(head_fn, moments, config, make_value_and_grad, features, labels, draws):
    """``attribute`` with its draws, or with keys for them, [num_steps, ...]."""
    features = _cells_first(features)
    blur = make_blur(features.shape[:2], config.blur_sigma)
    # In the loop below a CPU would be slow at the gradients of a head's convolutions.
    value_and_grad = in_fast_order(
        make_value_and_grad(head_fn, features, labels, moments, blur, config)
    )
    tx = make_adam(config.learning_rate, config.num_steps)
    alpha = jnp.full(features.shape, config.initial_alpha, jnp.float32)
    height, width, _, num_channels = features.shape
    noise_shape = (config.num_samples, height, width, num_channels)

    def step(carry, draw):
        alpha, opt_state = carry
        if jnp.issubdtype(draw.dtype, jax.dtypes.prng_key):
            draw = _normal(draw, noise_shape)
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


def piece_size(shape: tuple[int, ...]) -> int:
    """How many of the images [N, H, W, K] a pooled linear head's loop takes at a time.

    N itself where the device has no fast memory to keep them in, or N does not divide.
    """
    num, *sides = shape
    size, platform = num, jax.default_backend()
    # Powers of two: they fill the rows of registers and divide usual batches.
    if platform == "cpu":
        fitting = CPU_PIECE // math.prod(sides)
        size = min(_power_of_two(fitting), CPU_IMAGES) if fitting else CPU_IMAGES
    elif platform == "tpu":
        size = _power_of_two(max(1, TPU_PIECE // math.prod(sides)))
    # An exported function has a batch size without a number.
    return size if isinstance(num, int) and num % size == 0 else num


def _power_of_two(number: int) -> int:
    """The largest one up to number."""
    return 1 << (number.bit_length() - 1)


def _in_pieces(solve, size):
    """``solve`` for ``size`` images at a time, whose working set stays in fast memory.

    That is a CPU's cache or the memory beside a TPU's cores; the main memory is then
    read once, not in every step. Memory is bounded as well. Fewer images would read a
    wide head's weights too often.
    """

    def solve_in_pieces(features, labels, draws):
        num = len(labels) // size
        if draws.shape[2] == 1:
            draws = jnp.broadcast_to(draws, (num, *draws.shape))
        else:
            draws = jnp.stack(jnp.split(draws, num, axis=2))
        features, labels = (
            x.reshape(num, size, *x.shape[1:]) for x in (features, labels)
        )
        found = jax.lax.map(lambda part: solve(*part), (features, labels, draws))
        found = found._replace(losses=jnp.moveaxis(found.losses, 1, 2))
        found = Attribution(*(x.reshape(-1, *x.shape[2:]) for x in found))
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


def make_blur(
    size: tuple[int, int], sigma: float | None
) -> Callable[[chex.Array], chex.Array]:
    """A Gaussian blur of [H, W, ...] over its first two axes.

    The kernel is cut at ``2 round(2 sigma) + 1`` cells and normalised, the border
    reflected without repeating the edge, as in IBA's code; here as two small matrix
    products, which compile to less than a convolution of every channel. A TPU takes
    one, over all cells: axes that are flattened would change every array's layout.

    Args:
      size: (H, W).
      sigma: standard deviation in cells, or None for the identity.
    """
    if sigma is None:
        return lambda maps: maps
    rows, columns = (_blur_matrix(length, sigma) for length in size)
    num_cells = size[0] * size[1]
    if jax.default_backend() == "tpu" and num_cells <= MAX_FLAT_CELLS:
        matrix = np.kron(rows, columns)

        def blur_at_once(maps):
            cells = maps.reshape(num_cells, *maps.shape[2:])
            cells = jnp.tensordot(matrix, cells, 1, precision="highest")
            return cells.reshape(maps.shape)

        return blur_at_once
    # One copy of the matrix per row: a product of a batch is faster than the same
    # product after moving axes.
    columns = np.broadcast_to(columns, (size[0], *columns.shape))

    def blur(maps):
        flat = maps.reshape(size[0], -1)
        flat = jnp.matmul(rows, flat, precision="highest")
        flat = flat.reshape(*size, -1)
        return jnp.matmul(columns, flat, precision="highest").reshape(maps.shape)

    return blur


def make_adam(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam with exact bias corrections, for at most ``num_steps`` updates.

    ``optax.adam`` computes ``1 - 0.999^t`` in float32, wrong by up to 3e-5 of its value
    in the first steps. A head with ReLUs amplifies that: after ten steps alpha is off
    by 0.03 from a float64 run, with these tables by 0.0002. State and use are optax's.
    """
    steps = np.arange(1, num_steps + 1, dtype=np.float64)
    first_scales = jnp.asarray(1.0 / (1.0 - 0.9**steps), jnp.float32)
    second_scales = jnp.asarray(1.0 / (1.0 - 0.999**steps), jnp.float32)

    def init_fn(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=zeros, nu=zeros)

    def update_fn(updates, state, params=None):
        del params
        count, mu, nu = state
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, updates)
        nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, nu, updates)
        first, second = first_scales[count], second_scales[count]
        updates = jax.tree.map(
            lambda m, v: -learning_rate * first * m / (jnp.sqrt(second * v) + 1e-8),
            mu,
            nu,
        )
        return updates, optax.ScaleByAdamState(count + 1, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _blur_matrix(length: int, sigma: float) -> np.ndarray:
    """[length, length], row i the weights of output cell i."""
    radius = int(round(2 * sigma))
    weights = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / sigma))
    weights /= weights.sum()
    sources = np.pad(np.arange(length), radius, mode="reflect")
    matrix = np.zeros((length, length))
    for i in range(length):
        np.add.at(matrix[i], sources[i : i + 2 * radius + 1], weights)
    return matrix.astype(np.float32)


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


def _generic_value_and_grad(head_fn, features, labels, moments, blur, config):
    """Loss [N] and its gradient for any head, by autodiff through the noisy copies."""
    height, width, num_images, num_channels = features.shape
    std = config.noise_scale * jnp.maximum(moments.std, config.min_std)
    r_squared = _squared_deviation(features, moments, config)

    def total_loss(alpha, noise):
        rest = noise_share(alpha, blur)
        signal = _cells_last((1.0 - rest) * features + rest * moments.mean)
        mixed = signal + _cells_last(rest * std) * noise
        mixed = jnp.where(_cells_last(moments.active), mixed, 0.0)
        if config.relu:
            mixed = jax.nn.relu(mixed)
        logits = head_fn(mixed.reshape(-1, height, width, num_channels))
        logits = logits.reshape(config.num_samples, num_images, -1)
        cross_entropy = _cross_entropy(logits, labels)
        nats = jnp.mean(capacity(rest, r_squared, moments.active), axis=(0, 1, 3))
        loss = jnp.mean(cross_entropy, axis=0) + config.beta * nats
        # The images are independent: the gradient of the sum is each one's own.
        return jnp.sum(loss), loss

    def value_and_grad(alpha, noise):
        (_, loss), gradient = jax.value_and_grad(total_loss, has_aux=True)(alpha, noise)
        return loss, gradient

    return value_and_grad


def _pooled_value_and_grad(head_fn, features, labels, moments, blur, config):
    """Loss [N] and its gradient for a pooled linear head, in closed form.

    The noise reaches the logits only through its spatial mean, a Gaussian with
    per-channel mean ``mean_hw(lam R + (1 - lam) mean)`` and standard deviation
    ``sqrt(sum_hw ((1 - lam) std)^2) / (H W)``; one draw per channel stands for H x W of
    them (local reparameterisation, Kingma et al. 2015). The gradient is written out:
    it needs no logarithm, so a caller who does not read the losses never computes one.
    """
    height, width, _, num_channels = features.shape
    cells = height * width
    kernel, bias = head_fn.kernel, head_fn.bias
    # Inactive elements are zero in the mixture: no mean, no noise, no offset.
    mean = jnp.mean(jnp.where(moments.active, moments.mean, 0.0), axis=(0, 1))
    offset = jnp.where(moments.active, features - moments.mean, 0.0)
    variance = jnp.square(jnp.maximum(moments.std, config.min_std))
    variance = jnp.where(moments.active, variance, 0.0)
    if jax.default_backend() == "cpu":
        # For every image: in the loop, a factor that the images share would keep a CPU
        # from vectorising all of its expression.
        variance = jnp.broadcast_to(variance, features.shape)
    transposed_blur = jax.linear_transpose(blur, features)
    ones = jnp.ones((cells,), jnp.float32)

    def sum_cells(x):
        # As a matrix product: XLA's own column sum is slower on a CPU.
        total = jnp.matmul(ones, x.reshape(cells, -1), precision="highest")
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
            logits = (spatial_mean + spread * noise) @ kernel + bias
            return jnp.mean(_cross_entropy(logits, labels), axis=0)

        cross_entropy, vjp_fn = jax.vjp(loss_of, spatial_mean, spread)
        by_mean, by_spread = vjp_fn(jnp.ones_like(cross_entropy))
        # A channel without noise has no spread to change: 0, not 0 / 0.
        noisy = spread > 0
        by_spread = jnp.where(noisy, by_spread / jnp.where(noisy, spread, 1.0), 0.0)
        by_lam = (
            by_mean / cells * offset
            - by_spread / cells**2 * rest * variance
            + jnp.where(active, 1.0 / rest + lam * r_squared - rest, 0.0)
            * (config.beta / (cells * num_channels))
        )
        (by_complement,) = transposed_blur(-by_lam)
        nats = jnp.mean(capacity(rest, r_squared, active), axis=(0, 1, 3))
        loss = cross_entropy + config.beta * nats
        return loss, -by_complement * complement * (1.0 - complement)

    return value_and_grad


def _cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """[S, N, C] and [N] -> [S, N]."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.broadcast_to(labels, logits.shape[:-1])
    )


def _step_keys(key: chex.PRNGKey, num_steps: int) -> chex.PRNGKey:
    """Keys [num_steps] from one key, [num_steps, N] from keys [N]."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.split(key, num_steps)
    return jax.vmap(lambda k: jax.random.split(k, num_steps), out_axes=1)(key)


def _normal(key: chex.PRNGKey, shape: tuple[int, ...]) -> chex.Array:
    """Draws [S, 1, ...] shared by the images, or [S, N, ...] from keys [N]."""
    if key.ndim == 0:
        return jnp.expand_dims(jax.random.normal(key, shape), 1)
    return jax.vmap(lambda k: jax.random.normal(k, shape), out_axes=1)(key)
