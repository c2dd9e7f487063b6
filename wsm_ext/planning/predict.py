"""What a pass should take by the simulator, and what it took."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import _engine
from ..config import Config
from ..modules.sources import Source
from ..sizes import format_bytes
from .planner import Budgets, ModulePlan, Planner, streams
from .rates import Rate, Rates

_GIB = 1 << 30
_LEAST_MODEL_BYTES = _GIB  # below, passes are short whatever the plan
_LEAST_DIFFERENCE = 0.15
BOTTLENECKS = {"disk": "the disk", "h2d": "the link", "compute": "computing"}


@dataclass(frozen=True)
class Prediction:
    """The simulated pass. Seconds: of a steady pass and of the first one, which fills the host
    cache; then how long each link and the computing are busy in a steady pass.

    `compute_seconds` is None if one layer's compute is not known: then `seconds` is the least
    that the links need. `limit` is the busiest: "disk", "h2d" or "compute". The gains are seconds
    by which a pass gets shorter with one more GiB, planned again; None if settings do not let
    that be planned. `rates` says what it was predicted from, and where that is known from.
    """

    seconds: float
    first_pass_seconds: float
    disk_seconds: float
    h2d_seconds: float
    compute_seconds: float | None
    disk_bytes: int
    h2d_bytes: int
    limit: str
    gain_device_per_gib: float | None
    gain_host_per_gib: float | None
    rates: Rates

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without the rates."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rates"}


def predict(
    planned: ModulePlan, planner: Planner, budgets: Budgets, rates: Rates, gains: bool = True
) -> Prediction:
    """The simulator's answer for what `planner` planned for these budgets and rates."""

    def simulate(plan: ModulePlan) -> _engine.Simulated:
        return _engine.simulate(plan.plan, rates.for_units(plan.units, plan.source))

    simulated = simulate(planned)

    def gain(device_bytes: int, host_bytes: int) -> float | None:
        if not gains:
            return None
        more = copy.copy(budgets)
        more.device_bytes += device_bytes
        more.host_bytes += host_bytes
        try:
            faster = simulate(planner.plan(more, rates.for_units))
            return simulated.pass_seconds - faster.pass_seconds
        except ValueError:
            return None

    return Prediction(
        seconds=simulated.pass_seconds,
        first_pass_seconds=simulated.first_pass_seconds,
        disk_seconds=simulated.disk_seconds,
        h2d_seconds=simulated.h2d_seconds,
        compute_seconds=simulated.compute_seconds if rates.compute is not None else None,
        disk_bytes=simulated.disk_bytes,
        h2d_bytes=simulated.h2d_bytes,
        limit=simulated.bottleneck if streams(planned.plan) else "compute",
        gain_device_per_gib=gain(_GIB, 0),
        gain_host_per_gib=gain(0, _GIB),
        rates=rates,
    )


def measuring_matters(plan: _engine.Plan, config: Config) -> bool:
    """If something streams, and the model is larger than 1 GiB or `config.measure` says so."""
    if not streams(plan):
        return False
    if config.measure is None:
        return plan.model_bytes > _LEAST_MODEL_BYTES
    return config.measure


def files_of(source: Source) -> list[Path]:
    """What is read; nothing if the weights lie in RAM."""
    shards = zip(source.shards, source.memory, strict=True)
    return [Path(shard.path) for shard, address in shards if address == 0]


# -- what it took ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Achieved:
    """Means over `passes` passes, the first left out.

    Computing is not measured. It takes `most_compute_seconds` at most: the pass less the waits of
    the compute stream. The host waits beside it: `stall_seconds["arena"]`, for a place that is not
    free since the device still computes, is computing for the greater part.
    """

    passes: int
    seconds: float
    disk_bytes: int
    h2d_bytes: int
    misses: float
    stall_seconds: dict[str, float]

    @staticmethod
    def of(sums: Mapping[str, Any]) -> Achieved | None:
        """From `Engine.steady_passes()`; None before the second pass has ended."""
        count = sums["passes"]
        if count == 0:
            return None
        return Achieved(
            passes=count,
            seconds=sums["seconds"] / count,
            disk_bytes=round(sums["disk_bytes"] / count),
            h2d_bytes=round(sums["h2d_bytes"] / count),
            misses=sums["misses"] / count,
            stall_seconds={k: v / count for k, v in sums["stall_seconds"].items()},
        )

    @property
    def most_compute_seconds(self) -> float:
        return max(0.0, self.seconds - self.stall_seconds["h2d"])

    @property
    def unexplained_seconds(self) -> float:
        """What neither the disk nor the link accounts for."""
        return max(0.0, self.seconds - self.stall_seconds["disk"] - self.stall_seconds["h2d"])


@dataclass(frozen=True)
class Difference:
    """What to say of it, and the rate that is not what it was taken for, if that is the cause."""

    text: str
    doubted: Rate | None = None


def difference(predicted: Prediction, achieved: Achieved) -> Difference | None:
    """If passes take more than 15 % more, or less, than predicted; and why."""
    ratio = achieved.seconds / max(predicted.seconds, 1e-9) - 1
    if abs(ratio) <= _LEAST_DIFFERENCE:
        return None
    cause = _cause(predicted, achieved)
    return replace(
        cause,
        text=f"a pass takes {achieved.seconds:.3f} s, {abs(ratio):.0%}"
        f" {'more' if ratio > 0 else 'less'} than the {predicted.seconds:.3f} s predicted:"
        f" {cause.text}",
    )


def _cause(predicted: Prediction, achieved: Achieved) -> Difference:
    if achieved.misses >= 1:
        return Difference(
            f"units are used in another order than expected, {achieved.misses:.0f} times a pass"
        )
    if achieved.seconds < predicted.seconds:
        return _cause_of_speed(predicted, achieved)
    stalls = achieved.stall_seconds
    # If the links do not hold it up, the forward itself takes that long.
    cause = max(("disk", "h2d"), key=lambda name: stalls.get(name, 0.0))
    computing = predicted.compute_seconds or 0.0
    rest = achieved.unexplained_seconds
    if rest - computing > stalls.get(cause, 0.0):
        if predicted.compute_seconds is None:
            return Difference(
                f"computing takes {rest:.3f} s and was not measured"
                f" ({predicted.rates.compute_note})"
            )
        return Difference(f"computing takes {rest:.3f} s instead of {computing:.3f} s")
    return _rate_cause(cause, predicted, achieved)


def _cause_of_speed(predicted: Prediction, achieved: Achieved) -> Difference:
    if predicted.limit == "compute":
        return Difference(
            f"computing takes at most {achieved.most_compute_seconds:.3f} s instead of"
            f" {predicted.compute_seconds or 0.0:.3f} s (another batch or length?)"
        )
    return _rate_cause(predicted.limit, predicted, achieved)


def _rate_cause(link: str, predicted: Prediction, achieved: Achieved) -> Difference:
    if link == "disk":
        name, moved, rate = "disk", achieved.disk_bytes, predicted.rates.disk
    else:
        name, moved, rate = "link to the device", achieved.h2d_bytes, predicted.rates.h2d
    again = "; the next start measures it again" if rate.entries else ""
    return Difference(
        f"the {name} gave {moved / achieved.seconds / 1e9:.2f} GB/s instead of the"
        f" {rate.bytes_per_s / 1e9:.2f} GB/s {'assumed' if not rate.known else 'measured'}{again}",
        rate,
    )


def comparison(
    predicted: Prediction | None, achieved: Achieved | None
) -> list[tuple[str, str, str]]:
    """Rows of a table: what, predicted, achieved. Empty if neither is known."""
    if predicted is None and achieved is None:
        return []
    rows = [
        ["a pass", "-", "-"],
        ["  disk", "-", "-"],
        ["  link", "-", "-"],
        ["  computing", "-", "-"],
    ]
    if predicted is not None:
        compute = predicted.compute_seconds
        rows[0][1] = f"{predicted.seconds:.3f} s, limited by {BOTTLENECKS[predicted.limit]}"
        rows[1][1] = _time_and_bytes(predicted.disk_seconds, predicted.disk_bytes)
        rows[2][1] = _time_and_bytes(predicted.h2d_seconds, predicted.h2d_bytes)
        rows[3][1] = "not measured" if compute is None else f"{compute:.3f} s"
    if achieved is not None:
        stalls = achieved.stall_seconds
        rows[0][2] = (
            f"{achieved.seconds:.3f} s{_off(predicted, achieved)}, {achieved.passes} passes"
        )
        rows[1][2] = f"{format_bytes(achieved.disk_bytes)}, waited {stalls['disk']:.3f} s"
        rows[2][2] = f"{format_bytes(achieved.h2d_bytes)}, waited {stalls['h2d']:.3f} s"
        rows[3][2] = f"at most {achieved.most_compute_seconds:.3f} s"
    return [(label, before, after) for label, before, after in rows]


def _time_and_bytes(seconds: float, nbytes: int) -> str:
    return f"{seconds:.3f} s, {format_bytes(nbytes)}"


def _off(predicted: Prediction | None, achieved: Achieved) -> str:
    if predicted is None or predicted.seconds <= 0:
        return ""
    return f" ({achieved.seconds / predicted.seconds - 1:+.0%})"
