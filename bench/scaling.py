"""How the costs grow with the model: planning, construction, memory, headers. Needs no GPU.

    python bench/scaling.py --folder TMP/scaling --json scaling.json

    plan       plan_model of synthetic specs of 10 to 10,000 units, ten tensors each: one plan, and
               the best of several by simulation, which is what stream() asks for
    405b       126 layers of a Llama of 405B shape: the planner alone, and with the module's units
               found in a real module on meta
    construct  stream() of real modules of 10 to 10,000 units, from a file; each in a process of its
               own: seconds, and memory for each unit (Python's by tracemalloc, all by VmRSS)
    headers    Checkpoint.open of 1,000 shards

An order of growth of 1 is linear: log10 of the cost at ten times the size over the cost before.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import harness
import torch
from harness import GIB, MIB
from rss import status_bytes
from torch import nn

UNITS = (10, 100, 1000, 10_000)
TENSORS = 10
WIDTH = 16  # of the modules that are constructed
LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHARDS = 1000
CHILD_LIMIT_S = 300


def best_s(run: Any, repeats: int = 3) -> float:
    """The least of a few: what the work takes when nothing else runs."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def orders(cost: dict[int, float]) -> dict[str, float]:
    """Growth from each size to the next, ten times larger."""
    sizes = sorted(cost)
    return {f"{a} to {b}": math.log10(cost[b] / cost[a]) for a, b in itertools.pairwise(sizes)}


# -- the planner -----------------------------------------------------------------------------------


def synthetic_plan(units: int, compared: bool, tensor_bytes: int = 4 * MIB) -> Any:
    """Plans `units` units of TENSORS tensors with a tenth on the device and a third in RAM.

    `compared`: several plans are made, and the simulator chooses, as stream() does.
    """
    from wsm_ext import _engine
    from wsm_ext._engine import Extent, ShardSpec, TensorSpec, UnitSpec

    count = units * TENSORS
    total = count * tensor_bytes
    tensors = [
        TensorSpec(f"t{i}", tensor_bytes, [Extent(0, i * tensor_bytes, tensor_bytes)])
        for i in range(count)
    ]
    specs = [
        UnitSpec(f"u{u}", f"layer={u}", list(range(u * TENSORS, (u + 1) * TENSORS)))
        for u in range(units)
    ]
    limits = _engine.PlanLimits()
    limits.device_bytes = max(total // 10, 4 * TENSORS * tensor_bytes)
    limits.host_bytes = max(total // 3, 128 * MIB)
    rates = _engine.Rates()
    rates.compute_s = [TENSORS * tensor_bytes / rates.h2d_bytes_per_s / 2] * units
    chosen_by = rates if compared else None
    model = _engine.ModelSpec([ShardSpec("file", total, 4096)], tensors, specs)
    return lambda: _engine.plan_model(model, limits, chosen_by)


def plan() -> dict[str, Any]:
    alone, compared = (
        {units: best_s(synthetic_plan(units, how)) for units in UNITS} for how in (False, True)
    )
    rows = [
        (f"{u:,} units, {u * TENSORS:,} tensors", f"{alone[u]:.4f}", f"{compared[u]:.4f}")
        for u in UNITS
    ]
    header = ("model", "one plan, s", "the best by simulation, s")
    harness.print_table("plan_model", header, rows)
    print(f"  order of growth, one plan:  {format_orders(orders(alone))}")
    print(f"  order of growth, simulated: {format_orders(orders(compared))}")
    return {
        "tensors_in_unit": TENSORS,
        "one": {"seconds": alone, "orders": orders(alone)},
        "compared": {"seconds": compared, "orders": orders(compared)},
    }


def llama_405b(folder: Path) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from wsm_ext.checkpoints.checkpoint import Checkpoint
    from wsm_ext.checkpoints.image import Extent, TensorImage
    from wsm_ext.config import Config
    from wsm_ext.modules.units import find_units
    from wsm_ext.planning.planner import Budgets, Planner

    with torch.device("meta"):
        module = LlamaForCausalLM(LlamaConfig(**LLAMA_405B)).to(torch.bfloat16)
    tensors, position = {}, 0
    for name, parameter in module.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        extent = (Extent(0, position, nbytes),)
        tensors[name] = TensorImage(name, parameter.dtype, tuple(parameter.shape), extent)
        position += nbytes
    file = folder / "405b.bin"  # without blocks: nothing of it is read
    with open(file, "wb") as stream:
        stream.truncate(position)
    checkpoint = Checkpoint([file], tensors)
    out: dict[str, Any] = {"model_bytes": position, "tensors": len(tensors)}
    rows = []
    for mode in ("layer", "group", "leaf"):
        budgets = Budgets(torch.device("cpu"), 64 * GIB, 256 * GIB, Config())
        units_s = best_s(lambda m=mode: find_units(module, m))
        whole_s = best_s(lambda m=mode, b=budgets: Planner(module, checkpoint, m, Config()).plan(b))
        units = len(find_units(module, mode))
        out[mode] = {"units": units, "find_units_s": units_s, "plan_module_s": whole_s}
        rows.append((mode, units, f"{units_s:.3f}", f"{whole_s:.3f}"))
    file.unlink()
    header = ("units", "count", "find_units s", "plan_module s, all in all")
    harness.print_table("126 layers of 405B shape, 64 GiB device, 256 GiB host", header, rows)
    return out


# -- construction ----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Layers that call one another in a row."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(units))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def construct_child(units: int, file: Path, traced: bool) -> dict[str, Any]:
    """Seconds and bytes of one stream(); VmRSS after as many passes as fill what they fill."""
    import wsm_ext as wsm

    with torch.device("meta"):
        module = Chain(units)
    nbytes = units * WIDTH * WIDTH * 4
    gc.collect()
    before = status_bytes(Path("/proc/self/status").read_text())["VmRSS"]
    if traced:
        tracemalloc.start()
    begin = time.perf_counter()
    model = wsm.stream(
        module,
        file,
        device="cpu",
        device_memory=2 * MIB,
        host_memory=MIB,
        units="layer",
        config={"home_bytes": 0, "arena_bytes": 64 * WIDTH * WIDTH * 4},
    )
    seconds = time.perf_counter() - begin
    with model, torch.inference_mode():
        python_bytes = tracemalloc.get_traced_memory()[0] if traced else 0
        model(torch.zeros(1, WIDTH))
        gc.collect()
        after = status_bytes(Path("/proc/self/status").read_text())["VmRSS"]
    return {
        "seconds": seconds,
        "rss_bytes": after - before,
        "python_bytes": python_bytes,
        "weights_bytes": nbytes,
    }


def construct(folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    found: dict[int, dict[str, Any]] = {}
    for units in UNITS:
        file = folder / f"chain-{units}.safetensors"
        save_file({f"layers.{i}.weight": torch.zeros(WIDTH, WIDTH) for i in range(units)}, file)
        plain, traced = (run_child(units, file, traced) for traced in (False, True))
        found[units] = {**plain, "python_bytes": traced["python_bytes"]}
        file.unlink()
    # From the two largest: what is taken once falls out.
    small, large = UNITS[-2:]
    per_unit = {
        key: (found[large][key] - found[small][key]) / (large - small)
        for key in ("seconds", "rss_bytes", "python_bytes")
    }
    rows = [
        (
            f"{units:,}",
            f"{one['seconds']:.3f}",
            f"{one['rss_bytes'] / 1e6:.1f}",
            f"{one['python_bytes'] / 1e6:.1f}",
        )
        for units, one in found.items()
    ]
    header = ("units", "stream() s", "VmRSS grown MB", "of it Python's MB")
    harness.print_table("construction", header, rows)
    seconds = {units: one["seconds"] for units, one in found.items()}
    print(
        f"  a unit of one tensor: {per_unit['seconds'] * 1e6:.0f} us, "
        f"{per_unit['rss_bytes'] / 1e3:.1f} kB, of it Python {per_unit['python_bytes'] / 1e3:.1f}"
    )
    print(f"  order of growth {format_orders(orders(seconds))}")
    return {"runs": found, "per_unit": per_unit, "orders": orders(seconds)}


def run_child(units: int, file: Path, traced: bool) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(units)]
    command += ["--folder", str(file), *(["--traced"] if traced else [])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT_S)
    if ran.returncode:
        raise RuntimeError(f"construction of {units} units failed: {ran.stderr.strip()[-500:]}")
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


# -- headers ---------------------------------------------------------------------------------------


def headers(folder: Path) -> dict[str, Any]:
    from safetensors.torch import save_file

    import wsm_ext as wsm

    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {f"layers.{shard}.t{i}.weight": torch.zeros(8, 8) for i in range(TENSORS)}
        save_file(tensors, shards / name)
        weight_map |= dict.fromkeys(tensors, name)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    seconds = best_s(lambda: wsm.Checkpoint.open(shards))
    rows = [(f"{SHARDS:,} shards of {TENSORS} tensors", f"{seconds:.3f}")]
    harness.print_table("Checkpoint.open", ("checkpoint", "s"), rows)
    return {"shards": SHARDS, "tensors": SHARDS * TENSORS, "seconds": seconds}


def format_orders(found: dict[str, float]) -> str:
    return ", ".join(f"{order:.2f} ({sizes})" for sizes, order in found.items())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the files it makes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.child:
        print(json.dumps(construct_child(arguments.child, arguments.folder, arguments.traced)))
        return 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = {
        "plan": plan(),
        "405b": llama_405b(arguments.folder),
        "construct": construct(arguments.folder),
        "headers": headers(arguments.folder),
    }
    if arguments.json:
        record = harness.result("scaling", "costs", torch.device("cpu"), results)
        harness.write_results(arguments.json, [record])
    return 0


if __name__ == "__main__":
    sys.exit(main())
