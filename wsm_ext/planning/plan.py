"""The plan as Python shows it: which bytes live where, and what every pass moves and takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import _engine
from ..modules.sources import Source
from ..modules.spec import unit_bytes
from ..modules.units import Unit
from ..sizes import format_bytes
from .predict import Achieved, Prediction, comparison, difference

_log = logging.getLogger("wsm_ext")

_LEAST_PASSES = 3  # before a difference is worth a word


@dataclass(frozen=True)
class UnitPlan:
    """One unit: `streamed_bytes` come to the device at each load, the rest stays there."""

    name: str
    label: str
    bytes: int
    streamed_bytes: int


class PlanSummary:
    """What the planner decided. Sizes are in bytes.

    `device_home_bytes`, `host_home_bytes` and `disk_home_bytes` are the model's bytes by where they
    live between uses; the latter two cross the link to the device in every pass, the last one also
    the link from the disk. `arena_bytes` and `homes_bytes` are device memory, `cache_bytes` and
    `staging_bytes` (`slot_count` slots of `chunk_bytes`) pinned host memory.

    `predicted` is what a pass should take; None if nothing streams or nothing was measured.
    `achieved` is what the passes took, the first left out; None before the second has ended.
    """

    def __init__(
        self,
        planned: _engine.Plan,
        units: list[Unit],
        source: Source,
        predicted: Prediction | None = None,
    ) -> None:
        self.predicted = predicted
        self.achieved: Achieved | None = None
        self._warned = False
        self.model_bytes: int = planned.model_bytes
        self.device_home_bytes: int = planned.device_home_bytes
        self.host_home_bytes: int = planned.host_home_bytes
        self.disk_home_bytes: int = planned.disk_home_bytes
        self.arena_bytes: int = planned.arena_bytes
        self.homes_bytes: int = planned.homes_bytes
        self.cache_bytes: int = planned.cache_bytes
        self.staging_bytes: int = planned.staging_bytes
        self.chunk_bytes: int = planned.chunk_bytes
        self.slot_count: int = planned.slot_count
        self.lookahead_units: int = planned.lookahead_units
        self.read_ahead_bytes: int = planned.read_ahead_bytes
        self.device_budget_bytes: int = planned.device_budget_bytes
        self.host_budget_bytes: int = planned.host_budget_bytes
        # What a forward of the workload allocates beside the weights; None: nobody said.
        self.activation_bytes: int | None = None
        # What the module's buffers take on the device, within the same budget.
        self.buffer_bytes = 0
        self.warnings: list[str] = list(planned.warnings)
        self.units: list[UnitPlan] = [
            UnitPlan(
                unit.name,
                unit.label,
                unit_bytes(unit, source),
                planned.streamed_bytes(index),
            )
            for index, unit in enumerate(units)
        ]

    @property
    def streams(self) -> bool:
        """False when everything has a home on the device: nothing is wrapped, nothing moves."""
        return any(unit.streamed_bytes for unit in self.units)

    def update(self, sums: Mapping[str, Any]) -> None:
        """Take in the engine's sums over passes. Says once if they are not as predicted."""
        self.achieved = Achieved.of(sums)
        if self._warned or self.predicted is None or self.achieved is None:
            return
        deviation = difference(self.predicted, self.achieved)
        if deviation is not None and self.achieved.passes >= _LEAST_PASSES:
            _log.warning("%s", deviation.text)
            self._warned = True
            if deviation.doubted is not None:
                deviation.doubted.forget()

    def __str__(self) -> str:
        streaming = sum(1 for unit in self.units if unit.streamed_bytes)
        rows = [
            (
                "model",
                f"{format_bytes(self.model_bytes)} in {len(self.units)} units, {streaming} stream",
            ),
            ("stays on the device", format_bytes(self.device_home_bytes)),
            ("stays in host memory", f"{format_bytes(self.host_home_bytes)}, copied every pass"),
            (
                "stays on the disk",
                f"{format_bytes(self.disk_home_bytes)}, read and copied every pass",
            ),
            (
                "device memory",
                f"{format_bytes(self.homes_bytes)} homes + {format_bytes(self.arena_bytes)} arena"
                f" + {format_bytes(self.buffer_bytes)} buffers"
                f" of {format_bytes(self.device_budget_bytes)}",
            ),
            (
                "host memory",
                f"{format_bytes(self.cache_bytes)} cache"
                f" + {format_bytes(self.staging_bytes)} staging"
                f" of {format_bytes(self.host_budget_bytes)}",
            ),
            ("units loaded ahead", str(self.lookahead_units)),
        ]
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {value}" for label, value in rows]
        compared = comparison(self.predicted, self.achieved)
        if compared:
            compared.insert(0, ("", "predicted", "achieved"))
            wide = max(len(before) for _, before, _ in compared)
            lines += [f"{what:<{width}}  {a:<{wide}}  {b}".rstrip() for what, a, b in compared]
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])
