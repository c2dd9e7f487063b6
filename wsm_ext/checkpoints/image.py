"""Tensor images: where a tensor's bytes lie in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from .arrival import Arrival


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file and the tensor, and what to do."""


@dataclass(frozen=True)
class Extent:
    """A byte range in a shard, with its place inside the tensor."""

    shard: int
    offset: int
    nbytes: int
    tensor_offset: int = 0


@dataclass(frozen=True)
class TensorImage:
    """Where a tensor's bytes come from. The extents cover it exactly once.

    With an arrival transform they bring what the tensor of this dtype and shape is made of.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    arrival: Arrival | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def arriving_bytes(self) -> int:
        """What the extents bring."""
        return self.nbytes if self.arrival is None else self.arrival.nbytes


def assemble(name: str, parts: Sequence[TensorImage], shape: Sequence[int]) -> TensorImage:
    """One image of `parts` laid one after the other: a stack or a concatenation along dim 0."""
    if not parts:
        raise CheckpointError(f"{name!r} cannot be assembled from no tensors")
    first = parts[0]
    extents: list[Extent] = []
    position = 0
    for part in parts:
        if part.arrival is not None:
            raise CheckpointError(
                f"{name!r} cannot be assembled: {part.name!r} is made when its bytes arrive; give"
                " tensors as they are in the file"
            )
        if part.dtype != first.dtype:
            raise CheckpointError(
                f"{name!r} cannot be assembled: {first.name!r} is {first.dtype},"
                f" {part.name!r} is {part.dtype}; convert the checkpoint to one dtype"
            )
        extents += [replace(e, tensor_offset=e.tensor_offset + position) for e in part.extents]
        position += part.nbytes
    image = TensorImage(name, first.dtype, tuple(shape), tuple(extents))
    if image.nbytes != position:
        raise CheckpointError(
            f"{name!r} of shape {list(shape)} needs {image.nbytes} bytes, but the {len(parts)}"
            f" tensors from {first.name!r} to {parts[-1].name!r} have {position}"
        )
    return image
