"""What does not stream: a module's buffers, which live on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..modules import sources
from ..modules.buffers import Buffer, BufferSizes, BufferStorage, buffer_problems, find_buffers
from ..modules.raw_memory import without_modes
from .integrity import Checker


class Buffers:
    """Puts a module's buffers on the device, until `restore`.

    Persistent ones come from the checkpoint, and those that are one tensor stay one. So do
    parameters without a single element, which no unit has.

    Raises ValueError naming a buffer that has no bytes; CheckpointError naming those that the
    checkpoint lacks, or has with another shape or dtype; torch.OutOfMemoryError where they do not
    fit; with a checker IntegrityError.
    """

    @without_modes()
    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint | None,
        device: torch.device,
        checker: Checker | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._checker = checker
        self._replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        storages = find_buffers(module)
        if checkpoint is not None:
            sources.raise_for(buffer_problems(storages, checkpoint))
        try:
            for owner in module.modules():
                self._place_empty_parameters(owner)
            for storage in storages:
                self._place_storage(storage)
        except torch.OutOfMemoryError as error:
            self.restore()
            raise torch.OutOfMemoryError(
                f"{error}\nThe {device} has no room for the module's {BufferSizes.of(module)}"
            ) from error
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        while self._replaced:
            held, key, found = self._replaced.pop()
            held[key] = found

    def _replace(self, held: dict[str, Any], key: str, value: torch.Tensor) -> None:
        self._replaced.append((held, key, held[key]))
        held[key] = value

    def _place_empty_parameters(self, owner: nn.Module) -> None:
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.numel() == 0:
                empty = torch.empty_like(parameter, device=self._device)
                self._replace(owner._parameters, key, nn.Parameter(empty, False))

    def _place_storage(self, storage: BufferStorage) -> None:
        values = [self._value_of(buffer) for buffer in storage.buffers]
        placed = self._place(storage, values)
        for buffer, value, there in zip(storage.buffers, values, placed, strict=True):
            if self._checker is not None and value is not buffer.tensor:
                self._checker.check_copy(value, there, f"buffer {buffer.name!r}")
            for entry in buffer.entries:
                self._replace(entry.owner._buffers, entry.key, there)

    def _place(self, storage: BufferStorage, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """The values on the device: where there are several, as the same views of one storage."""
        own = [b.tensor is value for b, value in zip(storage.buffers, values, strict=True)]
        if len(values) == 1 or (self._device.type == "cpu" and all(own)):
            return [value.to(self._device) for value in values]
        found = storage.buffers[0].tensor.untyped_storage()
        base = torch.empty(found.nbytes(), dtype=torch.uint8, device=self._device)
        if found.device.type != "meta":
            base.untyped_storage().copy_(found)
        views = []
        for buffer, value in zip(storage.buffers, values, strict=True):
            like = buffer.tensor
            view = torch.empty(0, dtype=like.dtype, device=self._device)
            view.set_(base.untyped_storage(), like.storage_offset(), like.size(), like.stride())
            if value is not like:
                view.copy_(value)
            views.append(view)
        return views

    def _value_of(self, buffer: Buffer) -> torch.Tensor:
        names = [] if self._checkpoint is None else buffer.names_in(self._checkpoint)
        if names:
            return self._read(names[0])
        if buffer.tensor.is_meta:
            raise ValueError(
                f"buffer {buffer.name!r} is on meta and the checkpoint does not have it: build the"
                " module with its buffers real (only parameters on meta)"
            )
        return buffer.tensor

    def _read(self, name: str) -> torch.Tensor:
        assert self._checkpoint is not None
        if self._checker is None:
            return sources.read_tensor(self._checkpoint, name)
        image = self._checker.image_of(self._checkpoint.tensors[name])
        check = partial(image.check, where=f"buffer {name!r}")
        return sources.read_tensor(self._checkpoint, name, check)
