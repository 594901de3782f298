"""Eight CPU devices for every test; must run before the first import of jax.

No test relies on implicit promotion of ranks or dtypes, nor does what it tests. The
environment's variables reach the child processes of tests as well.

A program is compiled once in a session, for all workers and the commands that they
start, without LLVM's slower passes and, where XLA still has others, without its slower
emitters of fused loops. ``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` tests what users run; a
``JAX_COMPILATION_CACHE_DIR`` that is kept makes the next session short.
"""

import atexit
import collections
import fcntl
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_QUICK = "--xla_cpu_use_fusion_emitters=false"


def _knows(flag: str) -> bool:
    """Whether this XLA has a flag; it ends a process that gives it another."""
    start = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    env = os.environ | {"XLA_FLAGS": flag}
    return not subprocess.run(
        [sys.executable, "-c", start], env=env, capture_output=True
    ).returncode


if (
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    and "PYTEST_XDIST_WORKER" not in os.environ  # a worker has what the first found
    and _knows(_QUICK)
):
    os.environ["XLA_FLAGS"] += f" {_QUICK}"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker's
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

# What commands keep for the next one, pictures and programs, is not the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="ibsgl_tests_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# A shell's job in the background ignores Ctrl-C, and so would every child of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

# Files of few but long tests, which go first: the workers end together.
FIRST = (
    "test_benchmark_commands",
    "test_multihost",
    "test_sweep",
    "test_configs",
    "test_photos_road",
    "test_wheel",
    "test_compile",
)


def pytest_collection_modifyitems(items):
    """Whole files, those of FIRST and then those of the most tests."""
    count = collections.Counter(item.path for item in items)

    def place(item):
        file = item.path
        return file.stem not in FIRST, -count[file], file

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def explicit_promotion():
    """The flags have arrived: nothing had imported jax before."""
    import jax

    assert jax.config.jax_numpy_rank_promotion == "raise"
    assert jax.config.jax_numpy_dtype_promotion == "strict"


def made_once(name, tmp_path_factory, make):
    """What make(folder) returns in the first worker that asks; the others read it."""
    folder = tmp_path_factory.getbasetemp().parent / f"{name}_of_all_workers"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a folder of this session alone
        folder = tmp_path_factory.mktemp(name)
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made.pickle"
        if not made.exists():
            made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())


@pytest.fixture(scope="session")
def photo_digits_dir(tmp_path_factory):
    """Where the tests' runs find the embedded data set."""
    from tests import tiny_run
    from train.data import dataset

    def make(folder):
        dataset.load_data(tiny_run.make_config(folder))
        return folder

    return made_once("photo_digits", tmp_path_factory, make)


@pytest.fixture
def optimized():
    """Programs of this test run long enough to be compiled as users compile them."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, photo_digits_dir):
    """A run with two untrained phases and its evaluation."""
    from tests import tiny_run
    from train import evaluate
    from train.run import saved_run

    options = evaluate.Options(
        limit=11,
        num_perturbed=5,
        num_sensitivity=3,
        num_method_images=5,
        num_sanity=4,
    )

    def make(folder):
        workdir = folder / "tiny"
        tiny_run.save_untrained(
            tiny_run.make_config(photo_digits_dir, phases=("plain", "guided")), workdir
        )
        run = saved_run.Run(workdir)
        source = saved_run.open_split(run, limit=options.limit)
        results, per_example = evaluate.evaluate_run(
            run, source, options=options, progress=False
        )
        evaluate.write_evaluation(results, per_example, workdir)
        return workdir, results, per_example

    workdir, results, per_example = made_once("evaluated", tmp_path_factory, make)
    run = saved_run.Run(workdir)
    source = saved_run.open_split(run, limit=options.limit)
    return run, source, results, per_example
