"""python -m benchmarks.imputation [--sizes 224 448]: how exactly ROAD fills its holes.

Against a sparse factorisation in float64: the largest error over the hole and its root
mean square, for holes of 10, 50 and 90 %, discs and scattered pixels, of an image with
values in [0, 1]. Beside it conjugate gradients without the coarser grids, stopped after
100 steps whatever the size.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

from ibsgl_jax import imputation
from train.show.markdown import markdown

KINDS, FRACTIONS, STEPS = ("disc", "scattered"), (0.1, 0.5, 0.9), 100


def equations(image, hole):
    """(matrix, right-hand side) for the pixels of a hole [H, W] in float64."""
    places = np.full(hole.shape, -1)
    places[hole] = np.arange(hole.sum())
    y, x = np.nonzero(hole)
    rows, columns, values = [], [], []
    degree, known = np.zeros(len(y)), np.zeros((len(y), image.shape[2]))
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        if dy == dx == 0:
            continue
        weight = 1 / 12 if dy and dx else 1 / 6
        at_y, at_x = y + dy, x + dx
        (here,) = np.nonzero(
            (at_y >= 0) & (at_y < hole.shape[0]) & (at_x >= 0) & (at_x < hole.shape[1])
        )
        at_y, at_x = at_y[here], at_x[here]
        degree[here] += weight
        unknown = hole[at_y, at_x]
        rows.extend(here[unknown])
        columns.extend(places[at_y, at_x][unknown])
        values.extend([-weight] * unknown.sum())
        known[here[~unknown]] += weight * image[at_y, at_x][~unknown]
    everyone = list(range(len(y)))
    matrix = scipy.sparse.csc_matrix(
        (values + list(degree), (rows + everyone, columns + everyone))
    )
    return matrix, known


def solved_directly(image, hole):
    """The weighted mean of the neighbours in float64, by a sparse factorisation."""
    matrix, known = equations(image, hole)
    result = image.astype(np.float64)
    result[hole] = scipy.sparse.linalg.splu(matrix).solve(known)
    return result


def stopped_early(image, hole):
    """The same by so many steps of conjugate gradients, scaled by the diagonal."""
    matrix, known = equations(image, hole)
    scale = scipy.sparse.diags_array(1 / matrix.diagonal())
    result = image.astype(np.float64)
    for channel, values in enumerate(known.T):
        result[hole, channel], _ = scipy.sparse.linalg.cg(
            matrix, values, rtol=1e-5, maxiter=STEPS, M=scale
        )
    return result


def make_hole(kind, fraction, size):
    """bool [size, size], True in that fraction of the pixels."""
    y, x = np.mgrid[:size, :size]
    order = (y - size / 2.2) ** 2 + (x - size / 1.9) ** 2
    if kind == "scattered":
        order = np.random.default_rng(1).permutation(size * size).reshape(size, size)
    count = round(fraction * size * size)
    return order <= np.partition(order.ravel(), count - 1)[count - 1]


def make_image(size):
    """float32 [size, size, 2] in [0, 1]: soft patches with a little noise."""
    generator = np.random.default_rng(0)
    coarse = generator.uniform(size=(1, 7, 7, 2)).astype(np.float32)
    image = np.asarray(jax.image.resize(coarse, (1, size, size, 2), "linear"))[0]
    return np.clip(image + 0.03 * generator.normal(size=image.shape), 0, 1).astype("f4")


def errors(found, exact, hole):
    """The largest and the root mean square, over the hole."""
    difference = np.asarray(found, np.float64)[hole] - exact[hole]
    return np.abs(difference).max(), np.sqrt(np.mean(difference**2))


def rows(size):
    """The table's rows for images of size x size."""
    image = make_image(size)
    holes = list(itertools.product(KINDS, FRACTIONS))
    masks = np.stack([make_hole(*hole, size) for hole in holes])
    images = jnp.broadcast_to(image, (len(masks), *image.shape))
    found, steps = jax.jit(imputation.solve)(images, masks)
    for (kind, share), mask, one, count in zip(holes, masks, found, steps, strict=True):
        exact = solved_directly(image, mask)
        before = errors(stopped_early(image, mask), exact, mask)
        now = errors(one, exact, mask)
        yield (
            str(size),
            f"{share:.0%}, {kind}",
            *(f"{error:.1e}" for error in before),
            str(count),
            *(f"{error:.1e}" for error in now),
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    sizes = parser.parse_args(argv).sizes
    header = (
        "pixels",
        "hole",
        f"{STEPS} steps: largest",
        "rms",
        "now: steps",
        "largest",
        "rms",
    )
    print(markdown(header, [row for size in sizes for row in rows(size)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
