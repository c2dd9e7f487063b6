"""The size of a forward, as far as plans and predictions depend on it."""

from __future__ import annotations

from typing import Any, NamedTuple


class WorkloadSize(NamedTuple):
    """So many sequences of so many tokens each."""

    sequences: int
    tokens: int

    @staticmethod
    def of(workload: Any) -> WorkloadSize:
        """From what a user states. Raises ValueError if that is not two sizes."""
        sizes = tuple(workload) if isinstance(workload, (tuple, list)) else ()
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(
                f"workload={workload!r}: must be (sequences, tokens of each), two whole numbers"
                " above 0, or a function that runs the module"
            )
        return WorkloadSize(*sizes)
