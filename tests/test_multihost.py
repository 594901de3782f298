"""Two processes of two devices each make the run of one process of four."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_run

ROOT = Path(__file__).parents[1]

# A run of `python -m train` whose final state process 0 leaves in a file.
SCRIPT = """
import sys
import jax
import numpy as np
from tests import tiny_run
from train.run import loop

data_dir, workdir, process, port = sys.argv[1:5]
if process != "none":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
config = tiny_run.make_guided_config(data_dir)
print("started", flush=True)
try:
    outcome = loop.train_and_evaluate(config, workdir)
except loop.Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(0)
state = jax.device_get(outcome["guided"][0])
if jax.process_index() == 0:
    np.savez(f"{workdir}/state.npz", *jax.tree.leaves(state))
"""


pytestmark = pytest.mark.slow


def start(workdir, data_dir, process, port, num_devices):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, data_dir, workdir, str(process), str(port)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(processes):
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=280)[0])
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.fixture(scope="module")
def runs(photo_digits_dir, tmp_path_factory):
    """The folders of a run of one process and of one of two."""
    from train.data import dataset

    dataset.load_data(tiny_run.make_guided_config(photo_digits_dir))  # prepared once
    folder = tmp_path_factory.mktemp("multihost")
    finish([start(folder / "one", photo_digits_dir, "none", 0, 4)])
    port = free_port()
    finish([start(folder / "two", photo_digits_dir, p, port, 2) for p in range(2)])
    return folder / "one", folder / "two"


def test_parameters_and_statistics_agree(runs):
    one, two = (np.load(folder / "state.npz") for folder in runs)
    assert one.files == two.files and len(one.files) > 20
    for name in one.files:
        # The sums over examples are taken in another order; Adam's division by the
        # root of tiny second moments amplifies that.
        np.testing.assert_allclose(one[name], two[name], rtol=5e-3, atol=2e-4)


def test_metrics_are_of_all_examples(runs):
    one, two = (
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in runs
    )
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float):
                np.testing.assert_allclose(b[name], value, rtol=2e-3, atol=1e-4)
            else:
                assert b[name] == value


def test_results_are_of_all_examples(runs):
    one, two = (
        json.loads((folder / "results.json").read_text())["phases"]["guided"]
        for folder in runs
    )
    assert one["accuracy"] == pytest.approx(two["accuracy"], abs=1e-6)
    assert one["nll"] == pytest.approx(two["nll"], rel=1e-3)


def test_sigterm_stops_both_at_one_step_and_they_go_on(
    runs, photo_digits_dir, tmp_path
):
    port = free_port()
    processes = [
        start(tmp_path / "two", photo_digits_dir, p, port, 2) for p in range(2)
    ]
    while not (tmp_path / "two" / "config.json").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert all("stopped at step" in output for output in outputs)
    port = free_port()
    finish([start(tmp_path / "two", photo_digits_dir, p, port, 2) for p in range(2)])
    whole, stopped = (
        np.load(folder / "state.npz") for folder in (runs[1], tmp_path / "two")
    )
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], stopped[name])
