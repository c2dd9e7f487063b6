"""A unit that streams: its parameters are in the module while it is taken, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import _engine
from ..checkpoints.arrival import Arrival
from ..modules.dynamo import never_compiled
from ..modules.placeholder import StreamedParameter
from .integrity import UnitCheck

# A module's parameters, the key in them, what is there while the unit is taken, and what else.
Swap = tuple[dict[str, Any], str, nn.Parameter, StreamedParameter]

# What makes a parameter, the bytes it is made of, and the parameter.
Arriving = tuple[Arrival, torch.Tensor, nn.Parameter]

_ABSENT = 0x7FFFFFFF  # a version that nothing is ever saved at


class StreamedUnit:
    """Taken and given back in pairs, by those who are in a pass.

    What autograd has saved of its parameters can be used only while the unit is taken: at all other
    times their version is another one, and autograd compares versions before it uses a tensor.
    """

    def __init__(
        self,
        engine: _engine.Engine,
        index: int,
        name: str,
        swaps: list[Swap],
        memory: torch.Tensor,
        place: _engine.Place,
        arriving: list[Arriving],
        check: UnitCheck | None,
    ) -> None:
        self.index = index
        self.name = name
        self.swaps = swaps
        self._arriving = arriving
        self._check = check
        self._engine = engine
        self._memory = memory  # the parameters are views of it, and share its version
        self._begin, self._end = place.offset, place.offset + place.nbytes
        self._version = memory._version  # while the unit is there
        self._acquired = 0
        _set_version(memory, _ABSENT)

    def overlaps(self, other: StreamedUnit) -> bool:
        """Whether the two can never be there at once."""
        return self is not other and self._begin < other._end and other._begin < self._end

    @never_compiled
    def acquire(self, stream: int) -> None:
        loaded = self._engine.acquire(self.index, stream)
        if self._acquired == 0:
            self._arrive(stream, loaded)
            _set_version(self._memory, self._version)
        self._acquired += 1
        for parameters, key, placed, _ in self.swaps:
            parameters[key] = placed

    def _arrive(self, stream: int, loaded: bool) -> None:
        try:
            if self._check is not None:
                self._check(loaded)
            for arrival, arrived, placed in self._arriving:
                arrival.write(arrived, placed)
        except BaseException:
            self._engine.release(self.index, stream)
            raise

    @never_compiled
    def release(self, stream: int) -> None:
        self._acquired -= 1
        if self._acquired == 0:
            self._version = self._memory._version
            _set_version(self._memory, _ABSENT)
            for parameters, key, _, absent in self.swaps:
                parameters[key] = absent
        self._engine.release(self.index, stream)

    def dissolve(self) -> None:
        """The module gets its own parameters back: leave it alone from now on."""
        self.swaps, self._arriving, self._check = [], [], None
        with torch.inference_mode(False):  # in the middle of a forward it is still given back
            self._memory = torch.empty(0, device="cpu")


def _version_setter() -> Callable[[torch.Tensor, int], None]:
    setter: Any = torch._C._autograd._unsafe_set_version_counter
    try:
        setter((torch.empty(0, device="cpu"),), (0,))
    except TypeError:  # before torch 2.6: one tensor at a time
        return lambda tensor, version: setter(tensor, version)
    return lambda tensor, version: setter((tensor,), (version,))


_set_version = _version_setter()
