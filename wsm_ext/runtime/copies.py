"""Copies of modules inside a streamed one, as peft makes them of `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..modules.placeholder import StreamedParameter
from ..planning.budgets import host_available
from ..sizes import format_bytes
from .wrappers import without_wrapper


def resident_copy(
    inner: nn.Module,
    guards: dict[str, Any],
    fetch: Callable[[str], torch.Tensor],
    memo: dict[Any, Any],
) -> Any:
    """What `copy.deepcopy` gives of a resident module: weights of its own, nothing that streams.

    `guards`: what stood in the module's `__dict__` before its guards; None: nothing.
    Modules inside it that hold weights come here by themselves. Raises MemoryError if RAM is to
    hold the copy, and cannot.
    """
    key = ("wsm_ext", id(inner))
    if key in memo:  # something inside refers to it
        return memo[memo[key]]
    _fetch_into(inner, fetch, memo)
    reduced: Any = type(inner).__reduce_ex__(inner, 4)
    twin = reduced[0](*reduced[1])  # of the same class, over the same children
    twin.__setstate__(reduced[2])
    for name, before in {**guards, "forward": without_wrapper(twin.__dict__)}.items():
        if before is None:
            twin.__dict__.pop(name, None)
        else:
            twin.__dict__[name] = before
    memo[key] = id(twin)
    return copy.deepcopy(twin, memo)


def _fetch_into(
    inner: nn.Module, fetch: Callable[[str], torch.Tensor], memo: dict[Any, Any]
) -> None:
    """Let the copy have the true values of the weights that are not on the device now."""
    absent = [p for p in inner.parameters() if isinstance(p, StreamedParameter)]
    absent = [parameter for parameter in absent if id(parameter) not in memo]
    in_ram = sum(p.numel() * p.element_size() for p in absent if p.device.type == "cpu")
    if in_ram > 0 and in_ram > host_available():
        raise MemoryError(
            f"a copy of this {type(inner).__name__} takes {format_bytes(in_ram)} of RAM, which are"
            " not free"
        )
    for parameter in absent:
        values = fetch(parameter.wsm_name)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
