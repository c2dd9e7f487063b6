"""What `wsm plan` prints; and predicted against achieved, for models that ran."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..planning.plan import PlanSummary
from ..planning.predict import BOTTLENECKS, Achieved, Prediction, comparison
from ..planning.rates import Rate
from ..sizes import format_bytes
from .preview import Preview

_BAR_WIDTH = 26


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
            f"limited by {BOTTLENECKS[prefill.limit]}; the first pass takes"
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
    """Predicted and achieved side by side; nothing if nothing was predicted."""
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
