"""Arrival transforms: a parameter that is made of the bytes that arrive, and is not these bytes.

The bytes land in scratch memory that the plan counts. When they are there, a torch operation on the
compute stream writes the parameter to its own place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class ArrivingTensor:
    """A tensor of the checkpoint among the bytes that arrive."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Arrival:
    """What arrives, and what makes the parameter of it.

    `convert` takes the tensors in the parameter's dtype. None: there is one, of the parameter's
    shape, and it is cast.
    """

    tensors: tuple[ArrivingTensor, ...]
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def write(self, arrived: torch.Tensor, parameter: torch.Tensor) -> None:
        """Make `parameter` of the bytes in `arrived` (uint8, on the same device)."""
        with torch.no_grad():
            tensors = [
                arrived[each.offset : each.offset + each.nbytes].view(each.dtype).view(each.shape)
                for each in self.tensors
            ]
            if self.convert is None:
                parameter.copy_(tensors[0])
            else:
                parameter.copy_(self.convert([tensor.to(parameter.dtype) for tensor in tensors]))
