"""Cases whose limit is a cold disk: 4 no host cache, 5 half of it cached, 6 to the first output."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import coldness
import harness
import shapes
from context import Context, describe, open_streamed, print_streamed
from harness import GB, GIB, MIB
from passes import counted_passes, run_ratios, timed_passes

CHILD = Path(__file__).resolve().parents[1] / "first_output.py"
CHILD_LIMIT_S = 300
SAMPLES = 3  # of the disk between two runs: of six cells the best median should not be a lucky one


def from_disk(context: Context, cache: int) -> dict[str, Any]:
    """Runs of --disk-passes forwards, each over files proved cold; `cache` bytes stay in RAM."""
    arguments, source, disk = context.arguments, context.disk_source, context.disk_ceiling()
    # Who keeps what he reads cannot read into the same 4 MiB for ever. Both ceilings are told.
    large = context.disk_ceiling(into=arguments.staging)
    shards = source.shards()
    arena = int(arguments.arena_layers * source.sizes.layer_place_bytes)
    staging_mb = arguments.staging // MIB
    homes = arguments.home_bytes or 0  # the disk is the limit: the seam between passes is not
    config: dict[str, Any] = {"arena_bytes": arena, "home_bytes": homes}
    config["staging_mb"] = staging_mb
    if not cache:
        config["cpu_cache_cap_layers"] = 0
    coldness.make_cold(shards)  # so that the planner measures the disk, not what was just written
    with open_streamed(
        context,
        source,
        device_memory=shapes.blocks(arena) + shapes.blocks(homes),
        host_memory=staging_mb * MIB + cache,
        config=config,
    ) as model:
        runs: dict[str, list[dict[str, Any]]] = {}
        for batch, tokens in arguments.disk_shapes:
            ids = context.ids(batch, tokens)
            timed_passes(model, ids, 1)
            for _ in range(arguments.disk_repeats):
                disk.sample(SAMPLES)
                large.sample(SAMPLES)
                cold = coldness.make_cold(shards)
                run = counted_passes(model, ids, arguments.disk_passes)
                run["cached_pages_before"] = sum(cold.values())
                run["cached_pages_after"] = sum(coldness.cached_pages(shard) for shard in shards)
                runs.setdefault(f"{batch}x{tokens}", []).append(run)
        disk.sample(SAMPLES)
        large.sample(SAMPLES)
        best = disk.best
        ratios = {
            name: run_ratios(some, "disk_bytes", best["GB_per_s"]) for name, some in runs.items()
        }
        for run in ratios.values():
            run["ratio_large"] = run["GB_per_s"]["median"] / large.best["GB_per_s"]
        what = f"the same into {arguments.staging / GIB:g} GiB, as large as the ring"
        return {
            "runs": ratios,
            "ceiling": {"what": "best O_DIRECT of bench_read, same file", **best},
            "ceiling_large": {"what": what, **large.best},
            **describe(model, source),
        }


def print_large(results: dict[str, Any]) -> None:
    large = results["ceiling_large"]
    for name, run in results["runs"].items():
        rate = f"{large['GB_per_s']:.2f} GB/s"
        print(f"  {name}: {run['ratio_large']:.4f} of {rate}, {large['what']}")


def cold_disk(context: Context) -> dict[str, Any]:
    """All layers from files that were proved cold."""
    results = from_disk(context, cache=0)
    print_streamed("streamed from a cold disk", results)
    print_large(results)
    chosen = results["ceiling"]["unlucky_GB_per_s"]
    print(f"  {chosen:.2f} GB/s by cells that other samples than their own make the best")
    figure = min(run["ratio"] for run in results["runs"].values())
    conditions = {"a host cache": results["plan"]["cache_bytes"] == 0}
    return {**results, "figure": figure, "conditions": conditions}


def half_cached(context: Context) -> dict[str, Any]:
    """Half of the model stays in the host cache: a pass should take as long as reading the rest."""
    results = from_disk(context, cache=context.disk_source.sizes.model_bytes // 2)
    print_streamed("half from the host cache, half from a cold disk", results)
    print_large(results)
    # Time of a pass over (its bytes / the disk's rate): the ratio of rates, the other way up.
    figure = max(1 / run["ratio"] for run in results["runs"].values())
    cached = results["plan"]["host_home_bytes"] / results["plan"]["model_bytes"]
    conditions = {f"{cached:.2f} of the model is cached": 0.45 <= cached <= 0.51}
    return {**results, "figure": figure, "conditions": conditions}


def first_output(context: Context) -> dict[str, Any]:
    """A new process, cold files, budgets by default: until the first logits are there."""
    arguments, source, disk = context.arguments, context.disk_source, context.disk_ceiling()
    large = context.disk_ceiling(into=arguments.staging)
    shards = source.shards()
    batch, tokens = arguments.disk_shapes[0]
    command = [sys.executable, str(CHILD), "--folder", str(source.folder)]
    command += ["--device", str(context.device), "--batch", str(batch), "--tokens", str(tokens)]
    command += ["--vocab", str(context.vocab)]
    torch_s, output_s, phases = [], [], []
    for _ in range(arguments.disk_repeats + 1):
        disk.sample(SAMPLES)
        large.sample(SAMPLES)
        torch_s.append(seconds_until("done", [sys.executable, "-c", "import torch; print('done')"]))
        coldness.make_cold(shards)
        seconds = seconds_until("output", command, phases)
        output_s.append(seconds)
    ceiling, ceiling_large = (
        source.file_bytes / GB / rate["GB_per_s"] + statistics.median(torch_s)
        for rate in (disk.best, large.best)
    )
    figure = statistics.median(output_s) / ceiling
    rows = [
        ("first output", f"{statistics.median(output_s):.2f}"),
        ("import torch", f"{statistics.median(torch_s):.2f}"),
        ("file / disk rate + import torch", f"{ceiling:.2f}"),
        (f"the same, the disk's rate into {arguments.staging / GIB:g} GiB", f"{ceiling_large:.2f}"),
    ]
    harness.print_table("cold process to first output", ("what", "s"), rows)
    print(f"  ratio {figure:.4f}; phases of the last: {phases[-1]}")
    return {
        "first_output_s": harness.summary(output_s),
        "import_torch_s": harness.summary(torch_s),
        "file_bytes": source.file_bytes,
        "disk": disk.best,
        "disk_large": large.best,
        "ceiling_s": ceiling,
        "ceiling_large_s": ceiling_large,
        "ratio_large": statistics.median(output_s) / ceiling_large,
        "phases": phases,
        "figure": figure,
    }


def seconds_until(word: str, command: list[str], said: list[str] | None = None) -> float:
    """From the start of the process to the line that begins with the word; the rest is `said`."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            seconds = time.perf_counter() - begin
            _, errors = process.communicate(timeout=CHILD_LIMIT_S)
        finally:
            process.kill()
    if process.returncode or not line.startswith(word):
        raise RuntimeError(f"the process did not say {word!r}: {errors.strip()[-500:]}")
    if said is not None:
        said.append(line.removeprefix(word).strip())
    return seconds
