"""Damages files in ways that reach their readers: numbers, text, opcodes, splices.

Deterministic by the generator that it is given.
"""

import io
import json
import random
import struct
import zipfile

import numpy as np

_NUMBERS = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, -1)
_PICKLE = b"(.012NKJMGXUTBC}])\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8f\x93\x94"
_PICKLE += b"\x95tldaesuqrhjcRbQ"
_VALUES = (
    None, True, 0, -1, 2**63, 10**400, 1e308, float("nan"), "", "\x1b[31m", "a\nb",
    "x" * 5000, "../../x", [], {}, [[]], {"a": {}}, [0] * 1000, "3e4", [None],
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to eight changes of a file."""
    if rng.random() < 0.5 and data[:1] in b"{[" and (changed := _json(data, rng)):
        return changed
    # An archive of a checkpoint stands for its folder: only its files are damaged.
    if data[:2] == b"PK" and (b"_CHECKPOINT_METADATA" in data or rng.random() < 0.6):
        return _member(data, rng)
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.6 and data[8:9] == b"{" and 8 + length < len(data):
        header = mutate(data[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_CHANGES)(data, rng)
    return bytes(data)


def _member(data, rng) -> bytes:
    """One entry of an archive damaged, under a checksum that is right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    texts = [n for n in entries if n.endswith(("data.pkl", "about.npy"))]
    name = rng.choice(texts if texts and rng.random() < 0.8 else sorted(entries))
    if rng.random() < 0.03:
        del entries[name]
    elif name.endswith("about.npy"):
        entries[name] = _text_array(entries[name], rng)
    else:
        entries[name] = mutate(entries[name], rng)
    file = io.BytesIO()
    form = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", form) as archive:
        for key, contents in entries.items():
            # The same bytes at each call: no time of writing.
            archive.writestr(zipfile.ZipInfo(key), contents, form)
    return file.getvalue()


def _text_array(data, rng) -> bytes:
    """The JSON text in a NumPy array, damaged."""
    text = str(np.load(io.BytesIO(data), allow_pickle=False))
    text = mutate(text.encode(), rng).decode("utf-8", "replace").replace("\0", "?")
    file = io.BytesIO()
    np.save(file, np.array(text))
    return file.getvalue()


def _place(data, rng) -> int:
    # Headers are at either end of a file, most of its bytes are numbers.
    where, span = rng.random(), min(len(data), 2048)
    if where < 0.4:
        return rng.randrange(span + 1)
    return (
        len(data) - rng.randrange(span + 1)
        if where < 0.7
        else (rng.randrange(len(data) + 1))
    )


def _flip(data, rng):
    if data:
        data[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)


def _byte(data, rng):
    if data:
        data[min(_place(data, rng), len(data) - 1)] = rng.randrange(256)


def _opcode(data, rng):
    place = _place(data, rng)
    data[place : place + rng.randrange(2)] = bytes([rng.choice(_PICKLE)])


def _number(data, rng):
    size, layout = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    value = rng.choice(_NUMBERS) % 256**size
    place = _place(data, rng)
    order = rng.choice("<>")
    length = size if rng.random() < 0.8 else 0
    data[place : place + length] = struct.pack(order + layout, value)


def _digits(data, rng):
    place = _place(data, rng)
    digits = str(rng.choice((*_NUMBERS, 2**64, 10**30))).encode()
    for start in range(place, min(place + 200, len(data))):
        if 48 <= data[start] <= 57:
            data[start : start + rng.randrange(1, 3)] = digits
            return


def _cut(data, rng):
    if rng.random() < 0.3:
        del data[_place(data, rng) :]
    else:
        place = _place(data, rng)
        del data[place : place + rng.choice((1, 4, 16, 300))]


def _splice(data, rng):
    start, place = _place(data, rng), _place(data, rng)
    data[place:place] = data[start : start + rng.choice((1, 4, 30, 500))]


def _repeat(data, rng):
    place = _place(data, rng)
    part = bytes(data[place : place + rng.choice((1, 2, 5))])
    data[place:place] = part * rng.choice((10, 1000, 20000))


_CHANGES = (
    _flip, _byte, _opcode, _opcode, _number, _number, _digits, _cut, _splice, _repeat,
)  # fmt: skip


def _json(data, rng) -> bytes | None:
    """A JSON text with values swapped, dropped, nested or replaced."""
    try:
        tree = json.loads(data)
    except ValueError:
        return None
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(tree)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not places:
            break
        node, key = rng.choice(places)
        try:
            if rng.random() < 0.2:
                del node[key]
            elif rng.random() < 0.3:
                other, name = rng.choice(places)
                node[key] = json.loads(json.dumps(other[name]))
            else:
                node[key] = rng.choice(_VALUES)
        except (KeyError, IndexError):
            continue
    if rng.random() < 0.02:
        return b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return json.dumps(tree).encode()
