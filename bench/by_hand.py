"""Two buffers written by hand in plain PyTorch: the least code that overlaps copies and computing.

Every layer lies flat in pinned memory. Two places of a layer's size on the device take turns:
while one computes, the next layer is copied into the other. Layers must be of one shape, and run
in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TwoBuffers:
    """Streams `layers` to `device`; the rest of the model must lie there already."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.device, self.layers = device, layers
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.shapes = [[p.shape for p in layer.parameters()] for layer in layers]
        self.host = [self._flatten(layer) for layer in layers]
        self.places = [torch.empty_like(self.host[0], device=device) for _ in range(2)]
        self.used = 0  # layers that have run
        self.loaded: list[Any] = [self._event() for _ in range(2)]
        self.free: list[Any] = [self._event() for _ in range(2)]
        for index, layer in enumerate(layers):
            self._forget(layer)
            layer.register_forward_pre_hook(lambda module, _, i=index: self._before(i))
            layer.register_forward_hook(lambda module, *_, i=index: self._after(i))
        self._load(0, 0)
        self._load(1 % len(layers), 1)

    def _event(self) -> Any:
        return torch.cuda.Event() if self.cuda else None

    def _flatten(self, layer: nn.Module) -> torch.Tensor:
        parameters = list(layer.parameters())
        flat = torch.empty(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, pin_memory=self.cuda
        )
        begin = 0
        for parameter in parameters:
            flat[begin : begin + parameter.numel()].copy_(parameter.detach().flatten())
            begin += parameter.numel()
        return flat

    def _forget(self, layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)

    def _load(self, index: int, place: int) -> None:
        if not self.cuda:
            self.places[place].copy_(self.host[index])
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[place])
            self.places[place].copy_(self.host[index], non_blocking=True)
            self.loaded[place].record(self.stream)

    def _before(self, index: int) -> None:
        place = self.used % 2
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.loaded[place])
        begin = 0
        parameters = self.layers[index].parameters()
        for parameter, shape in zip(parameters, self.shapes[index], strict=True):
            parameter.data = self.places[place][begin : begin + shape.numel()].view(shape)
            begin += shape.numel()

    def _after(self, index: int) -> None:
        place = self.used % 2
        if self.cuda:
            self.free[place].record(torch.cuda.current_stream(self.device))
        self.used += 1
        self._load((index + 2) % len(self.layers), place)
