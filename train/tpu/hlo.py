"""What the text of a compiled program says: its collectives, its main memory traffic.

The compiler's own count of bytes takes the body of a loop once, whatever the number of
trips, and does not ask where an array lives.
"""

import re
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
# What moves nothing: names, views and space set aside. Its kernels are fusions.
NO_KERNEL = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "custom-call",
)
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2}
_BYTES |= {"f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1}


class Instruction(NamedTuple):
    """One line: the shape of its result, and what it does to which operands."""

    shape: str
    kind: str
    given: str  # operands; the number of a parameter, the value of a constant
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,]+)", self.given)

    def named(self, role: str) -> str | None:
        """The function that it calls as its body, its condition, .."""
        match = re.search(rf"{role}=%?([^\s,}}]+)", self.attributes)
        return match and match[1]


def functions_of(text: str) -> dict[str, dict[str, Instruction]]:
    """The program's functions, each its lines by name; "ENTRY" is where it starts."""
    functions, lines = {}, {}
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([^\s(]+) .*\{$", line)
        if head:
            lines = functions.setdefault("ENTRY" if head[1] else head[2], {})
        found = re.match(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][a-z-]*)\((.*)", line)
        if found:
            root, name, shape, kind, rest = found.groups()
            given, _, attributes = rest.partition(")")
            lines[name] = Instruction(shape, kind, given, attributes, bool(root))
    return functions


def count_collectives(text: str) -> dict:
    """dict kind -> (number, bytes of their results on one chip)."""
    found = {}
    for lines in functions_of(text).values():
        for line in lines.values():
            kind = line.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                number, volume = found.get(kind, (0, 0))
                found[kind] = number + 1, volume + _size(line.shape)
    return found


def main_memory_bytes(text: str, *, branch=max) -> int:
    """Bytes that a program reads from main memory and writes to it.

    Operands and results of everything that runs as a kernel count, once a trip of the
    loops around it, unless their layout says ``S(..)``: these arrays stay in memory
    beside a TPU's cores. Of an array that a kernel only slices, the slice counts; of
    one that it updates in place, the update.

    Args:
      text: of ``compiled.as_text()``.
      branch: max or min, over the bytes of the branches of a condition.
    """
    functions = functions_of(text)

    def trips(loop):
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # jax's loops of a known length count up from zero to their one constant.
        condition = functions[loop.named("condition")].values()
        limits = [x.given for x in condition if x.kind == "constant"]
        return max((int(limit) for limit in limits if limit.isdigit()), default=1)

    def read(shape, name, lines):
        """Of one operand, by the lines of its kernel, where it has a name."""
        whole, slices = _main_size(shape), 0
        for line in lines:
            if name not in line.operands:
                continue
            if line.kind in ("dynamic-slice", "slice"):
                slices += _size(line.shape)
            elif line.kind != "dynamic-update-slice" or line.operands[0] != name:
                return whole
        return min(whole, slices)

    def kernel(lines, name):
        line = lines[name]
        inside, own = {name: line}, dict(enumerate(line.operands))
        if line.kind == "fusion":
            inside = functions[line.named("calls")]
            own = {
                int(x.given): key for key, x in inside.items() if x.kind == "parameter"
            }
        total = sum(
            read(lines[operand].shape, own[i], inside.values())
            for i, operand in enumerate(line.operands)
        )
        result = next((x for x in inside.values() if x.root), line)
        while result.kind == "bitcast":
            result = inside[result.operands[0]]
        written = _main_size(line.shape)
        if result.kind == "dynamic-update-slice":
            update = result.operands[1]
            written = min(written, _size((inside.get(update) or lines[update]).shape))
        return total + written

    def function(name):
        lines, total = functions[name], 0
        for key, line in lines.items():
            if line.kind == "while":
                total += trips(line) * function(line.named("body"))
            elif line.kind == "call":
                total += function(line.named("to_apply"))
            elif line.kind == "conditional":
                names = re.findall(r"%([^\s,}]+)", line.attributes)
                total += branch(function(name) for name in names if name in functions)
            elif line.kind in ("copy-start", "slice-start"):
                # Two arrays, the copy's and the original, and a token.
                first, second = _arrays(line.shape)[:2]
                total += min(first[0], second[0]) * (first[1] + second[1])
            elif line.kind not in NO_KERNEL and not line.kind.endswith("-done"):
                total += kernel(lines, key)
        return total

    return function("ENTRY")


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Of a shape, which may be a tuple: (bytes, in main memory) of every array."""
    found = []
    for dtype, sides, layout in re.findall(
        r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", shape
    ):
        size = _BYTES.get(dtype, 0)
        for side in filter(None, sides.split(",")):
            size *= int(side)
        found.append((size, "S(" not in layout))
    return found


def _size(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _main_size(shape: str) -> int:
    return sum(size for size, in_main in _arrays(shape) if in_main)
