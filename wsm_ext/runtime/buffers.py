"""What does not stream: a module's buffers, which live on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..modules import sources
from ..modules.raw_memory import without_modes
from .integrity import Checker


class Buffers:
    """Puts a module's buffers on the device, until `restore`.

    Persistent ones come from the checkpoint. So do parameters without a single element, which no
    unit has. Raises ValueError naming a buffer that has no bytes, or another shape; with a checker
    IntegrityError.
    """

    @without_modes()
    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint | None,
        device: torch.device,
        checker: Checker | None = None,
    ) -> None:
        self._device = device
        self._checker = checker
        self._replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        try:
            for prefix, owner in module.named_modules():
                self._place_empty_parameters(owner)
                self._place_buffers(owner, prefix, checkpoint)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        for tensors, key, original in self._replaced:
            tensors[key] = original
        self._replaced.clear()

    def _replace(self, tensors: dict[str, Any], key: str, value: torch.Tensor) -> None:
        self._replaced.append((tensors, key, tensors[key]))
        tensors[key] = value

    def _place_empty_parameters(self, owner: nn.Module) -> None:
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.numel() == 0:
                empty = torch.empty_like(parameter, device=self._device)
                self._replace(owner._parameters, key, nn.Parameter(empty, False))

    def _place_buffers(self, owner: nn.Module, prefix: str, checkpoint: Checkpoint | None) -> None:
        for key, buffer in owner._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            value = buffer
            persistent = key not in owner._non_persistent_buffers_set
            if checkpoint is not None and persistent and name in checkpoint.tensors:
                value = self._read(checkpoint, name)
                if value.shape != buffer.shape:
                    raise ValueError(
                        f"buffer {name!r} has shape {list(buffer.shape)}, the checkpoint's has"
                        f" {list(value.shape)}"
                    )
                value = value.to(buffer.dtype)
            elif buffer.is_meta:
                raise ValueError(
                    f"buffer {name!r} is on meta and the checkpoint does not have it: build the"
                    " module with its buffers real (only parameters on meta)"
                )
            placed = value.to(self._device)
            if self._checker is not None and value is not buffer:
                self._checker.check_copy(value, placed, f"buffer {name!r}")
            self._replace(owner._buffers, key, placed)

    def _read(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        if self._checker is None:
            return sources.read_tensor(checkpoint, name)
        image = self._checker.image_of(checkpoint.tensors[name])
        return sources.read_tensor(checkpoint, name, partial(image.check, where=f"buffer {name!r}"))
