"""`wsm bench`: how close streamed passes come to this machine's ceilings, on the user's own model.

The ceilings first: the link to the device, and the disk under the model's own files. Then passes:
by the budgets given, all from RAM, all from a cold disk; and the time that computing alone takes,
by one layer that is called again and again, so that nothing moves. The least time of a pass is that
of its slowest part; how close a pass comes is that least over its time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoints.checkpoint import Checkpoint
from ..modules.units import find_units
from ..planning.budgets import host_available
from ..runtime.request import resolve_device
from ..sizes import format_bytes
from . import report
from .ceilings import GB, MIB, measure_disk, measure_link
from .loading import folder_of, load
from .options import Commands, count, device_options, streaming_options
from .report import synchronize

STAGING_BYTES = 256 * MIB
LAYER_CALLS = 12

Step = Callable[[str], None]


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        parents=[streaming_options(), device_options()],
        help="measure this machine's links, and how close passes come to them",
        description="Measure the link to the device and the disk under the model's files, then "
        "passes of the streamed model: by the budgets given, from RAM, and from a cold disk. Says "
        "which link limits each, and how close it comes.",
    )
    parser.add_argument("--batch", type=count, default=1, metavar="B", help="sequences (1)")
    parser.add_argument("--tokens", type=count, default=128, metavar="T", help="of each (128)")
    parser.add_argument("--passes", type=count, default=3, metavar="N", help="of each run (3)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    folder = folder_of(options)
    options.revision = None  # the folder is that revision

    @contextmanager
    def open_model(**replaced: Any) -> Iterator[Any]:
        with load(options, folder, device, **replaced) as (model, _):
            yield model

    result = run_bench(
        folder,
        device=device,
        open_model=open_model,
        batch=options.batch,
        tokens=options.tokens,
        passes=options.passes,
        step=lambda what: print(f"measuring {what}", file=sys.stderr, flush=True),
    )
    print_bench(Console(), result)
    if options.json:
        content = report.setting(options.command_line, device)
        report.write_json(options.json, {**content, "model": options.model, "bench": result})
    return 0


@dataclass
class Run:
    """Passes back to back: what they moved and took, each a mean."""

    name: str
    seconds: float
    h2d_bytes: int
    disk_bytes: int
    cached_share: float  # of the file bytes, those that the page cache had
    streams: bool

    def parts(self, link: float, disk: float, compute_s: float) -> dict[str, float]:
        """The least seconds of a pass, by what would take them."""
        return {
            "computing": compute_s,
            "link": self.h2d_bytes / link,
            "disk": self.disk_bytes * (1 - self.cached_share) / disk,
        }


@dataclass(frozen=True)
class Passes:
    """Runs of so many passes of one shape, and what they took."""

    shards: list[Path]
    device: torch.device
    batch: int
    tokens: int
    count: int

    def forwards(self, model: Any, count: int) -> None:
        vocab = model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocab, (self.batch, self.tokens), device=self.device)
        with torch.inference_mode():
            for _ in range(count):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        synchronize(self.device)

    def run(self, name: str, model: Any, *, cold: bool = False) -> Run:
        self.forwards(model, 1)  # fills the cache
        if cold:
            _drop(self.shards)
        before = model.stats()
        begin = time.perf_counter()
        self.forwards(model, self.count)
        seconds = time.perf_counter() - begin
        return _difference(name, before, model.stats(), seconds, self.count, model.plan.streams)


def run_bench(
    folder: Path,
    *,
    device: torch.device,
    open_model: Callable[..., Any],
    batch: int,
    tokens: int,
    passes: int,
    step: Step = lambda _: None,
) -> dict[str, Any]:
    """Measure ceilings, then passes. `open_model(**budgets)` streams the folder's model.

    Without arguments it takes the user's budgets; `device_memory`, `host_memory` and `config`
    replace them. The result is what `print_bench` shows: plain, for JSON.
    """
    shards = [Path(shard) for shard in Checkpoint.open(folder).shards]
    step("the link to the device")
    link = measure_link(device)
    step("the disk")
    disk = measure_disk(shards)
    measured = Passes(shards, device, batch, tokens, passes)
    runs: list[Run] = []
    skipped: dict[str, str] = {}
    step("passes by your budgets")
    with open_model() as model:
        plan = model.plan
        runs.append(measured.run("your budgets", model))
    arena = 2 * (max(unit.bytes for unit in plan.units) + MIB // 16)
    alone = {"arena_bytes": arena, "home_bytes": 0}
    staging = min(STAGING_BYTES, max(plan.model_bytes // 4, 2 * MIB)) // MIB
    whole = plan.model_bytes + plan.model_bytes // 64 + 8 * MIB + staging * MIB
    device_bytes = arena + 24 * MIB
    step("passes from a cold disk")
    config = {**alone, "cpu_cache_cap_layers": 0, "staging_mb": staging}
    with open_model(device_memory=device_bytes, host_memory=staging * MIB, config=config) as model:
        runs.append(measured.run("from disk", model, cold=True))
        step("one layer again and again")
        compute_s = layer_seconds(model, lambda: measured.forwards(model, 1), device)
    if whole <= host_available():
        step("passes from RAM")
        with open_model(device_memory=device_bytes, host_memory=whole, config=alone) as model:
            runs.append(measured.run("from RAM", model))
    else:
        skipped["from RAM"] = f"{format_bytes(whole)} of host memory are not free"
    return {
        "batch": batch,
        "tokens": tokens,
        "passes": passes,
        "model_bytes": plan.model_bytes,
        "link_bytes_per_s": link,
        "disk": asdict(disk),
        "compute_s_per_pass": compute_s,
        "runs": [_closeness(run, link, disk.bytes_per_s, compute_s) for run in runs],
        "skipped": skipped,
    }


def layer_seconds(model: Any, forward: Callable[[], None], device: torch.device) -> float:
    """Seconds that the layers of a pass take to compute: one layer's, times the layers.

    A unit that is called again and again stays in its place, so only computing is left. 0 if
    there is no stack of layers, or its layers would not stay.
    """
    layers = [unit for unit in find_units(model, "layer") if unit.layer is not None]
    if not layers:
        return 0.0
    stack = [unit for unit in layers if unit.stack == layers[-1].stack]
    count = 1 + max(unit.layer for unit in stack if unit.layer is not None)
    layer = model.get_submodule(f"{stack[0].stack}.{count - 1}")
    inputs: list[tuple[Any, Any]] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    try:
        forward()
    finally:
        hook.remove()
    args, kwargs = inputs[0]
    seconds, moved = [], []
    with torch.inference_mode():
        for _ in range(LAYER_CALLS):
            synchronize(device)
            before = model.stats()["totals"]["demand_loads"]
            begin = time.perf_counter()
            layer(*args, **kwargs)
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
            moved.append(model.stats()["totals"]["demand_loads"] - before)
    still = [s for s, m in zip(seconds, moved, strict=True) if m == 0][1:]
    return statistics.median(still) * count if still else 0.0


def _drop(shards: Sequence[Path]) -> None:
    """Asks the kernel to forget what it has of the files; what it keeps is told by the readers."""
    for shard in shards:
        fd = os.open(shard, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _difference(
    name: str,
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: float,
    passes: int,
    streams: bool,
) -> Run:
    def moved(key: str) -> int:
        return int(after["totals"][key] - before["totals"][key])

    def read(stats: dict[str, Any], mode: str) -> int:
        return sum(reader[f"{mode}_bytes"] for reader in stats["readers"].values())

    buffered, direct = (read(after, m) - read(before, m) for m in ("buffered", "direct"))
    return Run(
        name,
        seconds / passes,
        moved("h2d_bytes") // passes,
        moved("disk_bytes") // passes,
        buffered / max(buffered + direct, 1),
        streams,
    )


def _closeness(run: Run, link: float, disk: float, compute_s: float) -> dict[str, Any]:
    parts = run.parts(link, disk, compute_s)
    limit = max(parts, key=lambda part: parts[part])
    return {
        **asdict(run),
        "least_s": parts,
        "limit": limit,
        "closeness": min(parts[limit] / run.seconds, 1.0) if parts[limit] else None,
    }


def print_bench(console: Console, result: dict[str, Any]) -> None:
    """The ceilings, then each run with a bar that shows how close it comes."""
    disk = result["disk"]
    ceilings = Table(title="ceilings of this machine", title_justify="left", show_header=False)
    ceilings.add_column(style="bold")
    ceilings.add_column(justify="right")
    ceilings.add_column()
    link_rate = f"{result['link_bytes_per_s'] / GB:.2f} GB/s"
    ceilings.add_row("link to the device", link_rate, "copies of 16 MiB")
    how = f"{disk['threads']} x {format_bytes(disk['block_bytes'])}"
    how += ", direct" if disk["direct"] else ", through the page cache: the files refuse O_DIRECT"
    ceilings.add_row("disk under the files", f"{disk['bytes_per_s'] / GB:.2f} GB/s", how)
    if result["compute_s_per_pass"]:
        computing = f"{result['compute_s_per_pass']:.4f} s"
        ceilings.add_row("computing", computing, "one layer, times the layers")
    console.print(ceilings)
    size = f"{result['batch']} x {result['tokens']} tokens"
    title = f"passes of {size}, {format_bytes(result['model_bytes'])} of weights"
    table = Table(title=title, title_justify="left")
    for column in ("run", "s/pass", "link GB/s", "disk GB/s", "limit"):
        left = column in ("run", "limit")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    table.add_column("how close", no_wrap=True)
    for run in result["runs"]:
        table.add_row(*_cells(run))
    console.print(table)
    for run in result["runs"]:
        if run["cached_share"] > 0.01:
            share = f"{run['cached_share']:.0%} of the file reads came from the page cache"
            console.print(f"{run['name']}: {share}", highlight=False, markup=False)
    for name, why in result["skipped"].items():
        console.print(f"{name}: skipped, {why}", highlight=False, markup=False)


def _cells(run: dict[str, Any]) -> list[str]:
    def rate(nbytes: int) -> str:
        return f"{nbytes / run['seconds'] / GB:.2f}" if nbytes else "-"

    close = run["closeness"]
    return [
        run["name"],
        f"{run['seconds']:.4f}",
        rate(run["h2d_bytes"]),
        rate(run["disk_bytes"]),
        run["limit"] if run["streams"] else "computing: nothing streams",
        "" if close is None else f"{_bar(close)} {close:4.0%}",
    ]


def _bar(share: float, width: int = 10) -> str:
    full = round(share * width)
    return "█" * full + "░" * (width - full)
