"""Damaged files: the short form of benchmarks/fuzz.py, and its own verdicts."""

import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzz_targets import TARGETS, TORCH, outcome
from ibsgl_jax import pretrained
from train.errors import FaultsError

# The worker forks beside the threads of jax, and uses none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")

SHORT = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=80,
    suppress_health_check=list(HealthCheck),
)
KINDS = {kind: (make, read) for kind, make, read in TARGETS}


class TestMutations:
    @pytest.mark.parametrize("kind", ["pth", "pth_legacy", "safetensors", "npz"])
    def test_weights_are_read_or_refused_in_one_line(self, kind, tmp_path):
        seeds = KINDS[kind][0](tmp_path)
        seen = set()

        @SHORT
        @given(number=st.integers(0, 2**32))
        def check(number):
            name, data = fuzz.make_input(seeds, kind, 0, number)
            path = tmp_path / f"damaged_{name}"
            path.write_bytes(data)
            result, words = outcome(pretrained.read_tensors, path)
            assert result in ("accepted", "refused"), words
            seen.add(result)

        check()
        assert "refused" in seen

    def test_photos_are_read_or_refused_in_one_line(self, tmp_path):
        make, read = KINDS["photo"]
        seeds = make(tmp_path)

        @SHORT
        @given(number=st.integers(0, 2**32))
        def check(number):
            name, data = fuzz.make_input(seeds, "photo", 0, number)
            path = tmp_path / f"damaged_{name}"
            path.write_bytes(data)
            result, words = outcome(read, path)
            assert result in ("accepted", "refused"), words

        check()

    def test_the_same_seed_makes_the_same_input(self):
        seeds = [TORCH / "kinds.pth", TORCH / "vgg.pth"]
        one = [fuzz.make_input(seeds, "pth", 3, number) for number in range(40)]
        assert one == [fuzz.make_input(seeds, "pth", 3, number) for number in range(40)]
        assert len({data for _, data in one}) > 30


def _bad_reader(path):
    text = path.read_text()
    if text == "crash":
        os.abort()
    if text == "hang":
        time.sleep(60)
    while text == "busy":
        pass
    if text == "memory":
        return np.ones(2**28)
    if text == "traceback":
        raise KeyError(text)
    if text == "two lines":
        raise ValueError("a\nb")
    if text == "refused":
        raise ValueError("one line")
    if text == "two faults":
        raise FaultsError("2 faults\n  a=1: must be 2\n  b=3: must be 4")
    if text == "a fault that cannot be shown":
        raise FaultsError("1 fault\n  a=\0: must be 2")
    return None


class TestWorker:
    def test_names_every_outcome(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fuzz, "WALL_SECONDS", 5.0)
        monkeypatch.setattr(fuzz, "CPU_SECONDS", 1)
        worker = fuzz.Worker("bad", _bad_reader, [], tmp_path)
        expected = {
            "accepted": "accepted",
            "refused": "refused",
            "two faults": "refused",
            "a fault that cannot be shown": "traceback",
            "traceback": "traceback",
            "two lines": "traceback",
            "memory": "memory",
            "crash": "crash",
            "hang": "hang",
            "busy": "hang",
            "": "accepted",  # a new worker goes on
        }
        try:
            for text, result in expected.items():
                assert worker.run("a", text.encode())[0] == result, text
        finally:
            worker.stop()
