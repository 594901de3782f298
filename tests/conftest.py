"""Eight CPU devices for every test; must run before the first import of jax.

No test relies on implicit promotion of ranks or dtypes, nor does what it tests. The
environment's variables reach the child processes of tests as well.
"""

import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# What commands keep for the next one, pictures and programs, is not the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="ibsgl_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# A shell's job in the background ignores Ctrl-C, and so would every child of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def explicit_promotion():
    """The flags have arrived: nothing had imported jax before."""
    import jax

    assert jax.config.jax_numpy_rank_promotion == "raise"
    assert jax.config.jax_numpy_dtype_promotion == "strict"


@pytest.fixture(scope="session")
def photo_digits_dir(tmp_path_factory):
    """Where runs of the tests prepare the embedded data set, once."""
    return tmp_path_factory.mktemp("photo_digits")


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Programs compiled by one run are there for the next, as for a restarted one.

    They are compiled without LLVM's slower passes.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, photo_digits_dir):
    """A run with two untrained phases and its evaluation, made once."""
    from tests import tiny_run
    from train import evaluate
    from train.run import saved_run

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    tiny_run.save_untrained(
        tiny_run.make_config(photo_digits_dir, phases=("plain", "guided")), workdir
    )
    run = saved_run.Run(workdir)
    options = evaluate.Options(
        limit=11,
        num_perturbed=5,
        num_sensitivity=3,
        num_method_images=5,
        num_sanity=4,
    )
    source = saved_run.open_split(run, limit=options.limit)
    results, per_example = evaluate.evaluate_run(
        run, source, options=options, progress=False
    )
    evaluate.write_evaluation(results, per_example, workdir)
    return run, source, results, per_example
