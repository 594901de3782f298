"""The exported function: alone in a process without this package, the same maps."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibsgl_jax import attribution, export, feature_stats, models, tapping
from ibsgl_jax.bottleneck import BottleneckConfig
from tests.tiny_classifier import (
    loaded_fixture,  # noqa: F401
    photos_fixture,  # noqa: F401
    run_fixture,  # noqa: F401
)

# Whoever imports this package, or flax, fails.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ibsgl_jax", "flax", "optax", "chex"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import pathlib
import jax, jax.export
import numpy as np
functions = {
    path.stem: jax.export.deserialize(bytearray(path.read_bytes()))
    for path in pathlib.Path(sys.argv[1]).glob("*.jaxexport")
}
inputs = np.load(sys.argv[2])
results = {}
for name, function in functions.items():
    assert set(function.platforms) == {"cpu", "cuda", "tpu"}
    for n in (1, 3) if name == "pooled" else (3,):
        maps, logits = function.call(inputs["images"][:n], inputs["classes"][:n])
        results[f"{name}_{n}"] = maps
        results[f"logits_{n}"] = logits
np.savez(sys.argv[3], **results)
"""


@pytest.fixture(scope="module")
def parts(loaded):
    size = loaded.preprocessing.size
    images = jax.random.normal(jax.random.key(3), (3, size, size, 3))
    features_fn = models.make_features_fn(loaded.model, loaded.variables)

    @jax.jit
    def measure(images):
        features = features_fn(images)
        state = feature_stats.init(features.shape[1:])
        return feature_stats.moments(feature_stats.update(state, features))

    moments = measure(images)
    return images, features_fn, moments


class TestExport:
    def test_runs_alone_with_equal_maps(self, loaded, parts, tmp_path):
        images, features_fn, moments = parts
        head_fn = models.make_head_fn(loaded.model, loaded.variables)
        inner = tapping.linen(
            loaded.model, loaded.variables, "layer2_0", image_shape=images.shape[1:]
        )
        config = BottleneckConfig(num_steps=3, num_samples=2)
        needs = dict(key=jax.random.key(1), moments=moments)
        cases = {
            "pooled": (features_fn, head_fn, "ib", needs | dict(config=config)),
            "inner": (*inner, "ib", needs | dict(config=config)),
        }
        classes = np.array([-1, 2, -1], np.int32)
        logits = attribution.predict(features_fn, head_fn, images)
        filled = np.where(classes < 0, np.argmax(logits, axis=-1), classes)
        expected = {}
        for name, (features, head, method, options) in cases.items():
            attribution_fn = attribution.make_attribution_fn(
                method, features, head, **options
            )
            blob = export.export_attribution(
                attribution_fn,
                lambda x, features=features, head=head: head(features(x)),
                image_shape=images.shape[1:],
            )
            (tmp_path / f"{name}.jaxexport").write_bytes(blob)
            expected[name] = attribution.attribute(
                method, features, head, images, filled, **options
            )
        np.savez(tmp_path / "in.npz", images=images, classes=classes)
        done = subprocess.run(
            [sys.executable, "-c", ALONE, tmp_path, tmp_path / "in.npz", "out.npz"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "out.npz") as results:
            for n in (1, 3):
                np.testing.assert_allclose(
                    results[f"logits_{n}"], logits[:n], rtol=1e-5, atol=1e-5
                )
            for name, n in (("pooled", 1), ("pooled", 3), ("inner", 3)):
                # Float32 sums in another order, through three Adam steps.
                maps = expected[name]
                np.testing.assert_allclose(
                    results[f"{name}_{n}"],
                    maps[:n],
                    rtol=0,
                    atol=1e-5 * float(jnp.max(maps)),
                )


class TestCommand:
    def test_writes_the_function_and_what_it_needs(
        self,
        run,
        photos,
        loaded,
        tmp_path,
    ):
        out = tmp_path / "new" / "ib.jaxexport"
        status, _, stderr = run("export", "--method", "ib", "--out", out)
        assert status == 2 and "give --stats FOLDER" in stderr
        status, stdout, _ = run(
            *("export", "--method", "ib", "--stats", photos, "--out", out)
        )
        assert status == 0 and "jax.export.deserialize" in stdout
        description = json.loads(out.with_name("ib.jaxexport.json").read_text())
        assert description["size"] == 48 and description["method"] == "ib"
        assert len(description["class_names"]) == 6
        function = jax.export.deserialize(bytearray(out.read_bytes()))
        images = np.zeros((2, 48, 48, 3), np.float32)
        maps, logits = function.call(images, np.array([-1, 5], np.int32))
        assert maps.shape == (2, 48, 48) and logits.shape == (2, 6)
        assert np.all(np.isfinite(maps))

    def test_several_methods_do_not_fit(self, run, tmp_path):
        status, _, stderr = run("export", "--method", "ib,random", "--out", tmp_path)
        assert status == 2 and "one file holds one method" in stderr

    @pytest.mark.parametrize("name", ["f.jaxexport", "f.jaxexport.json"])
    @pytest.mark.parametrize("kind", ["file", "link", "folder"])
    def test_nobodys_file_is_written_over(
        self,
        run,
        tmp_path,
        monkeypatch,
        name,
        kind,
    ):
        blobs = iter([b"first", b"second"])
        monkeypatch.setattr(
            export, "export_attribution", lambda *args, **options: next(blobs)
        )
        folder = tmp_path / "out"
        command = ("export", "--method", "random", "--out", folder / "f.jaxexport")
        assert run(*command)[0] == 0 and run(*command)[0] == 0  # its own: replaced
        assert (folder / "f.jaxexport").read_bytes() == b"second"
        assert len(list(folder.iterdir())) == 2
        (folder / name).unlink()
        (tmp_path / "precious").write_text("precious")
        if kind == "file":
            (folder / name).write_text("precious")
        elif kind == "link":
            (folder / name).symlink_to("../precious")
        else:
            (folder / name).mkdir()
        before = sorted(path.lstat() for path in folder.iterdir())
        status, _, stderr = run(*command)
        (line,) = stderr.splitlines()
        assert status == 2 and ("choose another --out" in line or "a folder" in line)
        assert sorted(path.lstat() for path in folder.iterdir()) == before
        assert (tmp_path / "precious").read_text() == "precious"
