"""Measures passes of a streamed model and shows what they cost: time, bytes, waits, memory."""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from ..sizes import format_bytes
from .monitor import Monitor

PLAN_KEYS = (
    "model_bytes",
    "device_home_bytes",
    "host_home_bytes",
    "disk_home_bytes",
    "arena_bytes",
    "homes_bytes",
    "cache_bytes",
    "staging_bytes",
    "chunk_bytes",
    "slot_count",
    "lookahead_units",
    "device_budget_bytes",
    "host_budget_bytes",
    "warnings",
)
_LINKS = {"disk": "disk_bytes", "h2d": "h2d_bytes"}
_PACKAGES = ("wsm_ext", "torch", "transformers", "safetensors")


@dataclass
class Prefills:
    """One entry of `passes` for each prefill: `seconds` as seen here, the rest from the engine."""

    batch: int
    tokens: int
    passes: list[dict[str, Any]]
    resources: dict[str, dict[str, float]]
    note: str | None
    device_peak_bytes: int | None
    rss_peak_bytes: int

    @property
    def first_seconds(self) -> float:
        return float(self.passes[0]["seconds"])

    @property
    def median_seconds(self) -> float:
        return float(statistics.median(entry["seconds"] for entry in self.passes))

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.tokens / self.median_seconds

    def link_bytes(self, link: str) -> int:
        """Bytes over a link in one pass, the mean of all."""
        return int(statistics.mean(entry[_LINKS[link]] for entry in self.passes))

    def link_gb_per_second(self, link: str) -> float:
        seconds = sum(entry["seconds"] for entry in self.passes)
        nbytes = sum(entry[_LINKS[link]] for entry in self.passes)
        return float(nbytes / seconds / 1e9)

    def stall_seconds(self) -> dict[str, float]:
        """Waits in one pass by cause, the mean of all."""
        causes = {cause for entry in self.passes for cause in entry["stall_seconds"]}
        return {
            cause: statistics.mean(entry["stall_seconds"].get(cause, 0.0) for entry in self.passes)
            for cause in sorted(causes)
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "tokens": self.tokens,
            "time_to_first_token_s": self.first_seconds,
            "median_s": self.median_seconds,
            "tokens_per_s": self.tokens_per_second,
            "link_gb_per_s": {link: self.link_gb_per_second(link) for link in _LINKS},
            "stall_s_per_pass": self.stall_seconds(),
            "device_peak_bytes": self.device_peak_bytes,
            "rss_peak_bytes": self.rss_peak_bytes,
            "resources": self.resources,
            "note": self.note,
            "passes": self.passes,
        }


def run_prefills(
    model: Any,
    *,
    device: torch.device,
    vocab: int,
    batch: int,
    tokens: int,
    repeat: int,
    seed: int = 0,
    gpu: Callable[[], Mapping[str, float]] | None = None,
    trace: str | None = None,
) -> Prefills:
    """`repeat` forwards over random tokens, each timed from the call until the device is idle.

    `trace`: where to write a timeline of the last one.
    """
    if min(batch, tokens, repeat) < 1:
        raise ValueError(
            f"batch ({batch}), tokens ({tokens}) and repeat ({repeat}) must all be at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, tokens), generator=generator, device="cpu").to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes = []
    with Monitor(device, gpu=gpu) as monitor, torch.inference_mode():
        for index in range(repeat):
            synchronize(device)
            with traced(model, trace if index == repeat - 1 else None):
                begin = time.perf_counter()
                output = model(input_ids=ids, use_cache=False, logits_to_keep=1)
                synchronize(device)
                seconds = time.perf_counter() - begin
            del output
            passes.append({**model.stats()["last_pass"], "seconds": seconds})
    return Prefills(
        batch=batch,
        tokens=tokens,
        passes=passes,
        resources=monitor.summary(),
        note=monitor.note,
        device_peak_bytes=device_peak_bytes(device),
        rss_peak_bytes=rss_peak_bytes(),
    )


def traced(model: Any, path: str | None) -> AbstractContextManager[None]:
    """Writes a timeline of what happens inside to `path`, if there is one."""
    return nullcontext() if path is None else model.trace(path)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def rss_peak_bytes() -> int:
    """The most physical memory that this process has ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def document(
    command: Sequence[str], device: torch.device, model: Any, /, **results: Any
) -> dict[str, Any]:
    """What a run leaves behind: what was measured, where, when, and with which settings."""
    return {
        **setting(command, device),
        "plan": {key: getattr(model.plan, key) for key in PLAN_KEYS},
        "stats": model.stats(),
        **results,
    }


def setting(command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Where and when something was measured, and with what."""
    return {
        "command": list(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(device),
    }


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    Path(path).write_text(json.dumps(content, indent=2, default=str) + "\n")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["cuda"] = torch.version.cuda
    return versions


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    return hardware


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def print_plan(console: Console, model: Any) -> None:
    console.print(str(model.plan), highlight=False, markup=False)


def print_prefills(console: Console, result: Prefills, *, load_seconds: float) -> None:
    title = f"prefill of {result.batch} x {result.tokens} tokens, {len(result.passes)} times"
    table = _table(title)
    table.add_row("load", f"{load_seconds:.2f} s")
    table.add_row("time to first token", f"{result.first_seconds:.3f} s")
    if len(result.passes) > 1:
        table.add_row("median prefill", f"{result.median_seconds:.3f} s")
    table.add_row("tokens/s", f"{result.tokens_per_second:,.1f}")
    for link, label in (("disk", "disk to host"), ("h2d", "host to device")):
        rate = f"{result.link_gb_per_second(link):.2f} GB/s"
        table.add_row(label, f"{rate}, {format_bytes(result.link_bytes(link))} a pass")
    for cause, seconds in result.stall_seconds().items():
        table.add_row(f"stalled on {cause}", f"{seconds:.3f} s a pass")
    add_memory_rows(table, result.device_peak_bytes, result.rss_peak_bytes)
    _add_gpu_rows(table, result.resources)
    console.print(table)
    if result.note:
        console.print(result.note, highlight=False, markup=False, style="dim")


def print_generation(
    console: Console,
    *,
    prompt_tokens: int,
    new_tokens: int,
    first_seconds: float,
    seconds: float,
    device: torch.device,
) -> None:
    table = _table(f"generation of {new_tokens} tokens after {prompt_tokens}")
    table.add_row("time to first token", f"{first_seconds:.3f} s")
    if new_tokens > 1:
        rate = (new_tokens - 1) / (seconds - first_seconds)
        table.add_row("tokens/s after that", f"{rate:,.2f}")
    add_memory_rows(table, device_peak_bytes(device), rss_peak_bytes())
    console.print(table)


def print_trace(console: Console, path: str | None, what: str) -> None:
    if path is not None:
        text = f"timeline of {what}: {path}; open it in https://ui.perfetto.dev"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def add_memory_rows(table: Table, device_peak: int | None, rss_peak: int) -> None:
    if device_peak is not None:
        table.add_row("peak GPU memory (torch)", format_bytes(device_peak))
    table.add_row("peak memory of the process", format_bytes(rss_peak))


def _add_gpu_rows(table: Table, resources: Mapping[str, Mapping[str, float]]) -> None:
    rows = {
        "gpu_utilisation_percent": ("GPU utilisation", "{:.0f} %"),
        "sm_clock_mhz": ("SM clock", "{:.0f} MHz"),
        "power_w": ("power", "{:.0f} W"),
    }
    for key, (label, form) in rows.items():
        if key in resources:
            mean, peak = resources[key]["mean"], resources[key]["peak"]
            table.add_row(label, f"{form.format(mean)} mean, {form.format(peak)} peak")
    if "gpu_memory_bytes" in resources:
        table.add_row(
            "GPU memory in use (all)", format_bytes(int(resources["gpu_memory_bytes"]["peak"]))
        )
