"""Computes the memory traffic of a program compiled for a TPU from its text.

The compiler's own "bytes accessed" counts a prefetch into the chip's memory three or four times, and also counts arrays
that never leave the chip: docs/tpu.md.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4}  # the names of the others contain their size

_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\](\{[^{}]*\})?")

_NAME = re.compile(r"%([\w.\-]+)")

_TRIPS = re.compile(r'known_trip_count[^\d}]*"?n"?:?"?(\d+)')

_CALLED = re.compile(r"\b(?:to_apply|body|branch_computations|true_computation|false_computation)=\{?(%[^,}\s]+)")

# Operations that only name a place in memory or order others.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"}

_KERNEL = 'custom_call_target="tpu_custom_call"'  # a Pallas kernel; other custom calls move nothing

_VMEM = "S(1)"  # in an array's layout: memory on the chip


@dataclass(frozen=True)
class Traffic:
    """The memory traffic of a program, in bytes per device.

    Args:
        fusion: Float, bytes of the operands and results of all computations, on or off the chip.
        hbm: Float, bytes that these and copies move between HBM and the chip.
        reductions: Integer, number of operations in which devices exchange data.
        reduced: Float, bytes of their operands.
    """

    fusion: float = 0.0
    hbm: float = 0.0
    reductions: int = 0
    reduced: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.fusion + other.fusion,
            self.hbm + other.hbm,
            self.reductions + other.reductions,
            self.reduced + other.reduced,
        )


class _Instruction(NamedTuple):
    name: str
    kind: str  # its type, as text
    operation: str
    operands: list[str]
    rest: str


def read(text: str) -> Traffic:
    """Computes the memory traffic of a compiled program.

    Args:
        text: String, `compiled.as_text()`.

    Returns:
        `Traffic`.

    Raises:
        ValueError: If `text` is not a compiled program.

    Example:

    >>> from keras_effnet.tpu.planning.memory_traffic import read
    >>> program = '''
    ... ENTRY %main (x: f32[8,128]) -> f32[8,128] {
    ...   %x = f32[8,128]{1,0:T(8,128)} parameter(0)
    ...   ROOT %y = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%twice
    ... }'''
    >>> read(program)
    Traffic(fusion=8192.0, hbm=4096.0, reductions=0, reduced=0.0)
    """
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            head = _NAME.search(line)
            if head:
                lines = computations.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError(f"Expected the text of a compiled program, with an ENTRY. Received: {text[:60]!r}")
    return _total(entry, computations)


def _total(name: str, computations: dict[str, list[str]]) -> Traffic:
    """The traffic of a computation and those it calls. Operations inside a fusion move nothing."""
    total, kinds = Traffic(), {}
    for one in _parsed(computations[name]):
        kinds[one.name] = one.kind
        if one.operation in ("while", "call", "conditional"):
            trips = _TRIPS.search(one.rest)
            for called in _CALLED.findall(one.rest):
                inside = _total(called.removeprefix("%"), computations)
                times = int(trips[1]) if trips else 1
                total += replace(inside, fusion=inside.fusion * times, hbm=inside.hbm * times)
        elif one.operation not in _FREE and not one.operation.endswith("-done"):
            total += _moved(one, kinds)
    return total


def _moved(one: _Instruction, kinds: dict[str, str]) -> Traffic:
    if one.operation == "custom-call" and _KERNEL not in one.rest:
        return Traffic()
    operands = [array for name in one.operands for array in _arrays(kinds.get(name, ""))]
    results = _arrays(one.kind)
    match one.operation:
        case "copy-start":  # its type: result, operand, context
            borders = [not near for _, near in (results[0], operands[0])]
            return Traffic(hbm=operands[0][0] * sum(borders))
        case "slice-start":  # its type: operands, result, context
            size, near = results[len(operands)]
            return Traffic(hbm=size * sum((not near, not operands[0][1])))
    moved = Traffic(
        fusion=sum(size for size, _ in operands + results),
        hbm=sum(size for size, near in operands + results if not near),
    )
    if one.operation.removesuffix("-start") in ("all-reduce", "reduce-scatter", "all-gather"):
        return replace(moved, reductions=1, reduced=sum(size for size, _ in operands))
    return moved


def _parsed(lines: list[str]) -> Iterator[_Instruction]:
    for line in lines:
        head, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if not equals or not head.startswith("%"):
            continue
        end = _closed(rest) if rest.startswith("(") else rest.index(" ")
        kind, rest = rest[:end], rest[end:].lstrip()
        begin = rest.index("(")
        end = begin + _closed(rest[begin:])
        yield _Instruction(head[1:], kind, rest[:begin], _NAME.findall(rest[begin:end]), rest[end:])


def _closed(text: str) -> int:
    """Index after the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    return len(text)


def _arrays(kind: str) -> list[tuple[float, bool]]:
    """Bytes of each array in a type, and whether it is on the chip."""
    return [
        (_bits(name) / 8 * math.prod(int(size) for size in sizes.split(",") if size), _VMEM in layout)
        for name, sizes, layout in _ARRAY.findall(kind)
    ]


def _bits(name: str) -> int:
    return _BITS.get(name) or int(re.search(r"\d+", name)[0])  # type: ignore[index]
