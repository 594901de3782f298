"""How the outputs of a module's layers pass through a function, a *tap*.

``tap(name, output)`` returns what the module goes on with. For ``tapping``; imports
only jax and flax.
"""

import contextlib
import contextvars
from collections import Counter

import jax
from flax import linen as nn
from flax import nnx
from flax.core.tracers import current_trace

# The taps of modules that are not linen's, innermost first.
_TAPS: contextvars.ContextVar[tuple] = contextvars.ContextVar("taps", default=())


@contextlib.contextmanager
def tapped(tap):
    """Passes what each layer returns inside through `tap`, linen's and those shown."""
    token = _TAPS.set((tap, *_TAPS.get()))
    try:
        with nn.intercept_methods(interceptor(tap)):
            yield
    finally:
        _TAPS.reset(token)


def interceptor(tap):
    """Passes what each submodule of a linen module returns through `tap`."""

    def interceptor(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        if context.method_name != "__call__" or not context.module.path:
            return output
        return tap("/".join(context.module.path), output)

    return interceptor


def show(name, output):
    """Passes a layer's output through all taps around, where it is not linen's."""
    for tap in _TAPS.get():
        output = tap(name, output)
    return output


def tap_calls(module, tap):
    """Makes an NNX module's submodules pass what they return through `tap`."""
    for path, inner in list(nnx.iter_modules(module)):
        if path and callable(inner):
            _tap_call(inner, "/".join(map(str, path)), tap)


def _tap_call(module, name, tap):
    kind = type(module)

    def tapped_call(self, *args, **kwargs):
        return tap(name, kind.__call__(self, *args, **kwargs))

    tapped = type(kind)(kind.__name__, (kind,), {"__call__": tapped_call})
    object.__setattr__(module, "__class__", tapped)


def numbered(tap, hidden):
    """`tap` for the arrays that can leave the model, with "#2" after a second name.

    The names of the others go to `hidden`, with the reason.
    """
    seen = Counter()
    outside = current_trace()

    def named(name, output):
        # Values inside a transformation of their own must not get out of it.
        if current_trace() != outside:
            hidden[name] = (
                "runs inside nn.remat, nn.scan, jit or the like, which hide its "
                "output: take a layer outside, or build the model without them (the "
                "variables of remat stay the same)"
            )
            return output
        if not isinstance(output, jax.Array):
            hidden[name] = f"returns a {type(output).__name__}: take one with an array"
            return output
        seen[name] += 1
        return tap(name if seen[name] == 1 else f"{name}#{seen[name]}", output)

    return named
