"""What ran on the GPU and when, by CUPTI through torch.profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def record(run: Callable[[], None]) -> list[dict[str, Any]]:
    """Runs it under the profiler; the events of the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def union_us(intervals: Iterable[tuple[float, float]]) -> float:
    """Length that the (begin, end) intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def busy_share(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """How much of the time from the first kernel's begin to the last one's end a kernel ran."""
    kernels = [
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e.get("cat") == "kernel"
    ]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel: does CUPTI work on this machine?")
    wall = max(end for _, end in kernels) - min(begin for begin, _ in kernels)
    busy = union_us(kernels)
    return {"kernels": len(kernels), "busy_us": busy, "wall_us": wall, "share": busy / wall}


def copy_rates(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the copies to the device: bytes over the time that they take, and over that from the
    first one's begin to the last one's end, with what lies between them."""
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e.get("name", "")]
    if not copies:
        raise RuntimeError("the profiler saw no copy: does CUPTI work on this machine?")
    nbytes = sum(int(e["args"]["bytes"]) for e in copies)
    intervals = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in copies]
    wall = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
    busy = union_us(intervals)
    return {
        "copies": len(copies),
        "gb_per_s_busy": nbytes / busy / 1e3,
        "gb_per_s_wall": nbytes / wall / 1e3,
    }
