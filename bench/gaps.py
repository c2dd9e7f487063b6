"""Where the link's time goes while passes stream from RAM: copies by size, and the gaps.

    python bench/gaps.py --preset 70b --layers 6 --folder /dev/shm/llama-6

CUPTI (by torch.profiler) times every copy on the device. Beside it: the rate of copies whose source
is not aligned, since tensors in a safetensors file begin anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import harness
import shapes
import torch
from cuptitrace import record
from harness import MIB
from passes import forwards


def copies_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "HtoD" in e.get("name", "")]
    return sorted(copies, key=lambda e: float(e["ts"]))


def describe(copies: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes over busy time and over wall time; rates by size; gaps by length."""
    by_size: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    gaps: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    end = float(copies[0]["ts"])
    for copy in copies:
        start, duration = float(copy["ts"]), float(copy["dur"])
        nbytes = int(copy["args"]["bytes"])
        size = f"< {1 << max(nbytes - 1, 1).bit_length():>9}"
        by_size[size][0] += 1
        by_size[size][1] += nbytes
        by_size[size][2] += duration
        gap = start - end
        length = (
            "< 2 us" if gap < 2 else "< 5 us" if gap < 5 else "< 50 us" if gap < 50 else "longer"
        )
        gaps[length][0] += 1
        gaps[length][1] += max(gap, 0.0)
        end = start + duration
    total = sum(int(copy["args"]["bytes"]) for copy in copies)
    busy = sum(float(copy["dur"]) for copy in copies)
    wall = end - float(copies[0]["ts"])
    return {
        "copies": len(copies),
        "gb_per_s_busy": total / busy / 1e3,
        "gb_per_s_wall": total / wall / 1e3,
        "by_size": {
            size: {"copies": n, "gb_per_s": nbytes / us / 1e3, "us": us}
            for size, (n, nbytes, us) in sorted(by_size.items())
        },
        "gaps": {length: {"gaps": n, "us": us} for length, (n, us) in sorted(gaps.items())},
    }


def misaligned(device: torch.device) -> dict[str, float]:
    """GB/s of 16 MiB copies by the source's and the target's distance from a multiple of 4096."""
    block = 16 * MIB
    source = torch.empty(64 * block + 8192, dtype=torch.uint8).pin_memory()
    target = torch.empty(64 * block + 8192, dtype=torch.uint8, device=device)
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(3):
        for shift, to in (
            (0, 0),
            (8, 0),
            (16, 0),
            (64, 0),
            (128, 0),
            (256, 0),
            (512, 0),
            (8, 8),
            (0, 8),
        ):
            begin, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for i in range(64):
                target[to + i * block : to + (i + 1) * block].copy_(
                    source[shift + i * block : shift + (i + 1) * block], non_blocking=True
                )
            done.record()
            done.synchronize()
            rates[f"source +{shift}, target +{to}"].append(
                64 * block / begin.elapsed_time(done) / 1e6
            )
    return {name: max(some) for name, some in rates.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="70b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--units", default="layer")
    parser.add_argument("--chunk-mb", type=float)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    import wsm_ext as wsm

    device = torch.device("cuda", 0)
    found = {"alignment": misaligned(device)}
    for name, rate in found["alignment"].items():
        print(f"{name:<24} {rate:6.2f} GB/s")
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(arguments.folder))
    arena = 2 * sizes.layer_place_bytes
    config: dict[str, Any] = {"arena_bytes": arena, "home_bytes": 0}
    if arguments.chunk_mb:
        config["chunk_mb"] = arguments.chunk_mb
    with wsm.from_pretrained(
        arguments.folder,
        device=device,
        units=arguments.units,
        config=config,
        device_memory=shapes.blocks(arena),
        host_memory=shapes.host_bytes(sizes, 512 * MIB),
    ) as model:
        ids = torch.randint(0, 1000, (1, 1), device=device)
        forwards(model, ids, 2)
        found.update(describe(copies_of(record(lambda: forwards(model, ids, 3)))))
    print(json.dumps({k: v for k, v in found.items() if k != "alignment"}, indent=1))
    if arguments.json:
        result = harness.result("gaps", arguments.units, device, found)
        harness.write_results(arguments.json, [result])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
