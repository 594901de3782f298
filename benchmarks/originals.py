"""python -m benchmarks.originals FOLDER [--rounding]: beside the originals, full size.

The folder is what ``python tests/data/make_originals.py --full FOLDER`` wrote. Printed
are the largest deviations over two images: of the logits as they are, of maps and
gradients of class 1 as a share of the largest value. ``--rounding``: of the networks
here from themselves, where every value of the images is its next neighbour.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ibsgl_jax import attribution, models, pretrained
from train.show.markdown import markdown

METHODS = ("hirescam", "grad_cam", "layer_cam", "gradient", "integrated_gradients")


@jax.jit
def explain(features_fn, head_fn, images):
    """Logits, and each method's raw values for class 1: one program compiles faster."""
    classes, features = jnp.ones(len(images), jnp.int32), features_fn(images)
    options = {"integrated_gradients": {"num_steps": 3, "rule": "riemann_middle"}}
    found = {"logits": head_fn(features)}

    def logits_fn(images):
        return head_fn(features_fn(images))

    for method in METHODS:
        fn = attribution.METHODS[method]
        if method in attribution.FEATURE_METHODS:
            found[method] = fn(head_fn, features, classes)
        else:
            found[method] = fn(logits_fn, images, classes, **options.get(method, {}))
    return found


def compare(path: pathlib.Path, *, rounding=False, **options) -> tuple[str, ...]:
    """The table's row of one file; options of the model, where it is a small one."""
    name, source = path.stem.split(".")
    with np.load(path) as file:
        arrays = dict(file)
    tensors = {
        key.removeprefix("tensors/"): value
        for key, value in arrays.items()
        if key.startswith("tensors/")
    }
    model, variables = pretrained.fill(name, tensors, **options)
    features_fn = models.make_features_fn(model, variables)
    head_fn = models.make_head_fn(model, variables)
    images = arrays["images"]
    found = explain(features_fn, head_fn, jnp.asarray(images))
    if rounding:
        arrays = jax.tree.map(np.asarray, found)
        images = np.nextafter(images, np.float32(np.inf))
        found = explain(features_fn, head_fn, jnp.asarray(images))
    cells = [f"{np.abs(found['logits'] - arrays['logits']).max():.0e}"]
    for method in METHODS:
        peak = np.abs(arrays[method]).max()
        cells.append(f"{np.abs(found[method] - arrays[method]).max() / peak:.0e}")
    return (name, source, *cells)


def main(argv=None) -> int:
    """Print the table of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--rounding", action="store_true")
    args = parser.parse_args(argv)
    paths = sorted(args.folder.glob("*.npz"))
    rows = [compare(path, rounding=args.rounding) for path in paths]
    print(markdown(("network", "names", "logits", *METHODS), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
