"""`wsm plan`: the plan of a model that is not loaded, as a table and as plain data; and predicted
against achieved, for models that ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from ..checkpoints.checkpoint import Checkpoint
from ..config import Config
from ..hf.default_workload import default_workload
from ..modules import sources
from ..planning.plan import PlanSummary
from ..planning.planner import Budgets, Planner
from ..planning.predict import (
    LIMITS,
    Achieved,
    Prediction,
    comparison,
    files_of,
    measuring_matters,
    predict,
)
from ..planning.rates import Rate, Sizes, gather
from ..runtime.buffers import Buffers
from ..runtime.trial import activation_bytes
from ..sizes import format_bytes
from .report import PLAN_KEYS

_BAR_WIDTH = 26


@dataclass(frozen=True)
class Value:
    """A budget or a setting. `source`: "argument", "variable", "measured", "default", "planner"."""

    value: Any
    source: str


@dataclass(frozen=True)
class Preview:
    """What would be done for a model and a workload. `decode` is the pass for one further token."""

    device: torch.device
    workload: Sizes
    values: dict[str, Value]
    plan: PlanSummary
    prefill: Prediction
    decode: Prediction

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """None where nothing streams and computing is not known."""
        return _per_second(self.workload[0] * self.workload[1], self.prefill)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """The same."""
        return _per_second(self.workload[0], self.decode)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        rates = self.prefill.rates
        return {
            "device": str(self.device),
            "workload": {"batch": self.workload[0], "tokens": self.workload[1]},
            "values": {name: asdict(value) for name, value in self.values.items()},
            "plan": {key: getattr(self.plan, key) for key in PLAN_KEYS},
            "rates": {
                "disk": rates.disk.as_dict(),
                "h2d": {**rates.h2d.as_dict(), "copy_overhead_s": rates.copy_overhead_s},
                "compute": _compute_dict(self.prefill),
                "decode_compute": _compute_dict(self.decode),
            },
            "prefill": self.prefill.as_dict() | {"tokens_per_s": self.prefill_tokens_per_second},
            "decode": self.decode.as_dict() | {"tokens_per_s": self.decode_tokens_per_second},
        }


def _per_second(tokens: int, prediction: Prediction) -> float | None:
    return tokens / prediction.seconds if prediction.seconds > 0 else None


def _compute_dict(prediction: Prediction) -> dict[str, Any]:
    rates = prediction.rates
    measured = {} if rates.compute is None else asdict(rates.compute)
    return {**measured, "source": rates.compute_source, "note": rates.compute_note}


def preview(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    device_memory: int | str,
    host_memory: int | str,
    units: str | Sequence[str],
    config: Config | Mapping[str, Any] | None,
    workload: Sizes,
) -> Preview:
    """The plan that `stream` would make with these arguments, and the pass that it should give.

    Measures whatever the size of the model, unless settings say not to; nothing is loaded.
    Raises as `stream` does.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    resolved = Config.resolve(config)
    sources.check_surplus(module, checkpoint)
    planner = Planner(module, checkpoint, units, resolved)
    planner.check()
    room = _room_for_activations(module, checkpoint, planner, device, device_memory)
    budgets = Budgets(device, device_memory, host_memory, resolved, room)
    planned = planner.plan(budgets)
    rates = gather(module, files_of(planned.source), device, resolved, workload)
    if measuring_matters(planned.plan, resolved):
        planned = planner.plan(budgets, rates.for_units)
    prefill = predict(planned, planner, budgets, rates)
    decode_rates = rates
    if rates.compute is not None:
        decode_rates = rates.at(module, device, (workload[0], 1))
    decode = predict(planned, planner, budgets, decode_rates, gains=False)
    plan = PlanSummary(planned.plan, planned.units, planned.source, prefill)
    plan.warnings[:0] = planned.warnings
    values = _values(budgets, resolved, planned.mode, units, plan)
    return Preview(device, workload, values, plan, prefill, decode)


def _room_for_activations(
    module: nn.Module,
    checkpoint: Checkpoint,
    planner: Planner,
    device: torch.device,
    device_memory: int | str,
) -> int | None:
    """What `from_pretrained` leaves free on a GPU when the budget is "auto"."""
    if device.type != "cuda" or device_memory != "auto":
        return None
    buffers = Buffers(module, checkpoint, device)
    try:
        return activation_bytes(module, planner.plan_least(), device, default_workload(module))
    except (ValueError, torch.OutOfMemoryError):
        return None
    finally:
        buffers.restore()


def _values(
    budgets: Budgets,
    config: Config,
    mode: str | Sequence[str],
    units: str | Sequence[str],
    plan: PlanSummary,
) -> dict[str, Value]:
    """Budgets and what was decided within them; other settings where they were given."""

    def source(name: str) -> str:
        return "planner" if config.sources[name] == "default" else config.sources[name]

    values = {
        "device memory": Value(
            plan.device_budget_bytes, "argument" if budgets.explicit_device else "measured"
        ),
        "host memory": Value(
            plan.host_budget_bytes, "argument" if budgets.explicit_host else "measured"
        ),
        "units": Value(
            mode if isinstance(mode, str) else ", ".join(mode),
            "planner" if units == "auto" else "argument",
        ),
        "lookahead_units": Value(plan.lookahead_units, source("lookahead_units")),
        "staging_mb": Value(plan.staging_bytes / (1 << 20), source("staging_mb")),
        "chunk_mb": Value(plan.chunk_bytes / (1 << 20), source("chunk_mb")),
    }
    for name, origin in config.sources.items():
        if name not in values and origin != "default":
            values[name] = Value(getattr(config, name), origin)
    return values


# -- printing --------------------------------------------------------------------------------------


def print_preview(console: Console, name: str, shown: Preview) -> None:
    """Tables that fit into 80 columns."""
    batch, tokens = shown.workload
    plan, prefill = shown.plan, shown.prefill
    streaming = sum(1 for unit in plan.units if unit.streamed_bytes)
    console.print(
        f"{name}: {format_bytes(plan.model_bytes)} in {len(plan.units)} units, {streaming} stream",
        highlight=False,
        markup=False,
    )
    console.print(_value_table(shown))
    console.print(_home_table(plan, console))
    lines = ["everything fits on the device: nothing streams"]
    if plan.streams:
        console.print(_link_table(shown, console))
        lines = [
            f"limited by {LIMITS[prefill.limit]}; the first pass takes"
            f" {prefill.first_pass_seconds:.3f} s",
            *_gain_lines(prefill),
        ]
    lines += [
        f"prefill of {batch} x {tokens}: {_speed(shown.prefill_tokens_per_second, prefill)};"
        f" decode: {_speed(shown.decode_tokens_per_second, shown.decode)}",
        *(f"warning: {text}" for text in plan.warnings),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _value_table(shown: Preview) -> Table:
    table = Table(title="planned with", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("source")
    for name, value in shown.values.items():
        text = str(value.value)
        if name.endswith("memory"):
            text = format_bytes(value.value)
        elif name.endswith("_mb"):
            text = f"{value.value:g}"
        table.add_row(name, text, value.source)
    rates = shown.prefill.rates
    for name, rate in (("disk", rates.disk), ("link to the device", rates.h2d)):
        table.add_row(name, f"{rate.bytes_per_s / 1e9:.2f} GB/s", _origin(rate))
    batch, tokens = shown.workload
    label = f"computing a layer, {batch} x {tokens}"
    if rates.compute is None:
        table.add_row(label, "not known", rates.compute_note)
    else:
        origin = rates.compute_source
        if rates.compute.tokens < tokens:
            origin += f", from {rates.compute.tokens} tokens"
        table.add_row(label, f"{rates.compute.layer_s * 1e3:.2f} ms", origin)
    return table


def _origin(rate: Rate) -> str:
    return f"{rate.source}, {rate.note}" if rate.note else rate.source


def _home_table(plan: PlanSummary, console: Console) -> Table:
    table = Table(title="where the bytes live", title_justify="left", show_header=False)
    for name, size in (
        ("device", plan.device_home_bytes),
        ("host memory", plan.host_home_bytes),
        ("disk", plan.disk_home_bytes),
    ):
        share = size / max(plan.model_bytes, 1)
        table.add_row(name, _bar(share, console), format_bytes(size), f"{share:.0%}")
    return table


def _link_table(shown: Preview, console: Console) -> Table:
    prefill = shown.prefill
    title = f"a pass: {prefill.seconds:.3f} s"
    if prefill.compute_seconds is None:
        title += " (at least: computing is not known)"
    table = Table(title=title, title_justify="left", show_header=False)
    busy = {
        "disk": (prefill.disk_seconds, format_bytes(prefill.disk_bytes)),
        "h2d": (prefill.h2d_seconds, format_bytes(prefill.h2d_bytes)),
        "compute": (prefill.compute_seconds or 0.0, ""),
    }
    labels = {"disk": "disk", "h2d": "link to device", "compute": "computing"}
    for link, (seconds, moved) in busy.items():
        bar = _bar(seconds / max(prefill.seconds, 1e-9), console)
        limits = "limits" if link == prefill.limit else ""
        table.add_row(labels[link], bar, f"{seconds:.3f} s", moved, limits)
    return table


def _bar(share: float, console: Console) -> Text:
    full, empty = ("#", ".") if console.options.ascii_only else ("█", "░")
    filled = round(min(1.0, share) * _BAR_WIDTH)
    return Text(full * filled + empty * (_BAR_WIDTH - filled))


def _gain_lines(prefill: Prediction) -> list[str]:
    lines = []
    for kind, gain in (
        ("device", prefill.gain_device_per_gib),
        ("host", prefill.gain_host_per_gib),
    ):
        if gain is None:
            continue
        less = gain / max(prefill.seconds, 1e-9)
        brings = f"a pass of {prefill.seconds - gain:.3f} s ({-less:+.1%})"
        if abs(less) < 0.0005:
            brings = "no faster pass"
        lines.append(f"one more GiB of {kind} memory: {brings}")
    return lines


def _speed(tokens_per_second: float | None, prediction: Prediction) -> str:
    if tokens_per_second is None:
        return "not known"
    most = "at most " if prediction.compute_seconds is None else ""
    return f"{most}{tokens_per_second:,.2f} tokens/s"


def print_comparison(console: Console, plan: PlanSummary) -> None:
    """Predicted and achieved side by side; nothing where nothing was predicted."""
    if plan.predicted is None:
        return
    table = Table(title="predicted and achieved", title_justify="left")
    for header in ("", "predicted", "achieved"):
        table.add_column(header)
    for row in comparison(plan.predicted, plan.achieved):
        table.add_row(*row)
    console.print(table)


def outcome(plan: PlanSummary) -> dict[str, Any]:
    """Predicted and achieved as plain data; None for what is not known."""
    achieved: Achieved | None = plan.achieved
    return {
        "predicted": None if plan.predicted is None else plan.predicted.as_dict(),
        "achieved": None if achieved is None else asdict(achieved),
    }
