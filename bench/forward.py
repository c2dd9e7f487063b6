"""End to end: forwards of a Llama-shaped model, resident, streamed from RAM and from a cold disk.

    python bench/forward.py --case resident,ram --preset 70b --layers 12 --folder /dev/shm/llama-12
    python bench/forward.py --case disk --preset 70b --layers 4 --folder DISK/llama-4 --json d.json
    python bench/forward.py --case ram,bits --device cpu --preset tiny --layers 6 --folder TMP/llama

Cases
    resident  the plain model on the device: the time that computing alone takes
    ram       every layer from the host cache, no device homes for layers, an arena of two layers
    disk      every layer from the disk, proved cold before each run; no host cache
    bits      streamed logits against the resident model's, bit for bit (see bits.py)

A figure is a ratio: bytes that crossed the link while the clock ran (the difference of the engine's
counters, so what was prefetched before gains nothing) over the time of --passes forwards back to
back, from before the first to a synchronize after the last, over the link's ceiling, which is
sampled between the runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coldness
import harness
import shapes
import torch
from harness import GB, GIB, DiskCeiling, LinkCeiling
from passes import CAUSES, counted_passes, gpu_memory, reset_peak, run_ratios, timed_passes

PLAN_FIELDS = (
    *("model_bytes", "device_home_bytes", "host_home_bytes", "disk_home_bytes"),
    *("arena_bytes", "homes_bytes", "cache_bytes", "staging_bytes", "chunk_bytes", "slot_count"),
    *("lookahead_units", "device_budget_bytes", "host_budget_bytes"),
)


@dataclass
class Context:
    arguments: argparse.Namespace
    device: torch.device
    folder: Path
    sizes: shapes.Sizes
    vocab: int
    shapes: list[tuple[int, int]]
    link: LinkCeiling | None = field(default=None)

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch * 100_003 + tokens)
        return torch.randint(0, self.vocab, (batch, tokens), generator=generator).to(self.device)

    def link_ceiling(self) -> LinkCeiling:
        if self.link is None:
            total = GIB if self.device.type == "cuda" else GIB // 4
            self.link = LinkCeiling(self.device, total_bytes=total)
        return self.link


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "1x2048,1x1" -> [(1, 2048), (1, 1)]."""
    out = []
    for word in text.split(","):
        batch, _, tokens = word.partition("x")
        if not (batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
            raise ValueError(f"--shapes wants BATCHxTOKENS,…, not {word!r}")
        out.append((int(batch), int(tokens)))
    return out


def plan_summary(model: Any) -> dict[str, Any]:
    out = {name: getattr(model.plan, name) for name in PLAN_FIELDS}
    out["warnings"] = list(model.plan.warnings)
    return out


def layers_streamed(model: Any) -> int:
    """Bytes that the layers bring in a pass: all, where no layer has a home on the device."""
    return sum(unit.streamed_bytes for unit in model.plan.units if shapes.is_layer(unit.name))


def open_streamed(context: Context, **settings: Any) -> tuple[Any, float]:
    import wsm_ext as wsm

    arguments = context.arguments
    config = dict(settings.pop("config"))
    config.update(reader=arguments.reader, direct=arguments.direct)
    if arguments.lookahead is not None:
        config["lookahead_units"] = arguments.lookahead
    if arguments.chunk_mb is not None:
        config["chunk_mb"] = arguments.chunk_mb
    begin = time.perf_counter()
    model = wsm.from_pretrained(
        context.folder, device=context.device, units=arguments.units, config=config, **settings
    )
    return model, time.perf_counter() - begin


def device_settings(context: Context) -> tuple[int, dict[str, int]]:
    """Budget and settings: an arena of --arena-layers layers, homes of --home-bytes."""
    layers = context.arguments.arena_layers
    arena = int(layers * context.sizes.layer_place_bytes)
    homes = context.arguments.home_bytes
    budget = shapes.blocks(arena) + shapes.blocks(homes)
    return budget, {"arena_bytes": arena, "home_bytes": homes}


def case_resident(context: Context) -> dict[str, Any]:
    """Weights are the initial random ones: time does not depend on them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    reset_peak(context.device)
    config = AutoConfig.from_pretrained(context.folder)
    with context.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows, runs = [], {}
    for batch, tokens in context.shapes:
        ids = context.ids(batch, tokens)
        timed_passes(model, ids, 2)
        passes = context.arguments.passes
        repeats = range(context.arguments.repeats)
        seconds = harness.summary([timed_passes(model, ids, passes) / passes for _ in repeats])
        runs[f"{batch}x{tokens}"] = {"seconds_per_pass": seconds}
        rows.append((f"{batch}x{tokens}", f"{seconds['median']:.4f}"))
    harness.print_table("resident", ("shape", "s/pass"), rows)
    return {"runs": runs, "gpu_memory": gpu_memory(context.device)}


def case_ram(context: Context) -> dict[str, Any]:
    """All bytes in the host cache; the link to the device is the limit."""
    reset_peak(context.device)
    link = context.link_ceiling()
    # A small source stays in the processor's cache; weights do not. Both ceilings are told.
    large = LinkCeiling(context.device, total_bytes=8 * link.source.numel())
    budget, config = device_settings(context)
    slack = context.arguments.staging
    model, load_seconds = open_streamed(
        context,
        device_memory=budget,
        host_memory=shapes.host_bytes(context.sizes, slack),
        config=config,
    )
    with model:
        runs: dict[str, list[dict[str, Any]]] = {}
        for batch, tokens in context.shapes:
            ids = context.ids(batch, tokens)
            timed_passes(model, ids, 2)  # the first fills the cache
            for _ in range(context.arguments.repeats):
                link.sample()
                large.sample()
                run = counted_passes(model, ids, context.arguments.passes)
                runs.setdefault(f"{batch}x{tokens}", []).append(run)
        link.sample()
        results = {
            "runs": {
                name: run_ratios(some, "h2d_bytes", link.median) for name, some in runs.items()
            },
            "ceiling": {"what": "16 MiB pinned copies", **harness.summary(link.gb_per_s)},
            "ceiling_large": {
                "what": f"the same out of {large.source.numel() / GIB:g} GiB",
                **harness.summary(large.gb_per_s),
            },
            "load_seconds": load_seconds,
            "device_memory_asked_bytes": budget,
            "gpu_memory": gpu_memory(context.device),
            **common(model, context),
        }
    print_streamed("streamed from RAM", results)
    for name, run in results["runs"].items():
        run["ratio_large"] = run["GB_per_s"]["median"] / large.median
        what = results["ceiling_large"]["what"]
        print(f"  {name}: {run['ratio_large']:.4f} of {large.median:.2f} GB/s, {what}")
    return results


def case_disk(context: Context) -> dict[str, Any]:
    """All layers from files that were proved cold; the disk is the limit."""
    import wsm_ext as wsm

    arguments = context.arguments
    shards = [Path(shard) for shard in wsm.Checkpoint.open(context.folder).shards]
    largest = max(shards, key=lambda path: path.stat().st_size)
    disk = DiskCeiling(arguments.bench_read, largest, arguments.bytes_per_cell, arguments.read_grid)
    reset_peak(context.device)
    budget, config = device_settings(context)
    staging_mb = arguments.staging // harness.MIB
    model, load_seconds = open_streamed(
        context,
        device_memory=budget,
        host_memory=arguments.staging,
        config={**config, "staging_mb": staging_mb, "cpu_cache_cap_layers": 0},
    )
    with model:
        if model.plan.cache_bytes:
            raise RuntimeError(f"the plan keeps {model.plan.cache_bytes} bytes in a host cache")
        runs: dict[str, list[dict[str, Any]]] = {}
        for batch, tokens in context.shapes:
            ids = context.ids(batch, tokens)
            timed_passes(model, ids, 1)
            for _ in range(arguments.repeats):
                disk.sample()
                cold = coldness.make_cold(shards)
                run = counted_passes(model, ids, arguments.disk_passes)
                run["cached_pages_before"] = sum(cold.values())
                run["cached_pages_after"] = sum(coldness.cached_pages(shard) for shard in shards)
                runs.setdefault(f"{batch}x{tokens}", []).append(run)
        disk.sample()
        best = disk.best
        results = {
            "runs": {
                name: run_ratios(some, "disk_bytes", best["GB_per_s"])
                for name, some in runs.items()
            },
            "ceiling": {"what": "best O_DIRECT of bench_read, same file", **best},
            "load_seconds": load_seconds,
            **common(model, context),
        }
    print_streamed("streamed from a cold disk", results)
    return results


def common(model: Any, context: Context) -> dict[str, Any]:
    stats = model.stats()
    streamed = layers_streamed(model)
    return {
        "plan": plan_summary(model),
        "memory": stats["memory"],
        "readers": {Path(name).name: reader for name, reader in stats["readers"].items()},
        "layers_bytes": context.sizes.layers_bytes,
        "layers_streamed_bytes": streamed,
        "all_layers_stream": streamed == context.sizes.layers_bytes,
    }


def print_streamed(title: str, results: dict[str, Any]) -> None:
    ceiling = results["ceiling"].get("median", results["ceiling"].get("GB_per_s"))
    rows = []
    for name, run in results["runs"].items():
        stalls = [sum(one["stall_seconds"][cause] for one in run["runs"]) for cause in CAUSES]
        rows.append(
            (
                name,
                f"{run['seconds_per_pass']['median']:.4f}",
                f"{run['GB_per_s']['median']:.2f}",
                f"{ceiling:.2f}",
                f"{run['ratio']:.4f}",
                " ".join(
                    f"{cause} {stall:.2f}" for cause, stall in zip(CAUSES, stalls, strict=True)
                ),
            )
        )
    header = ("shape", "s/pass", "GB/s", "ceiling", "ratio", "stalls (s, all runs)")
    harness.print_table(title, header, rows)
    memory = results["memory"]
    peak = memory.get("device_peak_bytes", memory["device_bytes"])
    for what, used, budget in (
        ("device", peak, memory["device_budget_bytes"]),
        ("pinned", memory["host_pinned_bytes"], memory["host_budget_bytes"]),
    ):
        print(f"  {what} {used / GIB:.2f} of {budget / GIB:.2f} GiB")
    if results.get("gpu_memory"):
        print("  " + ", ".join(f"{k} {v / GIB:.2f} GiB" for k, v in results["gpu_memory"].items()))
    if not results["all_layers_stream"]:
        print(
            f"  NOTE: layers have device homes: {results['layers_streamed_bytes']} of "
            f"{results['layers_bytes']} layer bytes stream"
        )
    for warning in results["plan"]["warnings"]:
        print(f"  warning: {warning}")


def case_bits(context: Context) -> dict[str, Any]:
    import bits

    return bits.run(context.folder, context.device, context.vocab)


CASES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "resident": case_resident,
    "ram": case_ram,
    "disk": case_disk,
    "bits": case_bits,
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    from wsm_ext.sizes import parse_bytes

    def size(text: str) -> int:
        return parse_bytes(text, "size")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", default="resident,ram", help="comma-separated: " + ", ".join(CASES))
    add("--folder", type=Path, required=True, help="where the checkpoint is, or is written")
    add("--preset", default="70b")
    add("--layers", type=int, default=12)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", default="1x2048,1x1", help="BATCHxTOKENS, comma-separated")
    add("--passes", type=int, default=10, help="forwards in a run")
    add("--disk-passes", type=int, default=3, help="forwards in a run from the disk")
    add("--repeats", type=int, default=3, help="runs of each shape")
    add("--units", default="auto")
    add("--arena-layers", type=float, default=2.0)
    add("--home-bytes", type=size, default=0, help="device homes; 0: an arena alone")
    add("--staging", type=size, default=GIB, help="staging ring, and slack beside the host cache")
    add("--lookahead", type=int)
    add("--chunk-mb", type=float)
    add("--reader", default="auto")
    add("--direct", default="auto")
    add("--bench-read", type=Path, default=Path("build/release/bench/bench_read"))
    add("--bytes-per-cell", type=size, default=512 * harness.MIB)
    add("--read-grid", choices=("small", "full"), default="small")
    add("--json", type=Path)
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.case.split(",") if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    return arguments


def main(words: list[str] | None = None) -> int:
    import wsm_ext as wsm

    arguments = parse_arguments(words)
    device = torch.device(arguments.device)
    begin = time.perf_counter()
    written = shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(arguments.folder))
    done = f"written in {time.perf_counter() - begin:.1f} s" if written else "reused"
    print(f"checkpoint {done}: {sizes.layers} layers, {sizes.layers_bytes / GB:.2f} GB in them")
    vocab = shapes.preset(arguments.preset)["vocab"]
    context = Context(
        arguments, device, arguments.folder, sizes, vocab, parse_shapes(arguments.shapes)
    )
    records, failed = [], False
    for name in arguments.case.split(","):
        results = CASES[name](context)
        failed |= not results.get("ok", True)
        record = harness.result("forward", name, device, results)
        record["checkpoint"] = {"preset": arguments.preset, "layers": arguments.layers}
        records.append(record)
        if arguments.json:
            harness.write_results(arguments.json, records)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
