"""What is done with a unit's bytes when they have come, before its parameters are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoints.arrival import Arrival
from .integrity import UnitCheck


@dataclass(frozen=True)
class ArrivingParameter:
    """A parameter that is made of what arrives, each time it arrives."""

    arrival: Arrival
    arrived: torch.Tensor  # bytes in the arena
    placed: torch.Tensor

    def make(self) -> None:
        self.arrival.write(self.arrived, self.placed)


class UnitArrivals:
    """Checks a unit's bytes, and makes the parameters that are not just their bytes.

    Called by the seam at each acquire of a unit that nobody holds. Where it fails, by an interrupt
    say, the unit counts as never acquired: the next acquire calls it again.
    """

    def __init__(self, check: UnitCheck | None, parameters: Sequence[ArrivingParameter]) -> None:
        self.check = check
        self._parameters = parameters

    def __call__(self, unchecked: bool) -> None:
        """`unchecked`: the unit was loaded since this has last succeeded."""
        if self.check is not None:
            self.check(unchecked)
        for parameter in self._parameters:
            parameter.make()
