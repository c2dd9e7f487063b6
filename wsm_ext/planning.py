"""From budgets and settings to a plan: which units, how much memory, where the bytes live."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from . import _engine, sources
from .budgets import device_available, host_available
from .checkpoint import Checkpoint
from .config import Config, choose_units, make_limits
from .residency import unit_tensors
from .sizes import format_bytes, parse_bytes
from .sources import Source
from .units import Unit, find_units

_MIB = 1 << 20
# With device="cpu" both budgets are RAM: what stays on the "device" needs no copy, so it gets more.
_CPU_DEVICE_SHARE = 0.85
# On a GPU, activations and the KV cache need room beside the weights.
_CUDA_DEVICE_SHARE = 0.85


class Budgets:
    """Device and host bytes, and whether the user named them."""

    def __init__(
        self,
        device: torch.device,
        device_memory: int | str,
        host_memory: int | str,
        config: Config,
    ) -> None:
        self.explicit_device = device_memory != "auto"
        self.explicit_host = host_memory != "auto"
        self.device_bytes = 0
        self.host_bytes = 0
        if self.explicit_device:
            self.device_bytes = parse_bytes(device_memory, "device_memory")
        if self.explicit_host:
            self.host_bytes = parse_bytes(host_memory, "host_memory")
        guard = config.gpu_free_guard_mb * _MIB
        if device.type != "cpu":
            if not self.explicit_device:
                self.device_bytes = int(device_available(device, guard) * _CUDA_DEVICE_SHARE)
            if not self.explicit_host:
                self.host_bytes = host_available()
            return
        free = host_available()
        if not self.explicit_device:
            if config.sources["gpu_free_guard_mb"] != "default":
                free = max(free - guard, 0)
            share = _CPU_DEVICE_SHARE if not self.explicit_host else 1.0
            self.device_bytes = max(int((free - self.host_bytes) * share), 0)
        if not self.explicit_host:
            self.host_bytes = max(free - self.device_bytes, 0)


def plan_module(
    module: nn.Module,
    checkpoint: Checkpoint | None,
    units: str | Sequence[str],
    budgets: Budgets,
    config: Config,
) -> tuple[list[Unit], Source, _engine.PlannedModel, list[str]]:
    """Plans with the units asked for; "auto" takes finer ones where the coarser do not fit."""
    chosen, unheeded = choose_units(config, units)
    modes = ["layer", "group", "leaf"] if chosen == "auto" else [chosen]
    refused: ValueError | None = None
    for mode in modes:
        found = find_units(module, mode)
        for unit in found:
            unit.slots = [slot for slot in unit.slots if sources.live(slot).numel() > 0]
        found = [unit for unit in found if unit.slots]
        if checkpoint is not None:
            source = sources.from_checkpoint(found, checkpoint)
        else:
            source = sources.from_module(found)
        try:
            planned, warned = _plan_units(module, found, source, budgets, config)
            return found, source, planned, unheeded + warned
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _plan_units(
    module: nn.Module, units: list[Unit], source: Source, budgets: Budgets, config: Config
) -> tuple[_engine.PlannedModel, list[str]]:
    members = [unit_tensors(unit, source) for unit in units]
    # As on the way through the arena: what arrives, and what is made of it.
    taken = [arriving + made for _, arriving, _, made in source.tensors]
    sizes = [sum(taken[tensor] for tensor in tensors) for tensors in members]
    layers: dict[tuple[str | None, int], int] = {}
    for unit, size in zip(units, sizes, strict=True):
        if unit.layer is not None:
            layer = (unit.stack, unit.layer)
            layers[layer] = layers.get(layer, 0) + size
    in_layers = [s for u, s in zip(units, sizes, strict=True) if u.layer is not None]
    largest = max(sizes, default=0)
    fields, warned = make_limits(
        config,
        device_bytes=budgets.device_bytes,
        host_bytes=budgets.host_bytes,
        layer_bytes=max(layers.values(), default=largest),
        group_bytes=max(in_layers, default=largest),
        explicit_device=budgets.explicit_device,
        explicit_host=budgets.explicit_host,
    )
    limits = _engine.Limits()
    for key, value in fields.items():
        setattr(limits, key, value)
    specs = [
        (unit.name, unit.label, tensors, unit.exclusive)
        for unit, tensors in zip(units, members, strict=True)
    ]
    try:
        return _engine.plan_model(source.shards, source.tensors, specs, limits), warned
    except ValueError as error:
        raise ValueError(_in_terms_of_arguments(str(error))) from None


def _in_terms_of_arguments(message: str) -> str:
    """The planner's message with the names and sizes that the caller knows."""
    for planner, argument in (("device_bytes", "device_memory"), ("host_bytes", "host_memory")):
        message = message.replace(planner, argument)
    return re.sub(
        r"\b\d{5,}\b", lambda digits: f"{digits[0]} ({format_bytes(int(digits[0]))})", message
    )
