"""From settings and budgets to the planner's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import _engine
from ..config import Config
from ..sizes import format_bytes

_MIB = 1 << 20
_PAGE = 4096


def choose_units(
    config: Config, units: str | Sequence[str]
) -> tuple[str | Sequence[str], list[str]]:
    """The units to use, and warnings: a budget in groups makes groups the unit."""
    if config.gpu_max_groups is None or units == "group":
        return units, []
    if units == "auto":
        return "group", []
    return units, [
        f"{config.describe('gpu_max_groups')} makes groups the unit, but units={units!r} was given:"
        " that is kept, and the groups count device memory alone"
    ]


def make_limits(
    config: Config,
    *,
    device_bytes: int,
    host_bytes: int,
    layer_bytes: int,
    group_bytes: int,
    explicit_device: bool,
    explicit_host: bool,
) -> tuple[_engine.PlanLimits, list[str]]:
    """The planner's limits, and warnings that say what was done with settings that disagree.

    `layer_bytes` and `group_bytes` are those of the largest one. A budget is explicit if it was
    given as a size, not as "auto".
    """
    counted = _CountedSettings(config, layer_bytes, group_bytes, list(config.warnings))
    limits = _engine.PlanLimits()
    limits.device_bytes = counted.device(device_bytes, explicit_device)
    limits.lookahead_units = counted.lookahead()
    limits.host_bytes, limits.cache_bytes, limits.staging_bytes = counted.host(
        host_bytes, explicit_host
    )
    limits.read_ahead_bytes = counted.read_ahead(limits.lookahead_units)
    limits.arena_bytes, limits.home_bytes = config.arena_bytes, config.home_bytes
    for name, part in (("arena_bytes", limits.arena_bytes), ("home_bytes", limits.home_bytes)):
        if part is not None and part > limits.device_bytes:
            total = format_bytes(limits.device_bytes)
            counted.warn(name, f"more than all device memory that may be used, {total}")
    if config.chunk_mb is not None:
        limits.chunk_bytes = int(config.chunk_mb * _MIB) // _PAGE * _PAGE
    return limits, counted.warnings


@dataclass
class _CountedSettings:
    """Settings that count layers or groups, in bytes; those that disagree add to `warnings`."""

    config: Config
    layer_bytes: int
    group_bytes: int
    warnings: list[str]

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(f"{self.config.describe(name)}: {message}")

    def size_of(self, name: str) -> int:
        return self.group_bytes if name == "gpu_max_groups" else self.layer_bytes

    def counted(self, name: str) -> int | None:
        """The bytes of a setting that counts layers or groups; None when it is not set."""
        count: int | None = getattr(self.config, name)
        if count is None:
            return None
        size = self.size_of(name)
        if size == 0:
            what = "groups" if name == "gpu_max_groups" else "layers"
            self.warn(name, f"the model has no {what}, so this has no effect")
            return None
        return count * size

    def device(self, budget: int, explicit: bool) -> int:
        counted = {n: self.counted(n) for n in ("max_cached_layers", "gpu_max_groups")}
        wanted = {n: _device_block_bytes(size) for n, size in counted.items() if size is not None}
        name = min(wanted, key=lambda n: wanted[n], default=None)
        for other in wanted.keys() - {name}:
            self.warn(other, f"{self.config.describe(str(name))} is the smaller and is used")
        if name is not None:
            self._compare(name, wanted[name], budget, explicit)
            budget = min(budget, wanted[name])
        if explicit and self.config.sources["gpu_free_guard_mb"] != "default":
            self.warn("gpu_free_guard_mb", "has no effect, because device_memory is not 'auto'")
        return budget

    def _compare(self, name: str, wanted: int, budget: int, explicit: bool) -> None:
        if wanted > budget:
            self.warn(
                name,
                f"{format_bytes(wanted)}, but only {format_bytes(budget)} may be used: that is the"
                " limit",
            )
        elif wanted < budget and explicit:
            self.warn(
                name,
                f"{format_bytes(wanted)}, less than the {format_bytes(budget)} given: the smaller"
                " is used",
            )

    def lookahead(self) -> int | None:
        """At most the count of layers, or of groups if these are the unit, less two."""
        name = "max_cached_layers" if self.config.gpu_max_groups is None else "gpu_max_groups"
        count: int | None = getattr(self.config, name)
        wanted = self.config.lookahead_units
        if count is None or not self.size_of(name) or count >= (wanted or 0) + 2:
            return wanted
        smaller = max(0, count - 2)
        asked = "" if wanted is None else f" {self.config.describe('lookahead_units')} plus"
        self.warn(name, f"less than{asked} 2: {smaller} units are prefetched")
        return smaller

    def host(self, budget: int, explicit: bool) -> tuple[int, int | None, int | None]:
        """Budget, cache and staging."""
        config = self.config
        high = self.counted("cpu_cache_hwm_layers")
        if high is not None:
            self._compare("cpu_cache_hwm_layers", high, budget, explicit)
            budget = min(budget, high)
        staging = None if config.staging_mb is None else config.staging_mb * _MIB
        if staging is not None and staging > budget:
            self.warn(
                "staging_mb",
                f"more than all host memory that may be used, {format_bytes(budget)}: that is the"
                " limit, and nothing is left for the host cache",
            )
            staging = budget
        cache = self.counted("cpu_cache_cap_layers")
        room = budget - (staging or 0)
        if cache is not None and cache > room:
            self.warn(
                "cpu_cache_cap_layers",
                f"{format_bytes(cache)}, but only {format_bytes(room)} of host memory may be used"
                " for the host cache: that is the limit",
            )
            cache = room
        return budget, cache, staging

    def read_ahead(self, lookahead: int | None) -> int | None:
        distance = self.config.cpu_prefetch_distance
        if distance is not None and lookahead is not None and distance < lookahead:
            self.warn(
                "cpu_prefetch_distance",
                f"less than the {lookahead} units prefetched to the device: what is on the disk"
                " arrives no earlier than that",
            )
        return self.counted("cpu_prefetch_distance")


def _device_block_bytes(size: int) -> int:
    """Rounded as the planner's device blocks are, so that the layers counted fit in one."""
    if size <= _MIB:
        return 2 * _MIB
    return max(10 * _MIB, -(-size // (2 * _MIB)) * 2 * _MIB)
