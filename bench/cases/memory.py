"""Case 8, how fast memory is pinned, and case 11, how little device memory leaf units need."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import shapes
import torch
from context import Context, Skipped, describe, open_streamed, print_streamed
from harness import GIB

from . import ram

LEAST_LEAF_RATIO = 0.95


def pinning(context: Context) -> dict[str, Any]:
    """bench_h2d's: PinnedBuffer against cudaHostAlloc."""
    context.need_cuda("memory is pinned by the CUDA driver")
    program: Path = context.arguments.bench_read.with_name("bench_h2d")
    if not program.is_file():
        raise Skipped(f"{program.name} is not built beside bench_read (it needs nvcc)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "h2d.json")
        command = [str(program), "--buffer", "16MiB", "--samples", "1", "--json", str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if ran.returncode:
            raise RuntimeError(f"bench_h2d failed: {ran.stderr.strip()}")
        results: dict[str, Any] = json.loads(out.read_text())["pinning"]
    print(f"\n{ran.stdout.strip().splitlines()[-1]}")
    whole = results["pinned_bytes"] >= results["bytes"]
    return {**results, "figure": results["ratio"], "conditions": {"not all was pinned": whole}}


def leaf_units(context: Context) -> dict[str, Any]:
    """Case 1 with each linear layer a unit, in little device memory."""
    arguments, source = context.arguments, context.ram_source
    context.link_ceiling()
    base = torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else 0
    arena = arguments.leaf_arena
    with open_streamed(
        context,
        source,
        device_memory=shapes.blocks(arena),
        host_memory=shapes.host_bytes(source.sizes, arguments.staging),
        config={"arena_bytes": arena, "home_bytes": 0},
        units="leaf",
    ) as model:
        results = ram.measure(context, model, [(1, 1)])
        results |= describe(model, source)
    print_streamed("leaf units, streamed from RAM", results)
    # Less what the harness itself holds: the target of the ceiling's copies.
    peak = results["memory"]["device_peak_bytes"]
    if results["gpu_memory"]:
        peak = results["gpu_memory"]["torch_peak_bytes"] - base
    ratio = ram.least_ratio(results)
    print(f"  peak {peak / GIB:.3f} GiB at {ratio:.4f} of the link")
    conditions = {f"only {ratio:.4f} of the link": ratio >= LEAST_LEAF_RATIO}
    return {**results, "peak_bytes": peak, "figure": peak / GIB, "conditions": conditions}
