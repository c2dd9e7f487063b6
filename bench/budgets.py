"""How the time of a pass follows the host budget, where a part of the model lies in RAM.

    python bench/budgets.py --folder DISK/llama-4 --layers 4 --bench-read BUILD/bench/bench_read \
        --json budgets.json
    python bench/budgets.py --device cpu --preset 7b --layers 20 --shape 1x1 --folder DISK/llama-7b

For each share of the model in RAM: an arena of two layers, the files proved cold. On a GPU the
share is the host cache, and nothing is at home on the device. On the host device, whose memory is
RAM, it is homes there, as "auto" would have it: computed with where they lie, and not copied again.
After passes that fill the cache, --passes forwards back to back are timed. Compared with it is the
largest of three times: the disk's, for the bytes that the plan leaves on it, at the best rate of
bench_read on the same file just before and after; the link's, for the bytes that stream, at the
rate of 16 MiB pinned copies; the resident model's (on a CPU as it was just before and after, too).
Beside it the same with the disk's rate into as much memory as the staging ring has, as who keeps
what he reads cannot read into the same few MiB for ever. What is read is counted between two
moments at which nothing moves, and must be the plan's bytes to the byte. Memory is watched from
another process.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import coldness
import harness
import shapes
import torch
from context import Context, open_streamed
from forward import parse_shapes
from harness import GB, GIB, MIB
from passes import forwards, reset_peak, timed_passes
from watch import Watcher

FILLING = 2  # passes before the clock starts
MEMORY_SLACK = 256 * MIB  # what libraries take as they go, and a CPU's activations
SHARES = (0, 10, 25, 50, 75, 90, 100)
DISK_SAMPLES = 2  # between two shares


def settle(model: Any) -> int:
    """Waits until nothing moves, and returns the bytes read from the disk until then."""
    last, since = -1, time.perf_counter()
    while time.perf_counter() - since < 0.3:
        now = model.stats()["totals"]["disk_bytes"]
        if now != last:
            last, since = now, time.perf_counter()
        time.sleep(0.02)
    return last


def resident(context: Context, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds of the resident model's forward, and the device memory that it takes as it goes: the
    budgets are for weights."""
    source = context.disk_source
    room = shapes.blocks(int(source.sizes.model_bytes * 1.02) + GIB // 8)
    with open_streamed(context, source, device_memory=room, host_memory=512 * MIB) as model:
        held = 0 if ids.device.type == "cpu" else torch.cuda.memory_reserved()
        timed_passes(model, ids, 2)
        seconds = timed_passes(model, ids, 5) / 5
        return seconds, 0 if ids.device.type == "cpu" else torch.cuda.memory_reserved() - held


def disk_rate(disk: harness.DiskCeiling, index: int) -> float:
    """Bytes/s as it was around the share `index`."""
    first = index * DISK_SAMPLES
    return disk.rate_between(first, first + 2 * DISK_SAMPLES) * GB


def rates_of(context: Context, index: int, units: list[Any], compute_s: float) -> Any:
    """What the simulator is told: the ceilings, the disk's as it was around the share `index`."""
    from wsm_ext import _engine

    rates = _engine.Rates()
    rates.disk_bytes_per_s = disk_rate(context.disk_ceiling(), index)
    rates.h2d_bytes_per_s = context.link_ceiling().median * GB
    rates.host_computes = context.device.type == "cpu"
    layers = [shapes.is_layer(unit.name) for unit in units]
    rates.compute_s = [compute_s / sum(layers) if layer else 0.0 for layer in layers]
    return rates


def sample_disk(context: Context) -> None:
    context.disk_ceiling().sample(DISK_SAMPLES)
    context.disk_ceiling(into=context.arguments.staging).sample(DISK_SAMPLES)


def run_share(
    context: Context, share: int, ids: torch.Tensor, watcher: Watcher, activations: int
) -> tuple[dict[str, Any], Any, list[Any]]:
    """What was measured, the plan as the simulator takes it, and its units."""
    arguments, source = context.arguments, context.disk_source
    arena = int(2 * source.sizes.layer_place_bytes)
    staging = arguments.staging
    # A little more than the model, so that every chunk's last page finds its place.
    in_ram = source.sizes.model_bytes * share // 100
    if share == 100:
        in_ram = shapes.host_bytes(source.sizes, 0)
    homes, cache = (in_ram, 0) if context.device.type == "cpu" else (0, in_ram)
    config: dict[str, Any] = {"arena_bytes": arena, "staging_mb": staging // MIB}
    config["home_bytes"] = homes
    if not cache:
        config["cpu_cache_cap_layers"] = 0
    coldness.make_cold(source.shards())
    reset_peak(context.device)  # what torch keeps of the run before is given back
    watcher.peak()
    time.sleep(0.2)
    before = watcher.peak()
    with open_streamed(
        context,
        source,
        device_memory=shapes.blocks(arena) + homes,
        host_memory=staging + cache,
        config=config,
    ) as model:
        plan = model.plan
        forwards(model, ids, FILLING)
        begin_bytes = settle(model)
        # From the end of a pass on, so that what was prefetched meanwhile gains nothing.
        forwards(model, ids, 1)
        seconds = timed_passes(model, ids, arguments.passes) / arguments.passes
        read = (settle(model) - begin_bytes) / (arguments.passes + 1)
        peak = watcher.peak()
        device_budget = plan.device_budget_bytes + activations
        budget = {"host_bytes": plan.host_budget_bytes, "device_bytes": device_budget}
        if context.device.type == "cpu":  # both are RAM
            budget = {"host_bytes": sum(budget.values())}
        taken = {key: peak[key] - before[key] for key in budget}
        run = {
            "share": share,
            "seconds_per_pass": seconds,
            "plan_disk_bytes": plan.disk_home_bytes,
            "plan_streamed_bytes": plan.host_home_bytes + plan.disk_home_bytes,
            "read_bytes_per_pass": read,
            "to_the_byte": read == plan.disk_home_bytes,
            "memory_taken": taken,
            "memory_budget": budget,
            "within_budget": all(taken[key] <= budget[key] + MEMORY_SLACK for key in budget),
        }
        from wsm_ext import handle

        return run, handle(model).session.planned.plan, plan.units


def judge(
    run: dict[str, Any], planned: Any, rates: Any, compute_s: float, large: float
) -> dict[str, Any]:
    """The run beside the largest of its floors, and beside what the simulator says. `large`: the
    disk's bytes/s into as much memory as the ring has."""
    from wsm_ext import _engine

    floors = {
        "disk_s": run["plan_disk_bytes"] / rates.disk_bytes_per_s,
        "h2d_s": run["plan_streamed_bytes"] / rates.h2d_bytes_per_s,
        "compute_s": compute_s,
    }
    floors_large = {**floors, "disk_s": run["plan_disk_bytes"] / large}
    return {
        **run,
        "disk_bytes_per_s": rates.disk_bytes_per_s,
        "floors": floors,
        "ratio": run["seconds_per_pass"] / max(floors.values()),
        "disk_large_bytes_per_s": large,
        "ratio_large": run["seconds_per_pass"] / max(floors_large.values()),
        "simulated_s": _engine.simulate(planned, rates).pass_seconds,
    }


def print_runs(runs: list[dict[str, Any]]) -> None:
    header = ("in RAM", "s/pass", "disk", "link", "compute", "ratio", "into the ring's memory")
    header += ("simulated", "bytes")
    rows = []
    for run in runs:
        floors = run["floors"]
        rows.append(
            (
                f"{run['share']} %",
                f"{run['seconds_per_pass']:.3f}",
                *(f"{floors[key]:.3f}" for key in ("disk_s", "h2d_s", "compute_s")),
                f"{run['ratio']:.3f}",
                f"{run['ratio_large']:.3f}",
                f"{run['simulated_s']:.3f}",
                "the plan's" if run["to_the_byte"] else f"{run['read_bytes_per_pass']:.0f} !",
            )
        )
    harness.print_table("time of a pass (s) by the share of the model in RAM", header, rows)
    for run in runs:
        if not run["within_budget"]:
            print(f"  {run['share']} %: memory {run['memory_taken']} of {run['memory_budget']}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint, on a disk")
    parser.add_argument("--preset", default="70b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="1x2048", help="BATCHxTOKENS")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="percent in RAM")
    parser.add_argument("--staging", type=int, default=512 * MIB, help="bytes")
    parser.add_argument("--bench-read", type=Path, default=Path("build/release/bench/bench_read"))
    parser.add_argument("--bytes-per-cell", type=int, default=512 * MIB)
    parser.add_argument("--read-grid", default="small", choices=("small", "full"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    # What the shared context asks for, and is not varied here.
    arguments.reader, arguments.direct, arguments.units = "auto", "auto", "layer"
    arguments.lookahead = arguments.chunk_mb = None
    arguments.disk_folder = arguments.disk_layers = None
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    context = Context(arguments)
    ids = context.ids(*parse_shapes(arguments.shape)[0])
    compute_s, activations = resident(context, ids)
    link = context.link_ceiling()
    measured = []
    computes = [compute_s]
    with Watcher(context.device) as watcher:
        sample_disk(context)
        for share in map(int, arguments.shares.split(",")):
            link.sample(5)  # on the host a single one may meet memory that is cold
            measured.append(run_share(context, share, ids, watcher, activations))
            seconds = measured[-1][0]["seconds_per_pass"]
            print(f"  {share} % in RAM: {seconds:.3f} s a pass", flush=True)
            sample_disk(context)
            # A processor's memory is used by others, too, and its speed moves like the disk's.
            if context.device.type == "cpu":
                compute_s, _ = resident(context, ids)
            computes.append(compute_s)
    large = context.disk_ceiling(into=arguments.staging)
    around = [sum(pair) / 2 for pair in pairwise(computes)]
    runs = [
        judge(
            *(run, planned, rates_of(context, index, units, around[index])),
            *(around[index], disk_rate(large, index)),
        )
        for index, (run, planned, units) in enumerate(measured)
    ]
    print_runs(runs)
    if arguments.json:
        results = {
            "runs": runs,
            "disk": context.disk_ceiling().best,
            "disk_large": large.best,
            "link": harness.summary(link.gb_per_s),
            "compute_s": computes,
        }
        record = harness.result("budgets", arguments.shape, context.device, results)
        record["checkpoint"] = {"preset": arguments.preset, "layers": arguments.layers}
        harness.write_results(arguments.json, [record])
    return 0 if all(run["to_the_byte"] and run["within_budget"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
