"""The reader of PyTorch files: every kind of tensor, and nothing but tensors."""

import collections
import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ibsgl_jax import torch_files

FOLDER = Path(__file__).parent / "data" / "torch"


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Global:
    """Pickles as a name, whether or not anything by that name exists."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class StorageId:
    """Pickles as a reference to a storage of floats outside the pickle."""

    def __init__(self, numel, key="0"):
        self.key, self.numel = key, numel


class Pickler(pickle._Pickler):
    """Writes what PyTorch would, and what a forger would."""

    def save_global_name(self, obj):
        self.write(f"c{obj.module}\n{obj.name}\n".encode())

    dispatch = pickle._Pickler.dispatch | {Global: save_global_name}

    def persistent_id(self, obj):
        if isinstance(obj, StorageId):
            kind = Global("torch", "FloatStorage")
            return ("storage", kind, obj.key, "cpu", obj.numel)
        return None


class Call:
    """Pickles as a call of a `Global`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


def _save_call(pickler, obj):
    pickler.save(obj.function)
    pickler.save(obj.args)
    pickler.write(pickle.REDUCE)


Pickler.dispatch[Call] = _save_call


def pickled(obj):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(obj)
    return file.getvalue()


def tensor(storage, offset, size, stride):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, size, stride, False, {})


def write_zip(path, contents, storages=(b"\0" * 16,), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("top/data.pkl", contents)
        for i, storage in enumerate(storages):
            archive.writestr(f"top/data/{i}", storage)
    return path


class TestRead:
    @pytest.mark.parametrize("name", ["kinds.pth", "kinds_legacy.pth"])
    def test_every_kind_of_tensor(self, name):
        arrays = torch_files.read(FOLDER / name)
        base = np.arange(24, dtype=np.float32).reshape(4, 6)
        expected = {
            "base": base,
            "view": base[1:, ::2],
            "transposed": base.T,
            "empty": np.zeros((0, 3), np.float32),
            "scalar": np.array(7, np.int64),
            "half": np.array([0.5, -2.0], np.float16),
            "boolean": np.array([True, False]),
            "parameter": np.ones(2, np.float32),
        }
        bfloat16 = arrays.pop("bfloat16")
        assert bfloat16.dtype.name == "bfloat16"
        np.testing.assert_array_equal(bfloat16.astype(np.float32), [0.5, -2.0])
        assert set(arrays) == set(expected)
        for key, array in expected.items():
            assert arrays[key].dtype == array.dtype
            np.testing.assert_array_equal(arrays[key], array)

    def test_wrapped_dictionary(self):
        arrays = torch_files.read(FOLDER / "bottleneck.pth")
        assert arrays["module.layer1.0.conv2.weight"].shape == (2, 2, 3, 3)

    def test_big_endian(self, tmp_path):
        contents = pickled({"a": tensor(StorageId(2), 0, (2,), (1,))})
        path = write_zip(tmp_path / "a.pth", contents, [np.array([1, 2], ">f4").data])
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("top/byteorder", "big")
        np.testing.assert_array_equal(torch_files.read(path)["a"], [1.0, 2.0])

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.pth"):
            torch_files.read(tmp_path / "none.pth")

    @pytest.mark.parametrize("name", ["kinds.pth", "kinds_legacy.pth"])
    def test_cut_off_anywhere_is_one_line(self, name, tmp_path):
        whole = (FOLDER / name).read_bytes()
        path = tmp_path / "cut.pth"
        for size in range(0, len(whole) - 1, 29):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cut.pth: ") as caught:
                torch_files.read(path)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["kinds.pth", "kinds_legacy.pth"])
    def test_damaged_anywhere_never_escapes(self, name, tmp_path):
        whole = (FOLDER / name).read_bytes()
        path = tmp_path / "damaged.pth"
        rng = np.random.default_rng(0)
        outcomes = collections.Counter()
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                torch_files.read(path)
                outcomes["read"] += 1
            except ValueError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
        assert min(outcomes["read"], outcomes["refused"]) > 10


class TestRefusal:
    def check(self, path, message):
        with pytest.raises(ValueError, match=message) as caught:
            torch_files.read(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("form", ["zip", "plain", "after the header"])
    def test_a_call_is_refused_by_name_and_not_made(self, form, tmp_path):
        made = tmp_path / "made"
        evil = {"a": Reduced(os.mkdir, str(made))}
        header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path = tmp_path / "evil.pth"
        if form == "zip":
            write_zip(path, pickle.dumps(evil, 2))
        elif form == "plain":
            path.write_bytes(pickle.dumps(evil, 2))
        else:
            path.write_bytes(b"".join(pickle.dumps(o, 2) for o in [*header, evil]))
        self.check(path, r"refused: the file names (posix|nt)\.mkdir")
        assert not made.exists()

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("builtins", "eval"),
            ("collections", "OrderedDict.fromkeys"),
            ("torch", "load"),
            ("torch._utils", "_rebuild_tensor_v2.__globals__"),
            ("ibsgl_jax.torch_files", "os"),
        ],
    )
    def test_other_names(self, module, name, tmp_path):
        path = write_zip(tmp_path / "a.pth", pickled({"a": Global(module, name)}))
        self.check(path, f"the file names {module}.{name}, which is no tensor")

    def test_altering_the_reader(self, tmp_path):
        # BUILD with a state would set attributes, such as a storage's length.
        class Altered:
            pass

        def save_altered(pickler, obj):
            pickler.save(StorageId(1))
            pickler.save({"numel": 10**9})
            pickler.write(pickle.BUILD)

        Pickler.dispatch[Altered] = save_altered
        contents = pickled({"a": tensor(Altered(), 0, (10**9,), (1,))})
        path = write_zip(tmp_path / "a.pth", contents)
        self.check(path, "refused: the file alters an object of its reader")

    @pytest.mark.parametrize(
        ("offset", "size", "stride"),
        [(1, (4,), (1,)), (0, (2, 3), (2, 1)), (-1, (2,), (1,)), (3, (2,), (-1,))],
    )
    def test_reaching_past_the_storage(self, offset, size, stride, tmp_path):
        contents = pickled({"a": tensor(StorageId(4), offset, size, stride)})
        path = write_zip(tmp_path / "a.pth", contents)
        self.check(path, "reaches past its storage")

    def test_storage_longer_than_its_bytes(self, tmp_path):
        contents = pickled({"a": tensor(StorageId(5), 0, (5,), (1,))})
        self.check(write_zip(tmp_path / "a.pth", contents), "cut off")

    def test_compressed_entries(self, tmp_path):
        contents = pickled({"a": tensor(StorageId(4), 0, (4,), (1,))})
        path = tmp_path / "a.pth"
        write_zip(path, contents, compression=zipfile.ZIP_DEFLATED)
        self.check(path, "compressed")

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            ([1, 2], "no dictionary of tensors"),
            ({}, "no dictionary of tensors"),
            ({"a": 1}, "'a', which is no tensor"),
        ],
    )
    def test_no_tensors(self, contents, message, tmp_path):
        self.check(write_zip(tmp_path / "a.pth", pickled(contents)), message)

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (b"", "not a PyTorch file"),
            (b"some text", "not a PyTorch file"),
            (pickle.dumps({"a": 1}, 2), "a pickle, but not one that PyTorch wrote"),
        ],
    )
    def test_other_files(self, contents, message, tmp_path):
        path = tmp_path / "a.pth"
        path.write_bytes(contents)
        self.check(path, message)

    def test_another_zip(self, tmp_path):
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
        self.check(path, "a zip file, but not one that PyTorch wrote")


class TestBounds:
    """Files that announce more than they hold, written as raw operations."""

    def check(self, path, message):
        start = time.process_time()
        with pytest.raises(ValueError, match=message) as caught:
            torch_files.read(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400 + len(str(path))
        assert time.process_time() - start < 10

    @pytest.mark.parametrize(
        ("operations", "message"),
        [
            # A key nested 300,000 deep.
            (b"}" + b")" + b"\x85" * 300_000 + b"K\1s.", "key that is no name"),
            # A tuple that doubles forty times, as a key.
            (b"})" + b"2\x86" * 40 + b"K\1s.", "key that is no name"),
            (b"}r\xff\xff\xff\x7f.", "no dictionary of tensors"),  # a memo's index
            (b"}X\xff\xff\xff\x7fa.", "cut off"),
            (b"}\x8d" + b"\xff" * 8 + b".", "cut off"),
            (b"\x8b\xff\xff\xff\x7f.", "64 bytes"),
            (b"K\0" * 1_000_001 + b".", "more than 1,000,000 operations"),
            (b"0.", "nothing to take"),
            (b"F1.5\n.", "an operation"),
            (b"cos\x1b[31m\nsystem\n.", r"names os\\x1b\[31m.system"),
            (b"c" + b"a" * 9000 + b"\nb\n.", "has no end"),
        ],
    )
    def test_operations(self, operations, message, tmp_path):
        self.check(write_zip(tmp_path / "a.pth", b"\x80\x02" + operations), message)

    def test_names_are_cut_and_escaped(self, tmp_path):
        contents = pickled({"\x1b[2J\u202e" + "x" * 5000: 1})
        self.check(write_zip(tmp_path / "a.pth", contents), r"\\x1b\[2J\\u202ex+\.\.\.")

    @pytest.mark.parametrize(
        ("size", "stride"),
        [
            ((2**33, 4), (0, 1)),
            ((5,), (0,)),
            ((2**62, 2), (0, 0)),
            ((1,) * 40, (1,) * 40),
            ((2**70,), (0,)),
        ],
    )
    def test_repeated_numbers(self, size, stride, tmp_path):
        contents = pickled({"a": tensor(StorageId(4), 0, size, stride)})
        self.check(
            write_zip(tmp_path / "a.pth", contents), "announce|no shape|reaches past"
        )

    def test_one_storage_a_thousand_times(self, tmp_path):
        one = {
            f"a{i}": tensor(StorageId(40_000), 0, (40_000,), (1,)) for i in range(99)
        }
        path = write_zip(tmp_path / "a.pth", pickled(one), [bytes(160_000)])
        self.check(path, "announce more numbers")

    def test_compressed_bomb(self, tmp_path):
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", bytes(2**24))
        self.check(path, "compressed")

    def test_entries_that_overlap(self, tmp_path):
        path = write_zip(tmp_path / "a.pth", pickled({}), [bytes(5000)])
        data = bytearray(path.read_bytes())
        place = data.rindex(b"PK\1\2")
        data[place + 20 : place + 28] = struct.pack("<II", 2**31, 2**31)
        path.write_bytes(data)
        self.check(path, "overlap, or announce more")


class TestSets:
    """Several dictionaries of tensors in one file."""

    def read(self, contents, tmp_path, caplog):
        path = write_zip(tmp_path / "a.pth", pickled(contents), [bytes(4), bytes(8)])
        caplog.clear()
        arrays = torch_files.read(path)
        return arrays["w"].size, caplog.messages

    @pytest.mark.parametrize(
        ("wrap", "size", "said"),
        [
            (lambda t, e: {"state_dict": t}, 1, ""),
            (
                lambda t, e: {"state_dict_ema": e, "state_dict": t},
                1,
                "'state_dict', no",
            ),
            (lambda t, e: {"model_ema": e, "epoch": 1}, 2, "under 'model_ema'"),
            (lambda t, e: {"ema": {"module": e}}, 2, "under 'ema.module'"),
            (lambda t, e: {"teacher": e, "student": t}, 1, "'student', not 'teacher'"),
            (lambda t, e: {"model": t, "optimizer": {"state": {0: e}}}, 1, ""),
        ],
    )
    def test_which_is_taken(self, wrap, size, said, tmp_path, caplog):
        trained = {"w": tensor(StorageId(1, "0"), 0, (1,), (1,))}
        average = {"w": tensor(StorageId(2, "1"), 0, (2,), (1,))}
        found, messages = self.read(wrap(trained, average), tmp_path, caplog)
        assert found == size
        assert len(messages) == bool(said)
        assert said in "".join(messages)
