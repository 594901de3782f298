"""How the outputs of a module's layers pass through a function, a *tap*.

``tap(name, output)`` returns what the module goes on with. For ``tapping``; imports
only jax and flax.
"""

import contextlib
import contextvars
import itertools
from collections import Counter

import jax
from flax import linen as nn
from flax import nnx
from flax.core.tracers import current_trace
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

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
                "runs inside nn.remat, nn.scan, jit or the like, and is not what they "
                "return: take their end or a layer outside, or build the model without "
                "them (the variables of remat stay the same)"
            )
            return output
        if not isinstance(output, jax.Array):
            hidden[name] = f"returns a {type(output).__name__}: take one with an array"
            return output
        seen[name] += 1
        return tap(name if seen[name] == 1 else f"{name}#{seen[name]}", output)

    return named


# A layer's output in a jaxpr: the tag of ``checkpoint_name``.
_MARK = "ibsgl_jax tap "


def at_ends(call):
    """`call`, as for `tapping.split`, that taps hidden layers where they come out.

    A layer inside `nn.remat`, `nn.scan`, jit or the like whose output is what the
    transformation returns is tapped there; of a scan, after the last of its steps.
    """

    def tapped_call(variables, images, tap):
        def marked_call(variables, images):
            return call(variables, images, _mark)

        closed, out = jax.make_jaxpr(marked_call, return_shape=True)(variables, images)
        leaves = jax.tree.leaves((variables, images))
        return jax.tree.unflatten(
            jax.tree.structure(out), _evaluate(closed, leaves, tap)
        )

    return tapped_call


def _mark(name, output):
    if not isinstance(output, jax.Array):
        return output
    return checkpoint_name(output, _MARK + name)


def _evaluate(closed: core.ClosedJaxpr, inputs, tap) -> list:
    """A jaxpr's results, what is marked in it or comes out of it passed through tap."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))
    cuts = [i + 1 for i, equation in enumerate(jaxpr.eqns) if _ends(equation)]
    for start, end in itertools.pairwise([0, *cuts, len(jaxpr.eqns)]):
        equations = jaxpr.eqns[start:end]
        needed = _read(jaxpr.eqns[end:]) | _variables(jaxpr.outvars)
        made = [v for e in equations for v in e.outvars if v in needed]
        given = [variable for variable in known if variable in _read(equations)]
        part = jaxpr.replace(
            constvars=(),
            invars=given,
            outvars=made,
            eqns=equations,
        )
        part_fn = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
        known |= zip(made, part_fn(*(known[v] for v in given)), strict=True)
        for equation in equations[-1:]:
            for i, name in _ends(equation).items():
                variable = equation.outvars[i]
                if variable in needed:
                    known[variable] = tap(name, known[variable])
    return [a.val if isinstance(a, core.Literal) else known[a] for a in jaxpr.outvars]


def _read(equations) -> set:
    """The variables that equations read."""
    return set().union(*(_variables(equation.invars) for equation in equations))


def _variables(atoms) -> set:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _ends(equation: core.JaxprEqn) -> dict[int, str]:
    """Which results of an equation are what a layer returns: place -> name."""
    params = equation.params
    if equation.primitive.name == "name":
        is_mark = params["name"].startswith(_MARK)
        return {0: params["name"].removeprefix(_MARK)} if is_mark else {}
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is None or equation.primitive.name == "while":
        return {}
    inner = getattr(inner, "jaxpr", inner)
    made = {
        variable: name
        for equation in inner.eqns
        for i, name in _ends(equation).items()
        for variable in [equation.outvars[i]]
    }
    ends = {
        i: made[atom]
        for i, atom in enumerate(inner.outvars)
        if not isinstance(atom, core.Literal) and atom in made
    }
    carried = params.get("num_carry", len(ends) and max(ends) + 1)  # else one a step
    return {i: name for i, name in ends.items() if i < carried}
