"""Any model as `features_fn` and `head_fn` at a named layer, without touching it.

The whole model runs in both halves. `features_fn` keeps the layer's output and drops
the logits; `head_fn` runs on zero images and puts the given features in the output's
place. Under `jax.jit` the half that is not used is dead code and vanishes, so call the
two under jit. Imports only jax, flax and this library.

Both are callable pytrees (`jax.tree_util.Partial`) that hold the variables: handed to
a jitted function as *arguments* they keep the weights out of the compiled program.

`linen` and `nnx` serve Flax. Everything else goes through `split`, which needs a
function `call(variables, images, tap)` that returns the logits and passes each layer's
output through `tap(name, output)`. For Haiku::

    def call(params, images, tap):
        def interceptor(next_fn, args, kwargs, context):
            output = next_fn(*args, **kwargs)
            called = context.method_name == "__call__"
            return tap(context.module.module_name, output) if called else output
        with hk.intercept_methods(interceptor):
            return network.apply(params, images)

and for a bare function, which names the layers itself::

    def call(params, images, tap):
        features = tap("conv", jax.nn.relu(convolve(images, params["conv"])))
        return features.mean((1, 2)) @ params["dense"]
"""

import contextlib
import difflib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from jax.tree_util import Partial

from ibsgl_jax import taps, targets, tokens

# Primitives that evaluate one jaxpr once, on exactly their own operands.
_CALLS = {"jit", "pjit", "closed_call", "remat", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call"}


def linen(
    model,
    variables,
    layer: str,
    *,
    image_shape=(224, 224, 3),
    grid=None,
    prefix=None,
    output=None,
    **apply_kwargs,
) -> tuple[Callable, Callable]:
    """Splits a linen model after the layer with a given path.

    At the last layer before a model's own pooled linear head, `models.make_head_fn`
    is the better choice: `bottleneck.attribute` has a shortcut for what it returns.
    Of the layers inside `nn.remat`, `nn.scan` or `nn.jit` those can be tapped whose
    output is what the transformation returns; of a scan, after its last step.

    Args:
      model: a `flax.linen.Module`; `model.apply(variables, images, **apply_kwargs)`
        are the logits.
      variables: its variables.
      layer: path of a submodule, "layer4_1/conv2"; see `layer_names`.
      image_shape: (H', W', channels) of an image that the model takes. The sizes
        matter only where the model's own layers fix them, and for the grid of tokens.
      grid, prefix: of a layer of tokens [N, T, D]: (h, w), and how many class and
        register tokens come before; ``tokens.find`` finds what is not given.
      output: place or key of the logits where the model returns a tuple or a dict, or
        a function of what it returns.
      **apply_kwargs: for example `train=False`.

    Returns:
      `features_fn`, images `[N, H', W', 3]` -> features `[N, H, W, K]`, and `head_fn`,
      features -> logits `[N, C]`. The two batches may differ in size. Of tokens the
      features are `[N, T, D]` as the layer gives them, and the head, a
      ``tokens.TokenHead``, knows their grid.

    Raises:
      ValueError: if there is no such layer (with the nearest names) or it has no array
        that can leave the model, if the logits depend on the images past the layer
        too, as inside a residual block, or if tokens are no such grid.
    """
    call = _linen_call(model, **apply_kwargs)
    options = {"grid": grid, "prefix": prefix, "output": output}
    return split(call, variables, layer, image_shape=image_shape, **options)


def nnx(
    model,
    layer: str,
    *,
    image_shape=(224, 224, 3),
    grid=None,
    prefix=None,
    output=None,
    **call_kwargs,
) -> tuple[Callable, Callable]:
    """Splits an NNX model after the layer with a given path, in eval mode.

    Args:
      model: a `flax.nnx.Module`; `model(images, **call_kwargs)` are the logits. It is
        left as it is; later changes of its weights do not show in the functions.
      layer: path of a submodule, "blocks/3/conv"; see `layer_names`.
      image_shape, grid, prefix, output, Returns, Raises: as for `linen`.
    """
    call, state = _nnx_call(model, **call_kwargs)
    options = {"grid": grid, "prefix": prefix, "output": output}
    return split(call, state, layer, image_shape=image_shape, **options)


def split(
    call: Callable,
    variables,
    layer: str,
    *,
    image_shape=(224, 224, 3),
    grid=None,
    prefix=None,
    output=None,
) -> tuple[Callable, Callable]:
    """Splits a function that shows its layers.

    Args:
      call: `call(variables, images, tap)` returns the logits `[N, C]` and replaces
        each layer's output by `tap(name, output)`. The second call with the same name
        is the layer "name#2".
      variables: any pytree of arrays.
      layer: one of the names.
      image_shape, grid, prefix, output, Returns, Raises: as for `linen`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    outputs, hidden = _output_shapes(call, variables, image)
    if layer in hidden and layer not in outputs:
        call = taps.at_ends(call)
        outputs, _ = _output_shapes(call, variables, image)
    if layer in hidden and layer not in outputs:
        raise ValueError(f"layer {layer!r} {hidden[layer]}")
    if layer not in outputs:
        near = difflib.get_close_matches(layer, outputs, cutoff=0.4)
        near = near or list(outputs)[:5]
        raise ValueError(f"no layer {layer!r}; nearest names: {', '.join(near)}")
    layout = _layout(layer, outputs[layer].shape[1:], image_shape, grid, prefix)
    whole_fn = targets.pick(lambda inputs: call(*inputs), output)

    def features_fn(variables, images):
        return _outputs(call, variables, images, {})[layer]

    def logits_fn(variables, images, features):
        def replace(name, output):
            return features if name == layer else output

        return whole_fn((variables, images, taps.numbered(replace, {})))

    def head_fn(variables, features):
        images = jnp.zeros((features.shape[0], *image_shape), jnp.float32)
        return logits_fn(variables, images, features)

    jaxpr = jax.make_jaxpr(lambda *inputs: logits_fn(variables, *inputs))(
        image, outputs[layer]
    )
    if any(_reached(jaxpr.jaxpr, [True, False])):
        raise ValueError(
            f"layer {layer!r} does not cut the model: the logits depend on the images "
            "past it too; take the end of its block"
        )
    head = Partial(head_fn, variables)
    return (
        Partial(features_fn, variables),
        head if layout is None else tokens.TokenHead(head, layout),
    )


def _layout(layer, shape, image_shape, grid, prefix):
    """Of a layer of tokens [T, D]; None of any other."""
    try:
        if len(shape) == 2:
            return tokens.find(shape[0], image_shape[:2], grid=grid, prefix=prefix)
    except ValueError as error:
        raise ValueError(f"layer {layer!r}: {error}") from None
    if grid is not None or prefix is not None:
        raise ValueError(
            f"layer {layer!r} gives {list(shape)} for each image, no tokens [T, D]: "
            "leave grid and prefix out"
        )
    return None


@contextlib.contextmanager
def kept(layer: str):
    """What a layer returns in the linen modules applied inside, in any mode.

    For a loop of one's own: the features of an inner layer out of the very forward pass
    that trains, with its gradient and its batch statistics::

        with tapping.kept("layer3_5") as outputs:
            logits, updated = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
        features = outputs["layer3_5"]

    Enter it inside whatever is traced.

    Args:
      layer: a name of `layer_names`; "": none.

    Yields:
      A dict that has, after the model was applied, `layer` -> array.
    """
    outputs = {}

    def keep(name, output):
        if name == layer:
            outputs[name] = output
        return output

    if not layer:
        yield outputs
        return
    with taps.tapped(taps.numbered(keep, {})):
        yield outputs


def finer_layer(model, variables, image_shape=(224, 224, 3), *, times: int = 2) -> str:
    """The last layer whose map is so many times as fine as that of the features.

    For a model with a `features` method, as `models` has them: of the layers that cut
    the model, the last of so many times the height and width of its features; one
    inside a block only where there is no other. It is "layer3_5" of a ResNet-50 at 224
    pixels, "block10" of EfficientNet-Lite0.

    Args:
      model: a linen module with `features`.
      variables: its variables, arrays or `jax.ShapeDtypeStruct`s.
      image_shape: (H', W', channels).
      times: at least 1.

    Raises:
      ValueError: there is none.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    features = jax.eval_shape(
        lambda variables, images: model.apply(variables, images, method="features"),
        variables,
        image,
    )
    height, width = features.shape[1:3]

    def is_fine(shape):  # a stride rounds up or down
        return len(shape) == 3 and all(
            n > m and n // times <= m <= -(-n // times)
            for n, m in zip(shape[:2], (height, width), strict=True)
        )

    def cut(layer, variables):
        linen(model, variables, layer, image_shape=image_shape)

    shapes = layer_names(model, variables, image_shape)
    fine = [name for name, shape in shapes.items() if is_fine(shape)][::-1]
    for name in sorted(fine, key=lambda name: name.count("/")):
        with contextlib.suppress(ValueError):  # inside a block
            jax.eval_shape(functools.partial(cut, name), variables)
            return name
    raise ValueError(
        f"no layer with a map {times} times as fine as the features, {height} x "
        f"{width}, cuts the model; name a layer (ibsgl models NAME --layers lists them)"
    )


def layer_names(
    model, variables=None, image_shape=(224, 224, 3), **call_kwargs
) -> dict[str, tuple[int, ...]]:
    """The layers of a model and the shapes of their outputs, without the batch axis.

    Args:
      model: a linen module, an NNX module (`variables` is not used) or a `call` as
        for `split`.
      variables: arrays or `jax.ShapeDtypeStruct`s.
      image_shape: (H', W', channels) of the images.
      **call_kwargs: for the model's `__call__`.

    Returns:
      Name -> shape, in the order in which the layers finish. Some of them may not cut
      the model.
    """
    if isinstance(model, flax_linen.Module):
        call = _linen_call(model, **call_kwargs)
    elif isinstance(model, flax_nnx.Module):
        call, variables = _nnx_call(model, **call_kwargs)
    else:
        call = model
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    outputs, hidden = _output_shapes(call, variables, image)
    if hidden:
        outputs, _ = _output_shapes(taps.at_ends(call), variables, image)
    return {name: output.shape[1:] for name, output in outputs.items()}


def used(head, variables, features) -> list[str]:
    """The names in ``params`` that a head's outputs depend on.

    Args:
      head: ``(params, other variables, features) -> outputs``.
      variables: dict with params, arrays or `jax.ShapeDtypeStruct`s.
      features: an array or a `jax.ShapeDtypeStruct`.
    """
    params = variables["params"]
    others = {name: v for name, v in variables.items() if name != "params"}
    jaxpr = jax.make_jaxpr(head)(params, others, features).jaxpr
    rest = len(jax.tree.leaves((others, features)))

    def reaches(name):
        marks = jax.tree.map_with_path(lambda path, _: path[0].key == name, params)
        return any(_reached(jaxpr, jax.tree.leaves(marks) + [False] * rest))

    return [name for name in params if reaches(name)]


def _outputs(call, variables, images, hidden):
    """Name -> output of every layer, in order."""
    outputs = {}

    def keep(name, output):
        outputs[name] = output
        return output

    call(variables, images, taps.numbered(keep, hidden))
    return outputs


def _output_shapes(call, variables, image):
    """The same with `jax.ShapeDtypeStruct`s, nothing computed, and what is hidden."""
    names, hidden = [], {}

    def outputs_fn(variables, images):
        outputs = _outputs(call, variables, images, hidden)
        names.extend(outputs)
        return tuple(outputs.values())  # a dict would come back sorted

    shapes = jax.eval_shape(outputs_fn, variables, image)
    outputs = dict(zip(names, shapes, strict=True))
    return outputs, hidden


def _linen_call(model, **apply_kwargs):
    def call(variables, images, tap):
        # Entered here, inside whatever is traced: around a function that is already
        # jitted it would be ignored.
        with taps.tapped(tap):
            return model.apply(variables, images, **apply_kwargs)

    return call


def _nnx_call(model, **call_kwargs):
    graph, state = flax_nnx.split(model)

    def call(state, images, tap):
        copy = flax_nnx.merge(graph, state)
        copy.eval()
        taps.tap_calls(copy, tap)
        return copy(images, **call_kwargs)

    return call, state


def _reached(jaxpr, inputs: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on the marked inputs."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom):
        return not hasattr(atom, "val") and atom in marked

    for equation in jaxpr.eqns:
        marks = [is_marked(v) for v in equation.invars]
        if not any(marks):
            continue
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in _CALLS and inner is not None:
            outputs = _reached(getattr(inner, "jaxpr", inner), marks)
        else:
            outputs = [True] * len(equation.outvars)
        marked |= {v for v, m in zip(equation.outvars, outputs, strict=True) if m}
    return [is_marked(v) for v in jaxpr.outvars]
