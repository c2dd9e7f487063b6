"""Reads of streamed parameters outside of all passes: each is a copy, and costs a fetch.

A write into such a copy, or a view of it, would be lost. To autograd both are views of the
placeholder, and share its version: one that has moved by the next read or pass is an error.
"""

from __future__ import annotations

import warnings

import torch

from ..modules.placeholder import StreamedParameter

# Of all parameters that one operation reads: more is a walk over the model, that no one has meant.
MOST_BYTES = 1 << 30


class OutsideReads:
    """Counts, warns of the first, and finds writes."""

    def __init__(self, largest_bytes: int) -> None:
        self.count = 0
        self.nbytes = 0
        self._most_bytes = max(MOST_BYTES, largest_bytes)  # one tensor can always be read
        # By name: a parameter that was read, and its version then.
        self._read: dict[str, tuple[StreamedParameter, int]] = {}

    def allow(self, names: list[str], nbytes: int) -> None:
        """Raises RuntimeError where one operation would read too much."""
        if nbytes > self._most_bytes:
            raise RuntimeError(
                f"one operation would fetch {len(names)} streamed parameters of {nbytes} bytes"
                f" ({names[0]!r} and others), more than {self._most_bytes}: read them one by one,"
                " by fetch(name) of the streamed module"
            )

    def add(self, parameter: StreamedParameter, copy: torch.Tensor) -> None:
        """The parameter is read, and this is what it gives. Raises as `check` does."""
        self.check()
        name = parameter.wsm_name
        if self.count == 0:
            warnings.warn(
                f"parameter {name!r} is streamed, and was read outside of a forward: each such read"
                " fetches a copy, which is slow. fetch(name) of the streamed module gives one to"
                " keep, and stats()['outside_reads'] counts them",
                stacklevel=7,
            )
        self.count += 1
        self.nbytes += copy.nbytes
        self._read.setdefault(name, (parameter, parameter._version))

    def check(self) -> None:
        """Raises RuntimeError where somebody wrote into what was read before."""
        for name, (parameter, version) in self._read.items():
            if parameter._version != version:
                self._read[name] = parameter, parameter._version
                raise RuntimeError(
                    f"a copy of the streamed parameter {name!r} was written to: the change is lost,"
                    " since the parameter streams from its checkpoint. Set a parameter of your own"
                    " in its stead (module.weight = torch.nn.Parameter(...))"
                )
