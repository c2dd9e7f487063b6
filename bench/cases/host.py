"""Case 10, what a unit costs the host when nothing has to be waited for; and the bits."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from context import Context
from torch import nn

UNITS = 64
TENSORS = 9  # in a Llama's layer
PASSES = 200


class Keep(nn.Module):
    """Has the parameters of a layer, and computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(64, 64)) for _ in range(TENSORS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def layers() -> nn.Sequential:
    return nn.Sequential(*(Keep() for _ in range(UNITS))).requires_grad_(False)


def swap(context: Context) -> dict[str, Any]:
    """Modules without compute, all in the arena: host time streamed, less that of the plain ones.

    The forwards of a pass are called by one Sequential, so a pass's begin and end count too.
    """
    import wsm_ext as wsm

    plain, streamed = layers(), layers()
    x = torch.zeros(1, device=context.device)
    arena = UNITS * TENSORS * 64 * 64 * 4
    with wsm.stream(
        streamed,
        device=context.device,
        units=[str(index) for index in range(UNITS)],
        device_memory=shapes.blocks(arena),
        host_memory="64MiB",
        config={"arena_bytes": arena, "home_bytes": 0, "lookahead_units": UNITS - 1},
    ) as model:
        pass_us(model, x, 2, context.device)
        loads = model.stats()["totals"]["loads"]
        ours = [us / UNITS for us in pass_us(model, x, PASSES, context.device)]
        if model.stats()["totals"]["loads"] != loads:
            raise RuntimeError("units were loaded again: host time was not measured alone")
    base = [us / UNITS for us in pass_us(plain, x, PASSES, context.device)]
    figure = statistics.median(ours) - statistics.median(base)
    engine = engine_us(context)
    rows = [("streamed unit", f"{statistics.median(ours):.2f}")]
    rows += [("plain module", f"{statistics.median(base):.2f}"), ("difference", f"{figure:.2f}")]
    if engine is not None:
        rows.append(("of it the engine (C++)", f"{engine['median']:.2f}"))
    harness.print_table("host time of a unit", ("what", "us"), rows)
    return {
        "streamed_us": harness.summary(ours),
        "plain_us": harness.summary(base),
        "engine_us": engine,
        "units": UNITS,
        "tensors_in_unit": TENSORS,
        "figure": figure,
    }


@torch.inference_mode()
def pass_us(model: Any, x: torch.Tensor, passes: int, device: torch.device) -> list[float]:
    """Host microseconds of each pass; the device is idle before each."""
    out = []
    for _ in range(passes):
        harness.synchronize(device)
        begin = time.perf_counter()
        model(x)
        out.append((time.perf_counter() - begin) * 1e6)
    return out


def engine_us(context: Context) -> dict[str, Any] | None:
    """bench_pipeline's acquire and release without Python; None where it is not built."""
    program: Path = context.arguments.bench_read.with_name("bench_pipeline")
    if not program.is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data.bin"), Path(folder, "pipeline.json")
        data.write_bytes(bytes(8 << 20))
        command = [str(program), str(data), "--unit-mb", "1", "--staging-mb", "8", "--json"]
        command += [str(out), "--device", context.device.type]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if ran.returncode:
            raise RuntimeError(f"bench_pipeline failed: {ran.stderr.strip()}")
        figures: dict[str, Any] = json.loads(out.read_text())["acquire_release_us"]
    return figures


def bit_equal(context: Context) -> dict[str, Any]:
    """Streamed logits against the resident model's, bit for bit."""
    import bits

    return bits.run(context.ram_source.folder, context.device, context.vocab)
