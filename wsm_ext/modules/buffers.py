"""A module's buffers: which names stand for one tensor, what it takes, and where its value is.

Buffers do not stream: they live on the device, and count in its budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..sizes import format_bytes
from .sources import same_bytes

# As torch's caching allocator rounds a block, below 10 MiB and from there on.
_SMALL_STEP, _LARGE_STEP, _LARGE = 512, 2 << 20, 10 << 20


@dataclass(frozen=True)
class BufferEntry:
    """One entry of `owner._buffers`, under one of the owner's names."""

    name: str
    owner: nn.Module
    key: str
    persistent: bool


@dataclass
class Buffer:
    """A tensor, and all the entries that hold it."""

    tensor: torch.Tensor
    entries: list[BufferEntry] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.entries[0].name

    def names_in(self, checkpoint: Checkpoint) -> list[str]:
        return [s.name for s in self.entries if s.persistent and s.name in checkpoint.tensors]


@dataclass
class BufferStorage:
    """Buffers whose elements lie in one storage: what is written to one may be seen in another."""

    buffers: list[Buffer] = field(default_factory=list)

    @property
    def device_bytes(self) -> int:
        first = self.buffers[0].tensor
        nbytes = first.numel() * first.element_size()
        if len(self.buffers) > 1:
            nbytes = first.untyped_storage().nbytes()
        step = _SMALL_STEP if nbytes < _LARGE else _LARGE_STEP
        return -(-nbytes // step) * step


def find_buffers(module: nn.Module) -> list[BufferStorage]:
    storages: dict[int, BufferStorage] = {}
    known: dict[object, Buffer] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, tensor in owner._buffers.items():
            if tensor is None:
                continue
            place, view = _identity(tensor)
            if view not in known:
                known[view] = Buffer(tensor)
                storages.setdefault(place, BufferStorage()).buffers.append(known[view])
            name = f"{prefix}.{key}" if prefix else key
            persistent = key not in owner._non_persistent_buffers_set
            known[view].entries.append(BufferEntry(name, owner, key, persistent))
    return list(storages.values())


@dataclass(frozen=True)
class BufferSizes:
    """What a module's buffers take on a device."""

    device_bytes: int
    largest: str  # the largest one's name and size; empty if there are none

    @staticmethod
    def of(module: nn.Module) -> BufferSizes:
        storages = find_buffers(module)
        if not storages:
            return BufferSizes(0, "")
        largest = max(storages, key=lambda storage: storage.device_bytes)
        return BufferSizes(
            sum(storage.device_bytes for storage in storages),
            f"{largest.buffers[0].name!r} with {format_bytes(largest.device_bytes)}",
        )

    def __str__(self) -> str:
        return (
            f"buffers, which do not stream, take {format_bytes(self.device_bytes)} (the largest is"
            f" {self.largest})"
        )


NO_BUFFERS = BufferSizes(0, "")


def buffer_problems(storages: list[BufferStorage], checkpoint: Checkpoint) -> list[str]:
    """What of the buffers the checkpoint lacks, or has otherwise than the module."""
    problems: list[str] = []
    for storage in storages:
        for buffer in storage.buffers:
            names = buffer.names_in(checkpoint)
            for name in names:
                problems += _mismatch(name, buffer.tensor, checkpoint)
            for name in names[1:]:
                if not problems and not same_bytes(checkpoint, names[0], name):
                    problems.append(
                        f"buffers {names[0]!r} and {name!r} are one tensor in the module, and two"
                        " values in the checkpoint"
                    )
            persistent = [entry.name for entry in buffer.entries if entry.persistent]
            if persistent and not names and not checkpoint.computed.keys() & set(persistent):
                problems.append(
                    f"buffer {persistent[0]} is not in the checkpoint; if the module computes it,"
                    " register it with persistent=False"
                )
    return problems


def _mismatch(name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> list[str]:
    image = checkpoint.tensors[name]
    problems = []
    if tuple(tensor.shape) != tuple(image.shape):
        problems.append(
            f"buffer {name} has shape {list(tensor.shape)}, the checkpoint's has"
            f" {list(image.shape)}"
        )
    if tensor.dtype != image.dtype:
        problems.append(
            f"buffer {name} is {tensor.dtype}, the checkpoint's is {image.dtype}; build the module"
            " with the checkpoint's dtype"
        )
    return problems


def _identity(tensor: torch.Tensor) -> tuple[int, object]:
    """The storage, and the view of it."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_conj() or tensor.is_neg():
        return id(tensor), id(tensor)
    place = int(tensor.untyped_storage()._cdata)
    where = tensor.storage_offset(), tensor.size(), tensor.stride()
    return place, (place, tensor.dtype, *where)
