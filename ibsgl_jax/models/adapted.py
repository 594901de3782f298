"""Linen and NNX modules as models with ``features`` and ``head``; see ``own``.

The whole module runs in both halves, as in ``tapping``: ``features`` keeps a layer's
output, ``head`` puts it back, and under ``jax.jit`` what is not used vanishes. Imports
jax, flax and this library.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from ibsgl_jax import taps

# How modules call the argument that says whether they train, and its value then.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Adapted(nn.Module):
    """A model that computes with another module.

    Its variables are that module's: of linen the same tree, of NNX its ``nnx.Param``
    as params and its ``nnx.BatchStat`` as batch_stats, by attribute.

    Attributes:
      num_classes: C.
      source: `Linen` or `NNX`.
      tap: the layer whose output are the features; "" for a source with methods
        features and head of its own.
      image_size: side of the square images; needed with ``tap``.
    """

    num_classes: int
    source: Any
    tap: str = ""
    image_size: int = 0

    def features(self, images, train=False):
        if not self.tap:
            return self._run(images, train, method="features")
        kept: list = []

        def keep(name, output):
            if name == self.tap:
                kept.append(output)
            return output

        self._run(images, train, tap=keep, found=kept)
        return kept[0]

    def head(self, features, train=False):
        if not self.tap:
            return self._run(features, train, method="head")
        # Of the images only the shape is used: the layer's output cuts the module.
        shape = features.shape[0], self.image_size, self.image_size, 3
        replaced: list = []

        def replace(name, output):
            if name != self.tap:
                return output
            replaced.append(output)
            return features

        images = jnp.zeros(shape, jnp.float32)
        # BatchNorm's moments are kept by features, whose pass saw the images.
        return self._run(images, train, tap=replace, found=replaced, keep=False)

    def __call__(self, images, train=False):
        return self._run(images, train)

    @property
    def signed_features(self) -> bool:
        kind = getattr(self.source.kind, "func", self.source.kind)
        return getattr(kind, "signed_features", False)

    def _run(self, inputs, train, method="__call__", tap=None, found=(), keep=True):
        """What the source returns; with a tap, which adds to found what it has met."""
        if self.is_initializing() and not self.variables:
            variables = self.source.init(self.make_rng("params"), inputs)
            for collection, branches in variables.items():
                for name, value in branches.items():
                    self.put_variable(collection, name, value)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def call(variables, inputs, tap):
            with taps.tapped(tap) if tap else contextlib.nullcontext():
                return self.source.apply(
                    variables, inputs, train=train, method=method, key=key
                )

        numbered = taps.numbered(tap, {}) if tap else None
        outputs, batch_stats = call(self.variables, inputs, numbered)
        if tap and not found:  # inside nn.remat or the like
            numbered = taps.numbered(tap, {})
            outputs, batch_stats = taps.at_ends(call)(self.variables, inputs, numbered)
        if tap and not found:
            raise ValueError(f"no layer {self.tap!r} gives an array to tap")
        if train and keep and self.is_mutable_collection("batch_stats"):
            for name, value in batch_stats.items():
                self.put_variable("batch_stats", name, value)
        return outputs


@dataclasses.dataclass(frozen=True)
class Linen:
    """A linen class, its layers made in any way.

    Attributes:
      kind: the class, or a function that makes the module.
      options: (name, value) pairs for it.
    """

    kind: Callable[..., nn.Module]
    options: tuple[tuple[str, Any], ...] = ()

    def make(self):
        # Outside whatever module is being applied: not one of its layers.
        return self.kind(**dict(self.options), parent=None)

    def init(self, key, images):
        module = self.make()
        return module.init(key, images, **_mode(module, False))

    def apply(self, variables, inputs, *, train, method, key):
        module = self.make()
        outputs, updated = module.apply(
            variables,
            inputs,
            **_mode(module, train),
            method=method,
            rngs={} if key is None else {"dropout": key},
            mutable=["batch_stats"] if train else [],
        )
        return outputs, updated.get("batch_stats", {})


@dataclasses.dataclass(frozen=True)
class NNX:
    """An NNX class, made by ``kind(**options, rngs=...)``.

    Attributes:
      kind: the class.
      options: (name, value) pairs for it.
    """

    kind: type[nnx.Module]
    options: tuple[tuple[str, Any], ...] = ()

    def _make(self, key, dropout_key=None):
        keys = {"params": key, "dropout": key if dropout_key is None else dropout_key}
        return self.kind(**dict(self.options), rngs=nnx.Rngs(**keys))

    def init(self, key, images):
        module = self._make(key)
        for path, leaf in nnx.to_flat_state(nnx.state(module)):
            kept = nnx.Param, nnx.BatchStat, nnx.RngState
            if not issubclass(leaf.type, kept):
                raise ValueError(
                    f"{self.kind.__name__}.{'.'.join(map(str, path))} is a "
                    f"{leaf.type.__name__}; nnx.Param and nnx.BatchStat go"
                )
        variables = {"params": _branches(module, nnx.Param)}
        batch_stats = _branches(module, nnx.BatchStat)
        return variables | ({"batch_stats": batch_stats} if batch_stats else {})

    def apply(self, variables, inputs, *, train, method, key):
        # Made anew inside whatever is traced; its own weights are not used and vanish.
        module = self._make(jax.random.key(0), key)
        _fill(module, nnx.Param, variables["params"])
        _fill(module, nnx.BatchStat, variables.get("batch_stats", {}))
        module.train() if train else module.eval()
        taps.tap_calls(module, taps.show)  # seen where the layers of linen are
        call = module if method == "__call__" else getattr(module, method)
        outputs = call(inputs, **_mode(module, train, method))
        return outputs, _branches(module, nnx.BatchStat)


def _mode(module, train, method="__call__") -> dict:
    """The argument that says whether a method trains; none if it takes none."""
    names = inspect.signature(getattr(type(module), method)).parameters
    name = next((name for name in _MODES if name in names), None)
    return {} if name is None else {name: _MODES[name] == train}


def _branches(module, kind) -> dict:
    """Arrays of one kind of variables as nested dicts whose keys are strings."""
    tree: dict = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module, kind)):
        *branches, name = map(str, path)
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[name] = leaf.get_value()
    return tree


def _fill(module, kind, tree: Mapping):
    """Put what `_branches` took out back."""
    flat = nnx.to_flat_state(nnx.state(module, kind))
    for path, leaf in flat:
        value = tree
        for name in map(str, path):
            value = value[name]
        leaf.set_value(value)
    nnx.update(module, nnx.from_flat_state(flat))
