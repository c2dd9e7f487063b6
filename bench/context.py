"""What the cases share: checkpoints, ceilings, and models that are loaded once for several."""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from harness import GB, GIB, DiskCeiling, LinkCeiling
from passes import CAUSES, reset_peak

PLAN_FIELDS = (
    *("model_bytes", "device_home_bytes", "host_home_bytes", "disk_home_bytes"),
    *("arena_bytes", "homes_bytes", "cache_bytes", "staging_bytes", "chunk_bytes", "slot_count"),
    *("lookahead_units", "device_budget_bytes", "host_budget_bytes"),
)


class Skipped(Exception):  # noqa: N818 - not an error: this machine cannot run the case
    """The case cannot be run on this machine; the text says why."""


@dataclass(frozen=True)
class Source:
    """One checkpoint."""

    folder: Path
    sizes: shapes.Sizes

    def shards(self) -> list[Path]:
        import wsm_ext as wsm

        return [Path(shard) for shard in wsm.Checkpoint.open(self.folder).shards]

    @property
    def file_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards())


class Context:
    """Lazily made and kept until `drop`: what costs time to make and serves several cases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.vocab: int = shapes.preset(arguments.preset)["vocab"]
        self._kept: dict[str, Any] = {}

    def ids(self, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch * 100_003 + tokens)
        return torch.randint(0, self.vocab, (batch, tokens), generator=generator).to(self.device)

    def need_cuda(self, why: str) -> None:
        if self.device.type != "cuda":
            raise Skipped(f"{why}; needs --device cuda")

    def _keep(self, name: str, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def drop(self, *names: str) -> None:
        for name in names:
            kept = self._kept.pop(name, None)
            if hasattr(kept, "close"):
                kept.close()
            del kept
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- checkpoints -------------------------------------------------------------------------------

    def _source(self, folder: Path, layers: int) -> Source:
        import wsm_ext as wsm

        begin = time.perf_counter()
        written = shapes.ensure_checkpoint(
            folder, self.arguments.preset, layers, self.arguments.shards
        )
        sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(folder))
        done = f"written in {time.perf_counter() - begin:.1f} s" if written else "reused"
        print(f"checkpoint {done}: {sizes.layers} layers, {sizes.layers_bytes / GB:.2f} GB in them")
        return Source(folder, sizes)

    @property
    def ram_source(self) -> Source:
        """Read once, into the host cache: best on tmpfs."""
        made = (self.arguments.folder, self.arguments.layers)
        return self._keep("ram_source", lambda: self._source(*made))

    @property
    def disk_source(self) -> Source:
        """On a disk."""
        arguments = self.arguments
        folder = arguments.disk_folder or arguments.folder
        layers = arguments.disk_layers or arguments.layers
        return self._keep("disk_source", lambda: self._source(folder, layers))

    # -- ceilings ----------------------------------------------------------------------------------

    def link_ceiling(self) -> LinkCeiling:
        total = GIB if self.device.type == "cuda" else GIB // 4
        return self._keep("link", lambda: LinkCeiling(self.device, total_bytes=total))

    def disk_ceiling(self, into: int = 0) -> DiskCeiling:
        """Under the largest shard, read into so much memory (harness.DiskCeiling); its samples
        accumulate over the cases."""
        arguments = self.arguments

        def make() -> DiskCeiling:
            largest = max(self.disk_source.shards(), key=lambda path: path.stat().st_size)
            size, grid = arguments.bytes_per_cell, arguments.read_grid
            return DiskCeiling(arguments.bench_read, largest, size, grid, into)

        return self._keep(f"disk into {into}", make)

    # -- models ------------------------------------------------------------------------------------

    def arena_settings(self) -> tuple[int, dict[str, int]]:
        """Budget and settings: an arena of --arena-layers layers, homes for what is no layer."""
        sizes = self.ram_source.sizes
        arena, homes = int(self.arguments.arena_layers * sizes.layer_place_bytes), self.homes(sizes)
        budget = shapes.blocks(arena) + shapes.blocks(homes)
        return budget, {"arena_bytes": arena, "home_bytes": homes}

    def homes(self, sizes: shapes.Sizes) -> int:
        """--home-bytes; else the embedding's, the last norm's and the head's. They hold the places
        that the next pass begins with: while they are there, its first layer cannot come in."""
        asked: int | None = self.arguments.home_bytes
        return sizes.ends_place_bytes if asked is None else asked

    def streamed(self) -> Any:
        """Every layer from the host cache, no device homes, an arena of --arena-layers layers."""
        budget, config = self.arena_settings()
        host = shapes.host_bytes(self.ram_source.sizes, self.arguments.staging)

        def make() -> Any:
            return open_streamed(
                self, self.ram_source, device_memory=budget, host_memory=host, config=config
            )

        return self._keep("streamed", make)

    def wrapped(self) -> Any:
        """Everything has a home on the device: nothing streams."""
        room = shapes.blocks(int(self.ram_source.sizes.model_bytes * 1.02) + GIB // 8)

        def make() -> Any:
            model = open_streamed(
                self, self.ram_source, device_memory=room, host_memory=self.arguments.staging
            )
            if model.plan.streams:
                raise RuntimeError(f"not everything stays on the device:\n{model.plan}")
            return model

        return self._keep("wrapped", make)

    def resident(self) -> Any:
        """The plain model on the device, with the checkpoint's weights."""

        def make() -> Any:
            from transformers import AutoConfig, AutoModelForCausalLM

            wrapped = self.wrapped()
            config = AutoConfig.from_pretrained(self.ram_source.folder)
            with self.device:
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(wrapped.fetch(name))
            return model

        return self._keep("resident", make)


def open_streamed(
    context: Context,
    source: Source,
    *,
    device_memory: int,
    host_memory: int,
    config: dict[str, Any] | None = None,
    units: str | None = None,
) -> Any:
    """The source's model, streamed; with the settings of the command line. `load_s` is noted."""
    import wsm_ext as wsm

    arguments = context.arguments
    settings = {**(config or {}), "reader": arguments.reader, "direct": arguments.direct}
    if arguments.lookahead is not None:
        settings["lookahead_units"] = arguments.lookahead
    if arguments.chunk_mb is not None:
        settings["chunk_mb"] = arguments.chunk_mb
    reset_peak(context.device)
    begin = time.perf_counter()
    model = wsm.from_pretrained(
        source.folder,
        device=context.device,
        device_memory=device_memory,
        host_memory=host_memory,
        units=units or arguments.units,
        config=settings,
    )
    model._bench_load_s = time.perf_counter() - begin
    return model


def describe(model: Any, source: Source) -> dict[str, Any]:
    """The plan, the memory and the readers behind a figure."""
    stats = model.stats()
    # All of the layers' bytes, where no layer has a home on the device.
    layers = sum(unit.streamed_bytes for unit in model.plan.units if shapes.is_layer(unit.name))
    return {
        "plan": {
            **{name: getattr(model.plan, name) for name in PLAN_FIELDS},
            "warnings": list(model.plan.warnings),
        },
        "memory": stats["memory"],
        "readers": {Path(name).name: reader for name, reader in stats["readers"].items()},
        "load_s": model._bench_load_s,
        "layers_bytes": source.sizes.layers_bytes,
        "layers_streamed_bytes": layers,
        "all_layers_stream": layers == source.sizes.layers_bytes,
    }


def print_streamed(title: str, results: dict[str, Any]) -> None:
    ceiling = results["ceiling"].get("median", results["ceiling"].get("GB_per_s"))
    rows = []
    for name, run in results["runs"].items():
        stalls = [sum(one["stall_seconds"][cause] for one in run["runs"]) for cause in CAUSES]
        waited = " ".join(f"{c} {s:.2f}" for c, s in zip(CAUSES, stalls, strict=True))
        seconds, rate = run["seconds_per_pass"]["median"], run["GB_per_s"]["median"]
        figures = (f"{seconds:.4f}", f"{rate:.2f}", f"{ceiling:.2f}", f"{run['ratio']:.4f}")
        rows.append((name, *figures, waited))
    header = ("shape", "s/pass", "GB/s", "ceiling", "ratio", "stalls (s, all runs)")
    harness.print_table(title, header, rows)
    memory = results["memory"]
    for what, used, budget in (
        ("device", memory["device_peak_bytes"], memory["device_budget_bytes"]),
        ("pinned", memory["host_pinned_bytes"], memory["host_budget_bytes"]),
    ):
        print(f"  {what} {used / GIB:.2f} of {budget / GIB:.2f} GiB")
    if results.get("gpu_memory"):
        print("  " + ", ".join(f"{k} {v / GIB:.2f} GiB" for k, v in results["gpu_memory"].items()))
    if not results["all_layers_stream"]:
        streamed, layers = results["layers_streamed_bytes"], results["layers_bytes"]
        print(f"  layers have device homes: {streamed} of {layers} layer bytes stream")
    for warning in results["plan"]["warnings"]:
        print(f"  warning: {warning}")
