"""Attribution as one ONNX file, the gradient inside.

jax2onnx, which it needs, translates a traced function primitive by primitive. What it
has no translation for is first written in other primitives here. ``export`` has the
files for those who have jax.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.extend import core

from ibsgl_jax.convolutions import FAST
from ibsgl_jax.export import make_explain_fn

RECIPE = """\
import onnxruntime
session = onnxruntime.InferenceSession({path!r})
given = dict(images=images, classes=classes)  # f32 [n, {size}, {size}, 3], int32 [n]
maps, logits = session.run(["maps", "logits"], given)
"""

# Primitive -> where it keeps what it calls.
_CALLED = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
}


def export_onnx(
    attribution_fn: Callable,
    logits_fn: Callable,
    *,
    image_shape: tuple[int, int, int],
) -> bytes:
    """A self-contained attribution function, weights included, as an ONNX model.

    Its inputs are "images", float32 [n, H, W, 3], and "classes", int32 [n], its outputs
    "maps" [n, H, W] and "logits" [n, C], for any n; a negative class stands for the
    predicted one.

    Args:
      attribution_fn: (images, classes) -> maps, from
        ``attribution.make_attribution_fn``. All n images are worked on at once.
      logits_fn: images -> logits.
      image_shape: (H, W, 3).

    Raises:
      ModuleNotFoundError: jax2onnx is not installed.
      NotImplementedError: of what the function is made of, jax2onnx cannot translate
        the primitive that the message names. ``attribution.RANDOM_METHODS`` have one.
    """
    import jax2onnx

    (n,) = export.symbolic_shape("n")
    shapes = (
        jax.ShapeDtypeStruct((n, *image_shape), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )
    explain_fn = elementary(make_explain_fn(attribution_fn, logits_fn), *shapes)
    with (
        _quiet(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        model = jax2onnx.to_onnx(
            explain_fn,
            inputs=shapes,
            model_name="attribution",
            input_names=["images", "classes"],
            output_names=["maps", "logits"],
        )
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet():
    """Without jax2onnx's notes on every shape that it does not know."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def elementary(fn: Callable, *shapes: jax.ShapeDtypeStruct) -> Callable:
    """``fn``, traced, in fewer primitives: what jax2onnx can translate.

    Calls are inlined, of forms for several platforms the default is taken, and what
    ``ELEMENTARY`` names is replaced.

    Args:
      fn: (*arrays) -> a tuple of arrays.
      *shapes: of the arrays; a dimension may be symbolic.

    Returns:
      (*arrays) -> a list of arrays, for these shapes.

    Raises:
      NotImplementedError: it draws random numbers, or splits at a symbolic dimension.
    """
    closed = _rewritten(jax.make_jaxpr(fn)(*shapes), shapes)
    # Again, for what the forms that stand in for a primitive are made of.
    return core.jaxpr_as_fun(_rewritten(closed, shapes))


def _rewritten(closed: core.ClosedJaxpr, shapes: Sequence) -> core.ClosedJaxpr:
    return jax.make_jaxpr(lambda *args: _evaluate(closed, args))(*shapes)


def _evaluate(closed: core.ClosedJaxpr, args: Sequence) -> list:
    jaxpr = closed.jaxpr
    variables = (*jaxpr.constvars, *jaxpr.invars)
    known = dict(zip(variables, (*closed.consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = _results(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: core.JaxprEqn, operands: list) -> list:
    name, params = equation.primitive.name, equation.params
    if name == "platform_index":
        return [params["platforms"].index(None)]
    if name == "cond" and isinstance(operands[0], int):
        return _evaluate(params["branches"][operands[0]], operands[1:])
    if name.startswith("random_"):
        raise NotImplementedError(f"primitive {name}: jax2onnx has no random keys")
    if name == "split" and any(export.is_symbolic_dim(n) for n in params["sizes"]):
        raise NotImplementedError(f"primitive {name}: jax2onnx needs its batch size")
    if name in _CALLED:
        called = params[_CALLED[name]]
        if isinstance(called, core.Jaxpr):
            called = core.ClosedJaxpr(called, ())
        return _evaluate(called, operands)
    elementary_fn = ELEMENTARY.get(name, _as_it_is)(equation) or _as_it_is(equation)
    results = elementary_fn(*operands)
    return results if equation.primitive.multiple_results else [results]


def _as_it_is(equation: core.JaxprEqn) -> Callable:
    """The primitive, of which conditions and loops have their insides rewritten."""

    def inside(value: Any):
        if isinstance(value, core.ClosedJaxpr):
            return _rewritten(value, [variable.aval for variable in value.jaxpr.invars])
        return value

    params = {
        name: tuple(map(inside, value)) if name == "branches" else inside(value)
        for name, value in equation.params.items()
    }
    return lambda *operands: equation.primitive.bind(*operands, **params)


def _convolution(equation: core.JaxprEqn) -> Callable:
    """Its axes in ONNX's order."""
    params, order = equation.params, equation.params["dimension_numbers"]
    axes = tuple(range(len(order.lhs_spec)))
    plain = {"dimension_numbers": lax.ConvDimensionNumbers(axes, axes, axes)}

    def convolve(images, kernel):
        images = lax.transpose(images, order.lhs_spec)
        kernel = lax.transpose(kernel, order.rhs_spec)
        result = equation.primitive.bind(images, kernel, **params | plain)
        return lax.transpose(result, [order.out_spec.index(axis) for axis in axes])

    return convolve


def _empty(equation: core.JaxprEqn) -> Callable:
    aval: Any = equation.outvars[0].aval
    return lambda *_: lax.full(aval.shape, 0, aval.dtype)


def _maximum(equation: core.JaxprEqn) -> Callable:
    """Over windows, axis by axis; jax2onnx pools over all four, onnxruntime cannot."""
    params = equation.params
    aval: Any = equation.outvars[0].aval
    gaps = [step - 1 for step in params["base_dilation"]]
    ends = params["padding"]
    config = [(*end, gap) for end, gap in zip(ends, gaps, strict=True)]
    names = ("window_dimensions", "window_dilation", "window_strides")
    windows = list(zip(*(params[name] for name in names), strict=True))

    def pool(x):
        x = _padded(x, jnp.asarray(-jnp.inf, x.dtype), config)
        for axis, (size, dilation, stride) in enumerate(windows):
            if (size, stride) != (1, 1):
                reach = (aval.shape[axis] - 1) * stride + 1
                starts = range(0, size * dilation, dilation)
                parts = [
                    lax.slice_in_dim(x, start, start + reach, stride, axis)
                    for start in starts
                ]
                x = functools.reduce(lax.max, parts)
        return x

    return pool


def _pad(equation: core.JaxprEqn) -> Callable:
    """Without a pad: jax2onnx's has no gaps and no symbolic batch."""
    return lambda x, fill: _padded(x, fill, equation.params["padding_config"])


def _padded(x, fill, config):
    """Blocks of the fill put before, behind and, on an axis of their own, between."""

    def block(axis, length):
        shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
        return [lax.full(shape, 0, x.dtype) + fill] if length > 0 else []

    for axis, (low, high, gap) in enumerate(config):
        if gap:
            before, behind = x.shape[:axis], x.shape[axis + 1 :]
            length = x.shape[axis] * (gap + 1)
            x = lax.expand_dims(x, [axis + 1])
            x = lax.concatenate([x, *block(axis + 1, gap)], axis + 1)
            x = lax.reshape(x, (*before, length, *behind))
            high -= gap
        if low < 0 or high < 0:
            end = x.shape[axis] + min(high, 0)
            x = lax.slice_in_dim(x, max(-low, 0), end, axis=axis)
        if low > 0 or high > 0:
            x = lax.concatenate([*block(axis, low), x, *block(axis, high)], axis)
    return x


def _sliced(outside: Sequence, inside: Sequence) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)


def _scan(equation: core.JaxprEqn) -> Callable:
    """A loop that counts: jax2onnx's scan has no reverse and no symbolic batch."""
    params, body = equation.params, equation.params["jaxpr"].jaxpr
    length = params["length"]
    # What the body sees an element of has an axis more outside.
    num_xs = _sliced(equation.invars, body.invars)
    num_carry = len(body.outvars) - _sliced(equation.outvars, body.outvars)
    num_consts = len(body.invars) - num_carry - num_xs

    def scan(*operands):
        consts = operands[:num_consts]
        carry = operands[num_consts : num_consts + num_carry]
        xs = operands[num_consts + num_carry :]

        def step(state):
            i, carry, ys = state
            at = length - 1 - i if params["reverse"] else i
            now = [lax.dynamic_index_in_dim(x, at, keepdims=False) for x in xs]
            results = _evaluate(params["jaxpr"], (*consts, *carry, *now))
            pairs = zip(ys, results[num_carry:], strict=True)
            ys = [lax.dynamic_update_index_in_dim(y, new, at, 0) for y, new in pairs]
            return i + 1, results[:num_carry], ys

        avals: list[Any] = [each.aval for each in equation.outvars[num_carry:]]
        ys = [lax.full(aval.shape, 0, aval.dtype) for aval in avals]
        start = jnp.int32(0), list(carry), ys
        _, carry, ys = lax.while_loop(lambda state: state[0] < length, step, start)
        return [*carry, *ys]

    return scan


# Primitive -> equation -> what computes the same of others, or None: it stays.
ELEMENTARY = {
    "conv_general_dilated": _convolution,
    "empty2": _empty,
    "pad": _pad,
    "reduce_window_max": _maximum,
    "scan": _scan,
    "select_and_scatter_add": FAST["select_and_scatter_add"],
}
