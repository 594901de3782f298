"""Convolutions whose gradients are fast on a CPU; imports only jax and numpy.

XLA's CPU compiler puts a convolution's axes into the order of its fast kernel only
outside loops (seen in jaxlib 0.10). The transposed convolution of a gradient comes in
another order and inside ``scan`` or ``map`` falls back to a plain loop: 6 times slower
for 3 x 3 kernels. ``in_fast_order`` writes the transposition of the weights out, which
gives the same numbers everywhere. Other devices need none of this.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def in_fast_order(fn: Callable) -> Callable:
    """``fn``, its convolutions in the order that XLA's CPU kernels take.

    Args:
      fn: any function of pytrees of arrays that jax can trace; gradients taken inside
        it are what this is for.

    Returns:
      A function with the same results and derivatives. Compiled for anything but a CPU
      it has ``fn``'s own convolutions.
    """

    def reordered_fn(*args, **kwargs):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        closed = closed.replace(jaxpr=_rewritten(closed.jaxpr))
        results = core.jaxpr_as_fun(closed)(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return reordered_fn


def _rewritten(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The same jaxpr with its slow convolutions, in loops and calls too, replaced."""
    equations = []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("jit", "pjit", "scan"):
            inner = params["jaxpr"]
            inner = inner.replace(jaxpr=_rewritten(inner.jaxpr))
            equation = equation.replace(params=params | {"jaxpr": inner})
        elif name == "conv_general_dilated":
            kernel = params["dimension_numbers"].rhs_spec
            if kernel != _fast(len(kernel)):
                equation = _reordered(equation)
        equations.append(equation)
    return jaxpr.replace(eqns=equations)


def _fast(num_axes: int) -> tuple[int, ...]:
    """Kernels [*space, in, out], as (out, in, *space)."""
    return (num_axes - 1, num_axes - 2, *range(num_axes - 2))


def _reordered(equation: core.JaxprEqn) -> core.JaxprEqn:
    """A call that on a CPU transposes the kernel first, for the convolution alone."""
    order = equation.params["dimension_numbers"]
    out_axis, in_axis, *space = order.rhs_spec
    fast_order = order._replace(rhs_spec=_fast(len(order.rhs_spec)))

    def transpose_and_convolve(images, kernel):
        kernel = jax.lax.transpose(kernel, (*space, in_axis, out_axis))
        return equation.primitive.bind(
            images, kernel, **equation.params | {"dimension_numbers": fast_order}
        )

    def convolve(images, kernel):
        return equation.primitive.bind(images, kernel, **equation.params)

    @jax.jit
    def on_each_platform(images, kernel):
        return jax.lax.platform_dependent(
            images, kernel, cpu=transpose_and_convolve, default=convolve
        )

    arguments = [atom.aval for atom in equation.invars]
    (call,) = jax.make_jaxpr(on_each_platform)(*arguments).jaxpr.eqns
    return equation.replace(primitive=call.primitive, params=call.params)


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
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)

    def add_taps(images, kernel):
        size, pads = kernel.shape[:2], padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(images.shape[1:3], size, strides, padding)
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

        return jax.lax.map(add, images)

    if not isinstance(images.shape[0], int):  # exported: no number to loop to
        return convolve(images, kernel)
    return jax.lax.platform_dependent(images, kernel, cpu=add_taps, default=convolve)
