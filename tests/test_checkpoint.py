"""Checkpoints: whole ones come back bit by bit, damaged ones are noticed and named."""

import logging
import os
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest

from ibsgl_jax import models
from train.errors import CheckpointError
from train.method.state import create_state
from train.run import checkpoint


@pytest.fixture(scope="module")
def state():
    model = models.create(
        "small_resnet", num_classes=3, stage_sizes=(1,), stage_strides=(2,)
    )
    state = create_state(jax.random.key(0), model, optax.adam(1e-3), 24)
    return jax.device_get(state)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A folder of three checkpoints: the best (2) and the newest two (3, 4)."""
    folder = tmp_path_factory.mktemp("saved") / "phase"
    with checkpoint.open_manager(folder) as manager:
        for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
            save(manager, state, step, accuracy)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "phase")


def at_step(state, step):
    return state.replace(step=np.int32(step))


def save(manager, state, step, accuracy):
    meta = {"window": {"loss": [0.1 + step, 3.0]}, "accuracy": accuracy}
    checkpoint.save(manager, at_step(state, step), accuracy=accuracy, meta=meta)
    manager.wait_until_finished()


def restore(folder, state):
    with checkpoint.open_manager(folder) as manager:
        return checkpoint.restore(manager, state)


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_unsealed(folder):
    """As after a kill that left no time for the files' checksums."""
    (folder / checkpoint.FILES).unlink()
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    # A single bit may fall where nothing is read.
    for i in range(30, len(data), 512):
        data[i] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped": lambda folder: flip(largest_file(folder)),
    "flipped, not sealed": flip_unsealed,
    "smallest file deleted": lambda folder: min(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    ).unlink(),
    "truncated": lambda folder: os.truncate(largest_file(folder), 1000),
    "deleted": lambda folder: largest_file(folder).unlink(),
    "accuracy cut": lambda folder: (folder / "metrics" / "metrics").write_text('{"a'),
    "accuracy gone": lambda folder: shutil.rmtree(folder / "metrics"),
    "meta flipped": lambda folder: flip(folder / "meta" / "metadata"),
    "meta gone": lambda folder: shutil.rmtree(folder / "meta"),
    "emptied": lambda folder: [
        path.write_bytes(b"") for path in folder.rglob("*") if path.is_file()
    ],
    "only the folder left": lambda folder: [
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in folder.iterdir()
    ],
}


# A save on a disk, as files of at most 4 KiB imitate it, that takes no more of it.
FULL_DISK = """
import collections, resource, signal, sys
import numpy as np
from train.errors import CheckpointError
from train.run import checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
state = collections.namedtuple("State", "step w")(np.int32(1), np.random.rand(9999))
try:
    with checkpoint.open_manager(sys.argv[1]) as manager:
        checkpoint.save(manager, state, accuracy=0.5, meta={})
except CheckpointError as error:
    print(error)
"""


class TestSave:
    def test_a_full_disk_is_one_line(self, tmp_path):
        process = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(tmp_path / "plain")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        assert process.stdout.startswith(f"cannot save to {tmp_path / 'plain'}: ")
        assert "Traceback" not in process.stderr

    def test_keeps_the_newest_two_and_the_best(self, saved):
        with checkpoint.open_manager(saved) as manager:
            assert sorted(manager.all_steps()) == [2, 3, 4]

    def test_is_of_the_moment_of_the_call(self, state, tmp_path):
        """The arrays may change (be donated) while the files are being written."""
        changing = jax.tree.map(np.array, state)
        with checkpoint.open_manager(tmp_path / "phase") as manager:
            checkpoint.save(
                manager, at_step(changing, 5), accuracy=0.0, meta={"accuracy": 0.0}
            )
            for leaf in jax.tree.leaves(changing):
                leaf.fill(0)
        restored, _ = restore(tmp_path / "phase", state)
        chex.assert_trees_all_equal(restored, at_step(state, 5))


# Reads that fail leave futures behind, which tell of it once more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestRestore:
    def test_nothing_saved_is_none(self, state, tmp_path):
        assert restore(tmp_path / "phase", state) is None

    def test_returns_the_newest_bit_by_bit(self, folder, state):
        restored, meta = restore(folder, state)
        chex.assert_trees_all_equal(restored, at_step(state, 4))
        chex.assert_trees_all_equal_dtypes(restored, state)
        assert meta == {"window": {"loss": [4.1, 3.0]}, "accuracy": 0.3}

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_newest_is_named_and_passed_over(
        self, damage, folder, state, caplog
    ):
        DAMAGES[damage](folder / "4")
        with caplog.at_level(logging.WARNING, logger="train"):
            restored, meta = restore(folder, state)
        assert f"checkpoint {folder / '4'} is damaged" in caplog.text
        chex.assert_trees_all_equal(restored, at_step(state, 3))
        assert meta["accuracy"] == 0.2
        # Out of the way: step 4 can be saved again, and nothing was deleted.
        assert (folder.parent / "phase_4_damaged").is_dir()
        with checkpoint.open_manager(folder) as manager:
            assert 4 not in manager.all_steps()
            save(manager, state, 4, 0.3)
        assert int(restore(folder, state)[0].step) == 4

    def test_names_the_file(self, folder, state, caplog):
        path = largest_file(folder / "4")
        flip(path)
        with caplog.at_level(logging.WARNING, logger="train"):
            restore(folder, state)
        name = path.relative_to(folder / "4")
        assert f"its file {name} has changed" in caplog.text

    def test_misses_no_file(self, folder):
        """Whichever is gone; the reading of orbax does not need all of them."""
        files = [path for path in (folder / "4").rglob("*") if path.is_file()]
        assert len(files) > 8
        for path in files:
            if path.name == checkpoint.FILES:
                continue
            data = path.read_bytes()
            path.unlink()
            with pytest.raises(CheckpointError, match="is missing"):
                checkpoint._check_files(folder / "4")
            path.write_bytes(data)
        checkpoint._check_files(folder / "4")

    def test_arrays_have_a_checksum_of_their_own(self, folder, state, caplog):
        """Whole files with other numbers in them, as orbax would restore silently."""
        (folder / "4" / checkpoint.FILES).unlink()
        shutil.rmtree(folder / "4" / "state")
        shutil.copytree(folder / "3" / "state", folder / "4" / "state")
        with caplog.at_level(logging.WARNING, logger="train"):
            restored, _ = restore(folder, state)
        assert "do not match their checksum" in caplog.text
        assert int(restored.step) == 3

    def test_two_damaged_are_passed_over(self, folder, state):
        DAMAGES["flipped"](folder / "4")
        DAMAGES["accuracy cut"](folder / "3")
        assert int(restore(folder, state)[0].step) == 2

    @pytest.mark.parametrize("damage", ["flipped", "accuracy gone", "emptied"])
    def test_refuses_when_none_is_left_each_time(self, damage, folder, state):
        shutil.copytree(folder / "3", folder / checkpoint.TRASH / "1")
        for step in (2, 3, 4):
            DAMAGES[damage](folder / str(step))
        for _ in range(2):  # the same command again must not start over either
            with pytest.raises(CheckpointError) as info:
                restore(folder, state)
            assert str(folder) in str(info.value) and "\n" not in str(info.value)
        names = [path.name for path in folder.iterdir()]
        assert sorted(names) == ["2", "3", "4", checkpoint.TRASH]
        assert (folder / checkpoint.TRASH / "1").exists()

    def test_what_a_kill_left_to_delete_is_in_nobodys_way(self, folder, state):
        shutil.copytree(folder / "4", folder / checkpoint.TRASH / "3")
        with checkpoint.open_manager(folder) as manager:
            assert int(checkpoint.restore(manager, state)[0].step) == 4
            for step in (5, 6):  # 3 and 4 are deleted
                save(manager, state, step, 0.1)
            assert sorted(manager.all_steps()) == [2, 5, 6]
        assert not (folder / checkpoint.TRASH).exists()

    def test_another_shape_is_refused(self, folder, state):
        other = state.replace(params={"w": np.zeros(3, np.float32)})
        with pytest.raises(CheckpointError):
            restore(folder, other)
        assert (folder / "4").is_dir()


class TestChecksum:
    def test_sees_every_bit_and_the_order(self):
        tree = {"a": np.arange(4.0), "b": np.arange(3)}
        value = checkpoint.checksum(tree)
        assert value == checkpoint.checksum(jax.tree.map(np.copy, tree))
        tree["b"][1] ^= 1
        assert value != checkpoint.checksum(tree)
        assert checkpoint.checksum([tree["a"], tree["b"]]) != checkpoint.checksum(
            [tree["b"], tree["a"]]
        )
