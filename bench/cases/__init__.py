"""The cases: each a function from the context to its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from context import Context

from . import compute, disk, fit, host, memory, ram


@dataclass(frozen=True)
class Case:
    """`number`: of its bar. `shares`: the context's models that it uses."""

    name: str
    run: Callable[[Context], dict[str, Any]]
    number: int | None = None
    shares: tuple[str, ...] = ()


CASES = (
    Case("ram", ram.from_ram, 1, ("streamed",)),
    Case("compute", compute.compute_bound, 2, ("streamed", "resident", "wrapped")),
    Case("fit", fit.sixteen_gib, 3),
    Case("disk", disk.cold_disk, 4),
    Case("half", disk.half_cached, 5),
    Case("first", disk.first_output, 6),
    Case("tmpfs", ram.from_tmpfs, 7),
    Case("pinning", memory.pinning, 8),
    Case("wrapper", compute.wrapper, 9, ("resident", "wrapped")),
    Case("swap", host.swap, 10),
    Case("leaf", memory.leaf_units, 11),
    Case("busy", compute.busy, 12, ("streamed",)),
    Case("resident", compute.resident, None, ("resident", "wrapped")),
    Case("bits", host.bit_equal),
)


def find(words: str) -> list[Case]:
    """ "1,2,disk" -> those cases; ValueError names what is not known."""
    named = {case.name: case for case in CASES}
    named |= {str(case.number): case for case in CASES if case.number}
    unknown = [word for word in words.split(",") if word not in named]
    if unknown:
        known = ", ".join(f"{c.number} {c.name}" if c.number else c.name for c in CASES)
        raise ValueError(f"unknown case {', '.join(unknown)}; known: {known}")
    return [named[word] for word in words.split(",")]
