"""From budgets and settings to a plan: which units, how much memory, where the bytes live."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .. import _engine
from ..checkpoints.checkpoint import Checkpoint
from ..config import Config
from ..modules import sources
from ..modules.buffers import NO_BUFFERS, BufferSizes
from ..modules.sources import Source
from ..modules.spec import model_spec, unit_place_bytes
from ..modules.units import Unit, find_units
from ..sizes import format_bytes, parse_bytes
from .budgets import CPU_DEVICE_SHARE, device_available, host_available
from .limits import choose_units, make_limits

_MIB = 1 << 20
# If nobody says what activations and the KV cache need, they get the rest.
_CUDA_DEVICE_SHARE = 0.85
_SMALL_BLOCK_BYTES = 1 << 20  # torch's allocator puts several of them into one segment
# Finer units mean more hooks and log lines: they must shorten the pass to this at least.
_FINER_IS_WORTH = 0.98


# How fast the machine is, for the units of a plan.
RatesOf = Callable[[list[Unit], Source], _engine.Rates]


class HeldBytes(NamedTuple):
    """Memory that is in use now and that a new plan may use again."""

    device: int = 0
    host: int = 0


NOTHING_HELD = HeldBytes()


class Budgets:
    """Device and host bytes, and whether the user named them.

    `activation_bytes` is what a forward needs beside the weights, if that is known. The module's
    `buffers` are taken off a budget that is named; what is free no longer has them.
    """

    def __init__(
        self,
        device: torch.device,
        device_memory: int | str,
        host_memory: int | str,
        config: Config,
        activation_bytes: int | None = None,
        held: HeldBytes = NOTHING_HELD,
        buffers: BufferSizes = NO_BUFFERS,
    ) -> None:
        self.explicit_device = device_memory != "auto"
        self.explicit_host = host_memory != "auto"
        self.activation_bytes = activation_bytes
        self.buffers = buffers if self.explicit_device else NO_BUFFERS
        self.device_bytes = 0
        self.host_bytes = 0
        if self.explicit_device:
            self.device_bytes = left_by_buffers(device_memory, buffers)
            self._leave_room()
        if self.explicit_host:
            self.host_bytes = parse_bytes(host_memory, "host_memory")
        guard = config.gpu_free_guard_mb * _MIB
        if device.type != "cpu":
            if not self.explicit_device:
                self.device_bytes = device_available(device, guard) + held.device
                self._leave_room(_CUDA_DEVICE_SHARE)
            if not self.explicit_host:
                self.host_bytes = host_available() + held.host
            return
        if self.explicit_device and self.explicit_host:
            return
        free = host_available() + sum(held)
        if not self.explicit_device:
            if config.sources["gpu_free_guard_mb"] != "default":
                free = max(free - guard, 0)
            share = CPU_DEVICE_SHARE if not self.explicit_host else 1.0
            self.device_bytes = max(int((free - self.host_bytes) * share), 0)
            self._leave_room()
        if not self.explicit_host:
            self.host_bytes = max(free - self.device_bytes - (activation_bytes or 0), 0)

    def _leave_room(self, share: float = 1.0) -> None:
        if self.activation_bytes is None:
            self.device_bytes = int(self.device_bytes * share)
        elif self.explicit_device and self.activation_bytes >= self.device_bytes:
            raise ValueError(
                f"device_memory = {format_bytes(self.device_bytes)} is too small: the workload"
                f" alone takes {format_bytes(self.activation_bytes)} for activations and KV cache;"
                " give more, or a smaller workload"
            )
        else:
            self.device_bytes = max(self.device_bytes - self.activation_bytes, 0)

    @property
    def beside_bytes(self) -> int:
        """What was taken off a named device budget."""
        taken = (self.activation_bytes or 0) if self.explicit_device else 0
        return taken + self.buffers.device_bytes


def left_by_buffers(device_memory: int | str, buffers: BufferSizes) -> int:
    """Bytes of a named budget. Raises ValueError where buffers take all of it."""
    nbytes = parse_bytes(device_memory, "device_memory")
    if buffers.device_bytes >= nbytes:
        raise ValueError(
            f"device_memory = {format_bytes(nbytes)} is too small: the module's {buffers}; give"
            " more, or make them parameters"
        )
    return nbytes - buffers.device_bytes


@dataclass(frozen=True)
class ModulePlan:
    """A plan, and what it is a plan of."""

    units: list[Unit]
    source: Source
    plan: _engine.Plan
    mode: str | Sequence[str]
    warnings: list[str]


class Planner:
    """Plans one module again and again, for changing budgets.

    Made before the module's parameters are replaced: it remembers its units, and where their bytes
    come from.
    """

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint | None,
        units: str | Sequence[str],
        config: Config,
    ) -> None:
        self._module = module
        self.buffers = BufferSizes.of(module)
        self._names_of = sources.names_of_parameters(module)
        self._checkpoint = checkpoint
        self._config = config
        chosen, self._unheeded = choose_units(config, units)
        self._modes: list[str | Sequence[str]] = (
            ["layer", "group", "leaf"] if chosen == "auto" else [chosen]
        )
        self._sources: dict[int, tuple[list[Unit], Source]] = {}  # by mode

    def plan(
        self,
        budgets: Budgets,
        rates_of: RatesOf | None = None,
        kept_cache: _engine.KeptCache | None = None,
        before: ModulePlan | None = None,
    ) -> ModulePlan:
        """The plan with the shortest pass; "auto" takes finer units if they pay.

        The units stay those of `before` if they can: of others, the host cache holds little.
        Raises ValueError naming the least budget, if none of the units fits.
        """
        best: tuple[float, ModulePlan] | None = None
        refused: ValueError | None = None
        for index in range(len(self._modes)):
            try:
                units, source = self._units(index)
                rates = _engine.Rates() if rates_of is None else rates_of(units, source)
                planned = self._plan_units(index, budgets, rates, kept_cache)
            except ValueError as error:
                refused = refused or error
                continue
            seconds = _engine.expected_pass_seconds(planned.plan, rates)
            if best is None or seconds < best[0] * _FINER_IS_WORTH:
                best = (seconds, planned)
            if not streams(planned.plan) or (before is not None and before.mode == planned.mode):
                return planned
        if best is None:
            assert refused is not None
            raise refused
        return best[1]

    def check(self) -> None:
        """Raises ValueError (CheckpointError) if the checkpoint does not fit the module."""
        self._units(0)

    def forget(self) -> None:
        """The module's parameters have changed."""
        self._sources.clear()

    def plan_least(self) -> ModulePlan:
        """The plan that takes least: the finest units, all of which stream, one at a time."""
        index = len(self._modes) - 1
        units, source = self._units(index)
        limits = _engine.PlanLimits()
        limits.device_bytes = limits.host_bytes = 1 << 60
        limits.home_bytes = limits.cache_bytes = 0
        limits.lookahead_units = 0
        plan = _engine.plan_model(model_spec(units, source), limits)
        return ModulePlan(units, source, plan, self._modes[index], [])

    def _units(self, index: int) -> tuple[list[Unit], Source]:
        if index not in self._sources:
            units = find_units(self._module, self._modes[index])
            for unit in units:
                unit.entries = [entry for entry in unit.entries if sources.live(entry).numel() > 0]
            units = [unit for unit in units if unit.entries]
            if self._checkpoint is not None:
                source = sources.from_checkpoint(self._names_of, units, self._checkpoint)
            else:
                source = sources.from_module(units)
            self._sources[index] = units, source
        return self._sources[index]

    def _plan_units(
        self,
        index: int,
        budgets: Budgets,
        rates: _engine.Rates,
        kept_cache: _engine.KeptCache | None,
    ) -> ModulePlan:
        units, source = self._units(index)
        limits, warned = self._limits(units, source, budgets)
        if kept_cache is not None:
            limits.kept_cache = kept_cache
        plan = self._plan_beside_buffers(model_spec(units, source), limits, rates, budgets)
        return ModulePlan(units, source, plan, self._modes[index], self._unheeded + warned)

    @staticmethod
    def _plan_beside_buffers(
        spec: _engine.ModelSpec,
        limits: _engine.PlanLimits,
        rates: _engine.Rates,
        budgets: Budgets,
    ) -> _engine.Plan:
        """A plan with the buffers beside it; if that is too much, one whose small blocks leave them
        room in the segments that they take."""
        buffer_bytes = budgets.buffers.device_bytes
        try:
            return _engine.plan_model(spec, limits, rates)
        except ValueError as error:
            refused = ValueError(_in_terms_of_arguments(str(error), budgets.beside_bytes))
        if not 0 < buffer_bytes <= _SMALL_BLOCK_BYTES:
            raise refused
        limits.device_bytes += buffer_bytes
        try:
            plan = _engine.plan_model(spec, limits, rates)
        except ValueError as error:
            beside = budgets.beside_bytes - buffer_bytes
            raise ValueError(_in_terms_of_arguments(str(error), beside)) from None
        if buffer_bytes > _unused_bytes(plan):
            raise refused
        return plan

    def _limits(
        self, units: list[Unit], source: Source, budgets: Budgets
    ) -> tuple[_engine.PlanLimits, list[str]]:
        sizes = [unit_place_bytes(unit, source) for unit in units]
        layers: dict[tuple[str | None, int], int] = {}
        for unit, size in zip(units, sizes, strict=True):
            if unit.layer is not None:
                layer = (unit.stack, unit.layer)
                layers[layer] = layers.get(layer, 0) + size
        in_layers = [s for u, s in zip(units, sizes, strict=True) if u.layer is not None]
        largest = max(sizes, default=0)
        return make_limits(
            self._config,
            device_bytes=budgets.device_bytes,
            host_bytes=budgets.host_bytes,
            layer_bytes=max(layers.values(), default=largest),
            group_bytes=max(in_layers, default=largest),
            explicit_device=budgets.explicit_device,
            explicit_host=budgets.explicit_host,
        )


def streams(plan: _engine.Plan) -> bool:
    """Whether anything passes through the arena."""
    return plan.host_home_bytes + plan.disk_home_bytes > 0


def _unused_bytes(plan: _engine.Plan) -> int:
    """What is left of the segments of small blocks, for other small blocks."""
    blocks = [plan.arena_bytes, *(block.nbytes for block in plan.home_blocks)]
    small = [nbytes for nbytes in blocks if 0 < nbytes <= _SMALL_BLOCK_BYTES]
    return sum(_engine.device_block_bytes(nbytes) - nbytes for nbytes in small)


def _in_terms_of_arguments(message: str, beside_bytes: int = 0) -> str:
    """The planner's message with the names and sizes that the caller knows: with what was taken off
    the device budget before."""
    message = re.sub(
        r"(device_bytes = )(\d+)( is too small: it takes at least )(\d+)",
        lambda m: f"{m[1]}{int(m[2]) + beside_bytes}{m[3]}{int(m[4]) + beside_bytes}",
        message,
    )
    for planner, argument in (("device_bytes", "device_memory"), ("host_bytes", "host_memory")):
        message = message.replace(planner, argument)
    return re.sub(
        r"\b\d{5,}\b", lambda digits: f"{digits[0]} ({format_bytes(int(digits[0]))})", message
    )
