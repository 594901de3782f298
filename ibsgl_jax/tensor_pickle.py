"""The part of the pickle format that holds tensors, as a small machine with bounds.

Python's own unpickler hashes, compares and allocates what a file tells it to: a nested
key ends the process, a large memo index takes gigabytes. This one knows dictionaries,
lists, tuples, numbers, text and the few names that its caller gives; a key is a plain
value, a set is a list, nothing is nested by recursion, no attribute is ever set.
Reference: the Python standard library's ``pickletools``, which lists the operations.
"""

import struct

# ResNet-101 with its optimizer's state takes about 100,000.
MAX_OPERATIONS = 1_000_000
MAX_NAME = 512
_PLAIN = (str, int, float, bool, bytes, type(None))


class Refused(Exception):
    """What the reader will not do, in words."""


def printable(text, length: int = 80) -> str:
    """Text from a file without control characters or escapes, and not too long."""
    text = str(text) if isinstance(text, (str, int, float)) else type(text).__name__
    cut = text if len(text) <= length else text[:length] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


class Source:
    """Bytes of an open file that never reads, or allocates, past its end."""

    def __init__(self, file, size: int):
        self.file, self.left = file, size - file.tell()

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise Refused("the file is cut off")
        self.left -= size
        data = self.file.read(size)
        if len(data) != size:
            raise Refused("the file is cut off")
        return data

    def line(self) -> str:
        data = self.file.readline(MAX_NAME)
        self.left -= len(data)
        if not data.endswith(b"\n"):
            raise Refused("a name in the file has no end")
        return data[:-1].decode()

    def number(self, layout: str):
        (value,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        return value


def load(source: Source, known, persistent_load=None):
    """What one pickle holds.

    Args:
      source: the file, at the pickle's first byte; left behind its last.
      known: (module, name) -> what the name stands for; callables are called with
        what the file gives and must check it.
      persistent_load: function of a persistent identifier, or None if there are none.

    Raises:
      Refused: for other names, keys that are no plain values, unknown operations, too
        many of them, or a cut-off file.
      IndexError, KeyError, ...: for broken contents.
    """
    machine = _Machine(source, known, persistent_load)
    for _ in range(MAX_OPERATIONS):
        code = source.read(1)
        if code == b".":
            return machine.pop()
        if code not in _OPERATIONS:
            raise Refused(f"an operation {code!r} that no PyTorch file needs")
        _OPERATIONS[code](machine)
    raise Refused(f"more than {MAX_OPERATIONS:,} operations")


class _Machine:
    def __init__(self, source, known, persistent_load):
        self.source, self.known = source, known
        self.persistent_load = persistent_load
        self.stack, self.marks, self.memo = [], [], {}

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("broken contents: nothing to take")
        return self.stack.pop()

    def top(self, kind):
        self.push(value := self.pop())
        if not isinstance(value, kind):
            raise Refused("broken contents: an item where no item can be")
        return value

    def pop_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: int):
        self.memo[index] = self.top(object)

    def extend(self, items):
        self.top(list).extend(items)

    def set_items(self, items):
        update(self.top(dict), zip(items[::2], items[1::2], strict=True))

    def name(self, module, name):
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("broken contents: a name that is no text")
        if (module, name) not in self.known:
            raise Refused(
                f"refused: the file names {printable(f'{module}.{name}')}, which is no "
                "tensor; save the state_dict alone"
            )
        self.push(self.known[module, name])

    def call(self):
        arguments, function = self.pop(), self.pop()
        if not (callable(function) and isinstance(arguments, tuple)):
            raise Refused("refused: the file calls something that is no function")
        self.push(function(*arguments))

    def build(self):
        self.pop()
        # The attributes that a file gives an ordered dictionary are dropped.
        if not isinstance(self.stack[-1], dict):
            raise Refused("refused: the file alters an object of its reader")

    def refer(self):
        if self.persistent_load is None:
            raise Refused("not a PyTorch file: a tensor before its header")
        self.push(self.persistent_load(self.pop()))

    def text(self, layout):
        # Files of Python 2 hold names as strings of bytes.
        data = self.source.read(self.source.number(layout))
        self.push(data.decode("utf-8", "surrogatepass"))

    def data(self, layout):
        self.push(self.source.read(self.source.number(layout)))

    def long(self, layout):
        size = self.source.number(layout)
        if size > 64:
            raise Refused("a number in the file has more than 64 bytes")
        self.push(int.from_bytes(self.source.read(size), "little", signed=True))


def update(dictionary: dict, pairs) -> None:
    """Sets items whose keys a file gives: plain values, which hash in no time.

    Raises:
      Refused: a key is anything else.
    """
    for key, value in pairs:
        flat = key if type(key) is tuple and len(key) <= 16 else (key,)
        if not all(type(part) in _PLAIN for part in flat):
            raise Refused(f"a dictionary key that is no name ({printable(key)})")
        dictionary[key] = value


def _tuple(count):
    def operation(machine):
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(items[::-1]))

    return operation


def _number(layout):
    return lambda m: m.push(m.source.number(layout))


def _set_item(machine):
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _stack_global(machine):
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _dict(machine):
    items = machine.pop_mark()
    machine.push({})
    machine.set_items(items)


_OPERATIONS = {
    b"\x80": lambda m: m.source.read(1),
    b"\x95": lambda m: m.source.read(8),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.pop_mark(),
    b"2": lambda m: m.push(m.top(object)),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": _number("<i"),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"G": _number(">d"),
    b"\x8a": lambda m: m.long("<B"),
    b"\x8b": lambda m: m.long("<I"),
    b"X": lambda m: m.text("<I"),
    b"\x8c": lambda m: m.text("<B"),
    b"\x8d": lambda m: m.text("<Q"),
    b"T": lambda m: m.text("<I"),
    b"U": lambda m: m.text("<B"),
    b"B": lambda m: m.data("<I"),
    b"C": lambda m: m.data("<B"),
    b"\x8e": lambda m: m.data("<Q"),
    b"\x96": lambda m: m.data("<Q"),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b"\x8f": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"l": lambda m: m.push(m.pop_mark()),
    b"d": _dict,
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"\x90": lambda m: m.extend(m.pop_mark()),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"q": lambda m: m.put(m.source.number("<B")),
    b"r": lambda m: m.put(m.source.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.source.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.source.number("<I")]),
    b"c": lambda m: m.name(m.source.line(), m.source.line()),
    b"\x93": _stack_global,
    b"R": lambda m: m.call(),
    b"\x81": lambda m: m.call(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.refer(),
}
