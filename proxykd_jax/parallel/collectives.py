"""Reads from a compiled program's text what its devices exchange."""

from __future__ import annotations

import math
import re
from collections import Counter

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([0-9,]*)\]")
_CALL = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_collectives(program: str) -> dict[str, int]:
    """Bytes of each kind of collective on one device, in one run of a program.

    For each operation the largest array counts: what is gathered, reduced or scattered. A loop
    counts as often as its trip count, or once if that is unknown.

    Args:
      program: HLO text, optimized.

    Returns:
      Kind -> bytes, for the kinds that occur.
    """
    own: dict[str, Counter[str]] = {}
    calls: dict[str, Counter[str]] = {}
    entry = here = ""
    for line in program.splitlines():
        begun = _COMPUTATION.match(line)
        if begun is not None:
            here = begun.group(1)
            own[here], calls[here] = Counter(), Counter()
            if line.startswith("ENTRY"):
                entry = here
            continue
        found = _OPERATION.search(line)
        if found is not None:
            own[here][found.group(2)] += _largest(found.group(1))
        if " while(" in line:
            trips = _TRIPS.search(line)
            body = re.search(r"body=%?([\w.-]+)", line)
            if body is not None:
                calls[here][body.group(1)] += int(trips.group(1)) if trips else 1
        else:
            for called in _CALL.findall(line):
                calls[here][called] += 1

    def total(name: str) -> Counter[str]:
        found = Counter(own.get(name, {}))
        for called, times in calls.get(name, {}).items():
            for kind, size in total(called).items():
                found[kind] += times * size
        return found

    return dict(total(entry))


def _largest(types: str) -> int:
    """Bytes of the largest array in an operation's result types."""
    sizes = [
        _BYTES.get(name, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for name, shape in _ARRAY.findall(types)
    ]
    return max(sizes, default=0)
