"""What the rate of a disk depends on, without the engine: in which order pieces of 16 MiB are read,
for how long without a pause, and how much memory they are read into.

    python bench/disk_conditions.py --folder DISK/llama-2 --layers 2 --json disk-conditions.json

The ceiling that the cases from disk are measured against is short: samples of 512 MiB, with pauses
between, into as little memory as is in flight. A pass is not. Cells take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coldness
import harness
import shapes
import torch
from harness import GB, MIB

from wsm_ext import _engine
from wsm_ext.config import Config
from wsm_ext.planning.measure import find_spans
from wsm_ext.planning.read_method import ReadMethod, engine_options

PIECE = 16 * MIB
WAYS = (ReadMethod("pread", 256 << 10), ReadMethod("uring", 256 << 10))
SAMPLE_S = 0.4
ROUNDS = 3
# Of how much a cell of bench_read reads, into how much memory.
CELLS = (
    *(("512MiB", into) for into in ("0", "6MiB", "8MiB", "16MiB", "32MiB", "128MiB", "512MiB")),
    *(("2GiB", into) for into in ("0", "512MiB")),
)
PAUSELESS = 16  # samples of half a second, one after another
Piece = tuple[int, int, int]  # file, offset, bytes


def orders(files: Sequence[Path]) -> dict[str, list[Piece]]:
    """All pieces, and parts of them, in the orders in which they are to be read."""
    row = [
        (index, at, PIECE)
        for index, file in enumerate(files)
        for at in range(0, file.stat().st_size - PIECE + 1, PIECE)
    ]
    out = {"all in a row": row}
    for run in (1, 2, 4, 8):
        out[f"runs of {run}, and as many left out"] = [
            piece for i, piece in enumerate(row) if i // run % 2 == 0
        ]
    spans = find_spans(files)
    out["all, scattered"] = [(files.index(span.path), span.offset, PIECE) for span in spans]
    return out


def read(
    files: Sequence[Path], pieces: list[Piece], way: ReadMethod, seconds: float, rounds: int
) -> Any:
    """GB/s, a sample a round; a round goes on where the one before it stopped."""
    options = engine_options(Config(), way)
    options.reader = options.preferred
    rates = _engine.time_reads([str(file) for file in files], pieces, [options], seconds, rounds)
    return [rate / GB for rate in rates[0]]


def by_order(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        samples: dict[str, list[float]] = {}
        for turn in range(ROUNDS):
            for name, pieces in orders(files).items():
                begin = turn * len(pieces) // ROUNDS
                turned = pieces[begin:] + pieces[:begin]
                samples.setdefault(name, []).extend(read(files, turned, way, SAMPLE_S, 1))
        for name, rates in samples.items():
            print(f"  {way!s:32s} {name:34s} {statistics.median(rates):5.2f} GB/s", flush=True)
        out[str(way)] = {name: harness.summary(rates) for name, rates in samples.items()}
    return out


def by_cells(bench_read: Path, file: Path) -> list[dict[str, Any]]:
    """bench_read's small grid, by how much a cell reads and how much memory it reads into."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for size, into in CELLS:
            record = Path(folder, "read.json")
            command = [str(bench_read), str(file), "--repeats", "2", "--json", str(record)]
            command += ["--bytes-per-cell", size, "--into", into]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            found = json.loads(record.read_text())
            cells = {
                f"{c['reader']} {c['block_bytes'] >> 10} KiB": round(c["GB_per_s"], 3)
                for c in found["cells"]
                if c["mode"] == "direct"
            }
            out.append({"bytes_per_cell": size, "into": into, "GB_per_s": cells})
            print(f"  cells of {size}, into {into}: {cells}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint, on a disk")
    parser.add_argument("--preset", default="70b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--bench-read", type=Path, default=Path("build/release/bench/bench_read"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    files = sorted(arguments.folder.glob("*.safetensors"))
    coldness.make_cold(files)
    results: dict[str, Any] = {"cells": by_cells(arguments.bench_read, files[0])}
    results["orders"] = by_order(files)
    pauseless = read(files, orders(files)["all in a row"], WAYS[0], 0.5, PAUSELESS)
    results["without_a_pause_GB_per_s"] = pauseless
    print("  half seconds without a pause:", " ".join(f"{rate:.2f}" for rate in pauseless))
    if arguments.json:
        device = torch.device("cpu")
        record = harness.result("disk_conditions", "bare reads", device, results)
        harness.write_results(arguments.json, [record])


if __name__ == "__main__":
    main()
