"""Cases whose limit is the link to the device: 1 from the host cache, 7 from files on tmpfs."""

from __future__ import annotations

from typing import Any

import coldness
import harness
from context import Context, Skipped, describe, open_streamed, print_streamed
from cuptitrace import copy_rates, record
from harness import GIB, LinkCeiling
from passes import counted_passes, forwards, gpu_memory, run_ratios, timed_passes


def measure(
    context: Context, model: Any, shapes: list[tuple[int, int]], large: LinkCeiling | None = None
) -> dict[str, Any]:
    """Runs of --passes forwards of each shape, the ceilings sampled between them."""
    link = context.link_ceiling()
    runs: dict[str, list[dict[str, Any]]] = {}
    for batch, tokens in shapes:
        ids = context.ids(batch, tokens)
        timed_passes(model, ids, 2)  # the first fills the cache
        for _ in range(context.arguments.repeats):
            link.sample()
            if large is not None:
                large.sample()
            run = counted_passes(model, ids, context.arguments.passes)
            runs.setdefault(f"{batch}x{tokens}", []).append(run)
    link.sample()
    return {
        "runs": {name: run_ratios(some, "h2d_bytes", link.median) for name, some in runs.items()},
        "ceiling": {"what": "16 MiB pinned copies", **harness.summary(link.gb_per_s)},
        "gpu_memory": gpu_memory(context.device),
    }


def least_ratio(results: dict[str, Any]) -> float:
    return float(min(run["ratio"] for run in results["runs"].values()))


def from_ram(context: Context) -> dict[str, Any]:
    """All bytes in the host cache; the link to the device is the limit."""
    # A small source stays in the processor's cache; weights do not. Both ceilings are told.
    link = context.link_ceiling()
    large = LinkCeiling(context.device, total_bytes=8 * link.source.numel())
    model = context.streamed()
    results = measure(context, model, context.arguments.shapes, large)
    results |= describe(model, context.ram_source)
    what = f"the same out of {large.source.numel() / GIB:g} GiB"
    results["ceiling_large"] = {"what": what, **harness.summary(large.gb_per_s)}
    print_streamed("streamed from RAM", results)
    for name, run in results["runs"].items():
        run["ratio_large"] = run["GB_per_s"]["median"] / large.median
        print(f"  {name}: {run['ratio_large']:.4f} of {large.median:.2f} GB/s, {what}")
    results["copies"] = trace_copies(context, model)
    conditions = {"layers have device homes": results["all_layers_stream"]}
    return {**results, "figure": least_ratio(results), "conditions": conditions}


def trace_copies(context: Context, model: Any) -> dict[str, Any] | None:
    """What CUPTI sees of three more forwards: whether copies are slow, or apart. Not in the figure:
    tracing costs time."""
    if context.device.type != "cuda":
        return None
    ids = context.ids(*context.arguments.shapes[0])
    link = context.link_ceiling()
    before = len(link.gb_per_s)
    link.sample()
    found = copy_rates(record(lambda: forwards(model, ids, 3)))
    link.sample()
    found["ceiling_around"] = harness.summary(link.gb_per_s[before:])
    around = found["ceiling_around"]["median"]
    print(f"  copies by themselves {found['gb_per_s_busy']:.2f} GB/s, the link around {around:.2f}")
    print(f"  with what lies between them {found['gb_per_s_wall']:.2f} GB/s")
    return found


def from_tmpfs(context: Context) -> dict[str, Any]:
    """All bytes read from tmpfs in every pass, through a staging ring alone."""
    source = context.ram_source
    if not coldness.on_tmpfs(source.folder):
        raise Skipped(f"the checkpoint must lie on tmpfs (--folder); {source.folder.name} does not")
    budget, config = context.arena_settings()
    staging = min(context.arguments.staging, GIB)
    config |= {"staging_mb": staging // harness.MIB, "cpu_cache_cap_layers": 0}
    with open_streamed(
        context, source, device_memory=budget, host_memory=staging, config=config
    ) as model:
        results = measure(context, model, context.arguments.shapes)
        results |= describe(model, source)
    print_streamed("streamed from tmpfs", results)
    conditions = {
        "a host cache": results["plan"]["cache_bytes"] == 0,
        "more than 1 GiB of staging": results["plan"]["staging_bytes"] <= GIB,
    }
    return {**results, "figure": least_ratio(results), "conditions": conditions}
