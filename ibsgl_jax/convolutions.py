"""Convolutions and pools that are fast on a CPU; imports only jax and numpy.

XLA's CPU compiler (seen in jaxlib 0.10) is slow at four things, which ``fast_on_cpu``
writes in another way, with the same numbers but for rounding:

- a 1 x 1 convolution is a matrix product, and takes half to a tenth of the time as one:
  forward, for its images and above all for its weights;
- the gradient of a maximum over windows is a sum over the window's places;
- a kernel whose axes come in another order, as in a gradient, is fast only outside
  loops and conditions; inside it falls back to a plain loop, 6 times slower for 3 x 3.
  Here the transposition is written out;
- grouped convolutions have slow gradients: ``depthwise``.

Other devices need none of this and get what they would have got.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

# A window of more places keeps its gradients as they are.
MAX_WINDOW = 16
# Places of a convolution's result from 28 x 28 to 112 x 112: there the gradient of its
# weights is fastest image by image (two cores; half the time at 112 x 112 x 128).
PLACES = range(28 * 28, 112 * 112 + 1)


def fast_on_cpu(fn: Callable) -> Callable:
    """``fn``, its convolutions and the gradients of its pools as a CPU is fast at them.

    Args:
      fn: any function of pytrees of arrays that jax can trace; gradients taken inside
        it are what this is for.

    Returns:
      A function with the same results, up to rounding, and derivatives. Compiled for
      anything but a CPU it has ``fn``'s own operations. The gradient of a maximum does
      not pass on a NaN in the window.
    """

    def fast_fn(*args, **kwargs):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        closed = closed.replace(jaxpr=_rewritten(closed.jaxpr, {}))
        results = core.jaxpr_as_fun(closed)(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return fast_fn


def _rewritten(jaxpr: core.Jaxpr, known: dict) -> core.Jaxpr:
    """The same jaxpr with what is slow, in loops and calls too, replaced.

    ``known`` keeps those done, so that what is called twice stays one thing.
    """
    if id(jaxpr) not in known:
        equations = [_rewritten_equation(equation, known) for equation in jaxpr.eqns]
        changed = any(a is not b for a, b in zip(equations, jaxpr.eqns, strict=True))
        done = jaxpr.replace(eqns=equations) if changed else jaxpr
        known[id(jaxpr)] = jaxpr, done  # the first, so that its id stays its own
    return known[id(jaxpr)][1]


def _rewritten_equation(equation: core.JaxprEqn, known: dict) -> core.JaxprEqn:
    make = FAST.get(equation.primitive.name)
    if make is not None:
        fast_fn = make(equation)
        return equation if fast_fn is None else _on_cpu(equation, fast_fn)
    if equation.params.get("branches_platforms"):
        return equation  # has a form for each platform, as what was rewritten before

    def inner(value):
        if isinstance(value, core.Jaxpr):
            return _rewritten(value, known)
        if isinstance(value, core.ClosedJaxpr):
            done = _rewritten(value.jaxpr, known)
            return value if done is value.jaxpr else value.replace(jaxpr=done)
        return value

    changed = {}
    for name, value in equation.params.items():
        done = tuple(map(inner, value)) if isinstance(value, tuple) else inner(value)
        if done != value:
            changed[name] = done
    return equation.replace(params=equation.params | changed) if changed else equation


def _on_cpu(equation: core.JaxprEqn, fast_fn: Callable) -> core.JaxprEqn:
    """A call of ``fast_fn`` on a CPU, of the operation itself elsewhere."""

    def slow_fn(*operands):
        return equation.primitive.bind(*operands, **equation.params)

    @jax.jit
    def on_each_platform(*operands):
        return lax.platform_dependent(*operands, cpu=fast_fn, default=slow_fn)

    operands = [atom.aval for atom in equation.invars]
    (call,) = jax.make_jaxpr(on_each_platform)(*operands).jaxpr.eqns
    return equation.replace(primitive=call.primitive, params=call.params)


def _fast_convolution(equation: core.JaxprEqn) -> Callable | None:
    """A matrix product if it is one; else the order of axes that has a fast kernel."""
    params, order = equation.params, equation.params["dimension_numbers"]
    if params["feature_group_count"] == params["batch_group_count"] == 1:
        avals: list[Any] = [equation.invars[1].aval, equation.outvars[0].aval]
        kernel, result = (aval.shape for aval in avals)
        undilated = all(step == 1 for step in params["lhs_dilation"])
        unstrided = all(step == 1 for step in params["window_strides"])
        if all(kernel[axis] == 1 for axis in order.rhs_spec[2:]):
            if undilated or unstrided:
                return _product_at_each_place(params)
        elif all(result[axis] == 1 for axis in order.out_spec[2:]) and undilated:
            return _product_over_places(params)
        places = math.prod(kernel[axis] for axis in order.rhs_spec[2:])
        window = math.prod(result[axis] for axis in order.out_spec[2:])
        if (
            places in PLACES
            and window <= MAX_WINDOW
            and undilated
            and unstrided
            and len(order.rhs_spec) == 4
        ):
            return _sum_over_images(
                params, [result[axis] for axis in order.out_spec[2:]]
            )
    return _reordered(params, equation.primitive)


def _product_at_each_place(params) -> Callable:
    """A kernel of one place: a matrix product over the channels."""
    order, num_space = params["dimension_numbers"], len(params["padding"])
    batch, channels, *space = order.lhs_spec
    is_dilated = any(step != 1 for step in params["lhs_dilation"])
    gaps = [step - 1 for step in params["lhs_dilation"]]

    def multiply(images, kernel):
        kernel = lax.squeeze(kernel, order.rhs_spec[2:])
        contracted = int(order.rhs_spec[1] > order.rhs_spec[0])  # where "in" is now
        if not is_dilated:
            images = _padded(images, space, params["padding"])
            images = _strided(images, space, params["window_strides"])
        product = _dot(images, kernel, ((channels,), (contracted,)), params)
        # The image's axes in their order, without the channels; then the outputs.
        axes = [axis - (axis > channels) for axis in (batch, *space)]
        product = lax.transpose(product, (*axes, num_space + 1))
        if is_dilated:  # padding goes around what the gaps have spread
            places = range(1, num_space + 1)
            product = _padded(product, places, params["padding"], gaps)
        return _to_order(product, order.out_spec)

    return multiply


def _product_over_places(params) -> Callable:
    """A result of one place: a product over channels and places, as for weights."""
    order = params["dimension_numbers"]
    batch, channels, *space = order.lhs_spec
    kernel_out, kernel_in, *kernel_space = order.rhs_spec

    def multiply(images, kernel):
        images = _padded(images, space, params["padding"])
        images = _strided(
            images,
            space,
            params["rhs_dilation"],
            [kernel.shape[axis] for axis in kernel_space],
        )
        # Two matrices [places, N] and [places, K]: a product over more axes than one
        # would be given a transposed copy.
        images = lax.transpose(images, (channels, *space, batch))
        kernel = lax.transpose(kernel, (kernel_in, *kernel_space, kernel_out))
        matrices = (x.reshape(-1, x.shape[-1]) for x in (images, kernel))
        product = _dot(*matrices, ((0,), (0,)), params)
        product = lax.expand_dims(product, range(1, 1 + len(space)))
        return _to_order(product, order.out_spec)

    return multiply


def _sum_over_images(params, window) -> Callable:
    """The weights of a larger kernel: a product for each place of it and each image.

    Here the images are what the operation takes for channels.
    """
    order = params["dimension_numbers"]
    channels, image, *space = order.lhs_spec
    outputs, kernel_image, *kernel_space = order.rhs_spec

    def sum_products(images, cotangents):
        images = _padded(images, space, params["padding"])
        images = lax.transpose(images, (image, *space, channels))
        cotangents = lax.transpose(cotangents, (kernel_image, *kernel_space, outputs))
        counts = cotangents.shape[1:3]

        def add(total, both):
            pixels, cotangent = both
            matrix = cotangent.reshape(-1, cotangent.shape[-1])

            def product(start):
                tap = lax.slice_in_dim(pixels, start[0], pixels.shape[0])
                tap = lax.slice_in_dim(tap, start[1], pixels.shape[1], axis=1)
                tap = _strided(tap, (0, 1), params["rhs_dilation"], counts)
                return _dot(
                    tap.reshape(-1, tap.shape[-1]), matrix, ((0,), (0,)), params
                )

            return total + jnp.stack([product(start) for start in starts]), None

        starts = list(np.ndindex(*window))
        shape = (len(starts), images.shape[-1], cotangents.shape[-1])
        dtype = params["preferred_element_type"] or images.dtype
        total, _ = lax.scan(add, jnp.zeros(shape, dtype), (images, cotangents))
        total = total.reshape(*window, *shape[1:])
        # "N" of the operation's result are the channels, its features the outputs.
        total = lax.transpose(total, (2, 0, 1, 3))
        return _to_order(total, order.out_spec)

    return sum_products


def _dot(images, kernel, contracted, params):
    return lax.dot_general(
        images,
        kernel,
        (contracted, ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )


def _padded(x, axes, edges, gaps=None):
    """Zeros (low, high) around axes, cut off where negative, and gaps between."""
    config = [(0, 0, 0)] * x.ndim
    for axis, (low, high), gap in zip(
        axes, edges, gaps or [0] * len(edges), strict=True
    ):
        config[axis] = low, high, gap
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _strided(x, axes, steps, counts=None):
    """Every step-th place along axes, as many as there are or counts."""
    index = [slice(None)] * x.ndim
    for i, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        end = None if counts is None else (counts[i] - 1) * step + 1
        index[axis] = slice(0, end, step)
    return x[tuple(index)]


def _to_order(x, out_spec):
    """[N, *space, K] with its axes where a convolution's result has them."""
    batch, channels, *space = out_spec
    order = (batch, *space, channels)
    return lax.transpose(x, [order.index(axis) for axis in range(x.ndim)])


def _reordered(params, convolution) -> Callable | None:
    """The kernel transposed first, for the convolution alone."""
    order = params["dimension_numbers"]
    out_axis, in_axis, *space = order.rhs_spec
    num_axes = len(order.rhs_spec)
    fast_order = (num_axes - 1, num_axes - 2, *range(num_axes - 2))
    if order.rhs_spec == fast_order:
        return None
    changed = {"dimension_numbers": order._replace(rhs_spec=fast_order)}

    def transpose_and_convolve(images, kernel):
        kernel = lax.transpose(kernel, (*space, in_axis, out_axis))
        return convolution.bind(images, kernel, **params | changed)

    return transpose_and_convolve


def _fast_maximum_gradient(equation: core.JaxprEqn) -> Callable | None:
    """To each place of a window the cotangent of the window whose maximum it is."""
    params = equation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    if params["select_prim"] is not lax.ge_p or math.prod(window) > MAX_WINDOW:
        return None

    def scatter(cotangents, x):
        lowest = jnp.array(-jnp.inf, x.dtype)
        spread = [(low, high, 0) for low, high in params["padding"]]
        padded = lax.pad(x, lowest, spread)
        starts = list(np.ndindex(*window))
        sizes = [
            (count - 1) * step + 1
            for count, step in zip(cotangents.shape, strides, strict=True)
        ]

        def at(start):
            ends = [a + size for a, size in zip(start, sizes, strict=True)]
            return lax.slice(padded, start, ends, strides)

        largest = functools.reduce(lax.max, map(at, starts))
        taken = jnp.zeros(cotangents.shape, bool)
        total = jnp.zeros(padded.shape, cotangents.dtype)
        for start in starts:
            # Of equal ones the first, as the operation itself.
            hit = (at(start) == largest) & ~taken
            taken |= hit
            share = jnp.where(hit, cotangents, jnp.zeros((), cotangents.dtype))
            around = [
                (first, full - first - size, step - 1)
                for first, full, size, step in zip(
                    start, padded.shape, sizes, strides, strict=True
                )
            ]
            total += lax.pad(share, jnp.zeros((), share.dtype), around)
        return lax.pad(
            total, jnp.zeros((), total.dtype), [(-a, -b, 0) for a, b, _ in spread]
        )

    return scatter


# Primitive -> equation -> what a CPU computes in its place, or None.
FAST = {
    "conv_general_dilated": _fast_convolution,
    "select_and_scatter_add": _fast_maximum_gradient,
}


def depthwise(images, kernel, strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated` with one filter per channel, fast on a CPU too.

    XLA's CPU compiler has no fast kernel for the gradients of grouped convolutions:
    those of a strided one take ten times as long as the sum over the filter's taps,
    image by image, that stands here. Other devices get the convolution as it is.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[k, k, 1, C]`.
      strides, padding, **options: of `lax.conv_general_dilated`, as `nn.Conv` passes
        them to its `conv_general_dilated`; without dilation.

    Returns:
      `[N, H', W', C]` in the images' dtype.
    """

    def convolve(images, kernel):
        return lax.conv_general_dilated(images, kernel, strides, padding, **options)

    def add_taps(images, kernel):
        size, pads = kernel.shape[:2], padding
        if isinstance(padding, str):
            pads = lax.padtype_to_pads(images.shape[1:3], size, strides, padding)
        lengths = [
            (length + sum(pad) - taps) // stride + 1
            for length, pad, taps, stride in zip(
                images.shape[1:3], pads, size, strides, strict=True
            )
        ]

        def add(image):
            image = jnp.pad(image.astype(jnp.float32), (*pads, (0, 0)))
            total = 0.0
            for i, j in np.ndindex(*size):
                ends = [
                    start + stride * (length - 1) + 1
                    for start, stride, length in zip(
                        (i, j), strides, lengths, strict=True
                    )
                ]
                tap = image[i : ends[0] : strides[0], j : ends[1] : strides[1]]
                total += tap * kernel[i : i + 1, j : j + 1, 0].astype(jnp.float32)
            return total.astype(images.dtype)

        return lax.map(add, images)

    if not isinstance(images.shape[0], int):  # exported: no number to loop to
        return convolve(images, kernel)
    return lax.platform_dependent(images, kernel, cpu=add_taps, default=convolve)
