"""What of a model's output is explained: a class, one logit of two, any scalar.

A method on features or images explains the gradient of one number per image. For a
classifier that is a class's logit; here heads are made whose only logit is any other
number, and the losses that a bottleneck keeps low. Imports jax, chex and this
library only.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ibsgl_jax import predictions, saliency, tokens
from ibsgl_jax.models.heads import PooledLinear

# Of an output: a function, the key of a dict, or the place in a tuple.
Output = Callable | str | int
# (output), or (output, inputs) with an array of each image -> [N].
Target = Callable[..., chex.Array]
# (outputs [N, ...], labels [N, ...]) -> [N], lower for better.
LossFn = Callable[[Any, chex.Array], chex.Array]


def pick(head_fn: Callable, output: Output | None) -> Callable:
    """A head that returns a part of what ``head_fn`` returns.

    Args:
      head_fn: features -> a tuple, a dict, or whatever ``output`` takes.
      output: place or key of the logits, or a function of all of it; None: all.

    Raises:
      ValueError: when it is called: there is no such part, which it names.
    """
    if output is None:
        return head_fn

    def part(found):
        if callable(output):
            return output(found)
        try:
            return found[output]
        except (KeyError, IndexError, TypeError):
            if isinstance(found, Mapping):
                there = f"a dict with {', '.join(map(repr, found))}"
            elif isinstance(found, tuple | list):
                there = f"a {type(found).__name__} of {len(found)}"
            elif isinstance(found, jax.Array):
                there = f"an array {list(found.shape)}"
            else:
                there = f"a {type(found).__name__}"
            raise ValueError(f"output={output!r}: the head returns {there}") from None

    return _after(head_fn, part)


def scalar(
    head_fn: Callable, target: Target, inputs: chex.Array | None = None
) -> Callable:
    """A head whose one logit is a target: its class 0 is what is explained.

    Args:
      head_fn: features -> output.
      target: output -> [N], images independent; (output, inputs) -> [N] with inputs.
      inputs: [N, ...], of each image: its embedding, its mask, two classes to compare.

    Returns:
      features -> float32 [N, 1].

    Raises:
      ValueError: when it is called: the target gives no [N].

    Example:
      contrast = lambda logits, pair: (
          jnp.take_along_axis(logits, pair, axis=1) @ jnp.array([1.0, -1.0])
      )
      maps = cams.hirescam(scalar(head_fn, contrast, pair), features, jnp.zeros(n, int))
    """

    def value(output):
        found = target(output) if inputs is None else target(output, inputs)
        shape = getattr(found, "shape", None)
        sizes = [leaf.shape[:1] for leaf in jax.tree.leaves(output)]
        if shape is None or len(shape) != 1 or (sizes and shape != sizes[0]):
            given = "no array" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(
                f"the target gives {given}: give one number per image, shape [N]; "
                "sum or pick along the other axes"
            )
        return found.astype(jnp.float32)[:, None]

    return _after(head_fn, value)


def two_classes(head_fn: Callable) -> Callable:
    """A head with one logit y as one with two: -y/2, "not class 0", and y/2, "class 0".

    Their softmax is the sigmoid of y, and either class's map follows the head and its
    sign: a single logit's softmax is 1 whatever the head says.

    Args:
      head_fn: features [N, H, W, K] -> logits [N, 1] or [N].

    Returns:
      features -> logits [N, 2]; a ``PooledLinear`` if the head is one.
    """
    if isinstance(head_fn, PooledLinear):
        kernel, bias = head_fn.kernel / 2, head_fn.bias / 2
        return PooledLinear(
            jnp.concatenate([-kernel, kernel], axis=-1),
            jnp.concatenate([-bias, bias], axis=-1),
        )
    return _after(head_fn, two_logits)


def two_logits(logits: chex.Array) -> chex.Array:
    """[N, 1] or [N] -> [N, 2], as ``two_classes``."""
    half = jnp.reshape(logits, (-1, 1)) / 2
    return jnp.concatenate([-half, half], axis=-1)


def make_loss_fn(loss: str | LossFn) -> Callable:
    """What the bottleneck minimises, as a function of S copies of each image.

    Args:
      loss: as of ``bottleneck.attribute``.

    Returns:
      (outputs [N S, ...], an image's copies side by side; labels [N, ...]; S) ->
      float32 [N, S].

    Raises:
      ValueError: unknown loss; when it is called: logits of one class under the
        softmax, a loss that gives no [N].
    """
    if not callable(loss):
        predictions.check_link(loss)
        return functools.partial(_cross_entropy, link=loss)

    def one_copy(outputs, labels):
        values = loss(outputs, labels)
        if getattr(values, "shape", None) != labels.shape[:1]:
            found = getattr(values, "shape", type(values).__name__)
            raise ValueError(f"the loss gives {found}: give one number per image, [N]")
        return values.astype(jnp.float32)

    def loss_fn(outputs, labels, num_copies):
        outputs = jax.tree.map(
            lambda x: x.reshape(-1, num_copies, *x.shape[1:]), outputs
        )
        return jax.vmap(one_copy, in_axes=(1, None), out_axes=1)(outputs, labels)

    return loss_fn


def _cross_entropy(logits, labels, num_copies, *, link):
    saliency.check_logits(logits)
    if link == "softmax" and logits.shape[-1] < 2:
        raise ValueError(
            "the head returns one logit, whose softmax is 1 whatever it is: give "
            "loss='sigmoid', or targets.two_classes(head_fn)"
        )
    logits = logits.astype(jnp.float32)
    logits = logits.reshape(-1, num_copies, logits.shape[-1])
    labels = jnp.broadcast_to(labels[:, None], logits.shape[:-1])
    chosen = jnp.squeeze(jnp.take_along_axis(logits, labels[..., None], axis=-1), -1)
    if link == "softmax":  # optax's takes an index there, which Explicit axes refuse
        return jax.nn.logsumexp(logits, axis=-1) - chosen
    return -jax.nn.log_sigmoid(chosen)


def _after(head_fn, then):
    """``then`` of what a head returns; what the head carries stays an argument."""
    if isinstance(head_fn, tokens.TokenHead):
        return tokens.TokenHead(_after(head_fn.head_fn, then), head_fn.layout)
    if not jax.tree_util.all_leaves([head_fn]):
        return Partial(lambda head_fn, x: then(head_fn(x)), head_fn)
    return lambda features: then(head_fn(features))
