"""What is done for each parameter does not grow with how many there are."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import wsm_ext as wsm


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class OneUnit(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(8, 8) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x + x @ weight
        return x


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(count // 4)))


def lines_of(module: nn.Module, units: str) -> int:
    """Lines of Python that are run to stream the module's own weights and to put them back."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    budgets: dict[str, Any] = {"device_memory": "16MiB", "host_memory": "16MiB"}
    budgets["config"] = {"home_bytes": 0}
    sys.settrace(trace)
    try:
        with wsm.stream(module, device="cpu", units=units, **budgets) as streamed:
            assert streamed.plan.streams
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize(
    ("make", "units"), [(layers, "layer"), (layers, "leaf"), (OneUnit, "layer")]
)
def test_twice_as_many_parameters_are_twice_the_work(make: Any, units: str) -> None:
    lines_of(make(100), units)  # what is imported or compiled once
    few, many = (lines_of(make(count).requires_grad_(False), units) for count in (400, 800))
    assert many < 2.1 * few
