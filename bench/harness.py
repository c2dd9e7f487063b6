"""What the Python benchmarks share: where and on what they ran, ceilings, ratios, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import wsm_ext
from wsm_ext.commands.ceilings import LinkProbe

MIB = 1 << 20
GIB = 1 << 30
GB = 1e9

REQUIRED_KEYS = ("benchmark", "case", "environment", "results")


def bandwidth_ratio(nbytes: float, seconds: float, ceiling_gb_per_s: float) -> float:
    """How close bytes in seconds come to a ceiling in GB/s (1.0: at it)."""
    if nbytes <= 0 or seconds <= 0 or ceiling_gb_per_s <= 0:
        raise ValueError(
            f"no ratio from {nbytes} bytes in {seconds} s over {ceiling_gb_per_s} GB/s: "
            "all must be > 0"
        )
    return nbytes / seconds / GB / ceiling_gb_per_s


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and the samples themselves."""
    if not values:
        raise ValueError("no samples to summarise")
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "samples": list(values),
    }


def _memory_total() -> int:
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max"]
        answer = subprocess.run(
            [*query, "--format=csv,noheader", "-i", str(device.index or 0)],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        driver, generation, width = (field.strip() for field in answer.stdout.strip().split(","))
        pcie = f"gen {generation} x{width}"
    except (OSError, ValueError, subprocess.SubprocessError):
        driver, pcie = "unknown", "unknown"
    memory = properties.total_memory
    return {"name": properties.name, "driver": driver, "pcie": pcie, "memory_bytes": memory}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and command. No folder is named: results are published."""
    script, *arguments = sys.argv
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"bench/{Path(script).name}", *map(_short, arguments)]),
        "device": str(device),
        "gpu": _gpu(device),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_total(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "wsm_ext": wsm_ext.__version__,
    }


def _short(argument: str) -> str:
    """An absolute path by its last name: the rest belongs to the machine."""
    return f"…/{Path(argument).name}" if argument.startswith("/") else argument


def result(benchmark: str, case: str, device: torch.device, results: Any) -> dict[str, Any]:
    """One record of the results' schema."""
    values = (benchmark, case, environment(device), results)
    return dict(zip(REQUIRED_KEYS, values, strict=True))


def check_result(record: dict[str, Any]) -> None:
    """Raises ValueError naming what a record lacks."""
    missing = [key for key in REQUIRED_KEYS if key not in record]
    if missing:
        raise ValueError(f"a result lacks {missing}")
    for key in ("date", "command", "device", "cpu_count", "memory_bytes", "kernel", "torch"):
        if record["environment"].get(key) in (None, ""):
            raise ValueError(f"a result's environment lacks {key}")


def write_results(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a list of records; the file appears whole or not at all."""
    for record in records:
        check_result(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table: columns as wide as their widest cell."""
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        line = "  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True))
        print(f"  {line.rstrip()}")
    sys.stdout.flush()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LinkCeiling(LinkProbe):
    """The link's probe, sampled again and again between the runs compared with it, and verified."""

    def __init__(
        self, device: torch.device, chunk_bytes: int = 16 * MIB, total_bytes: int = GIB
    ) -> None:
        super().__init__(device, chunk_bytes, total_bytes)
        self.gb_per_s: list[float] = []

    def sample(self, count: int = 3) -> None:
        self.gb_per_s += [self._sample() for _ in range(count)]
        last = self.source[-self.chunk_bytes :]
        place = ((self.source.numel() // self.chunk_bytes - 1) % 2) * self.chunk_bytes
        arrived = self.target[place : place + self.chunk_bytes].cpu()
        if not torch.equal(arrived, last):
            raise RuntimeError("bytes differ after the copy: the ceiling is not to be trusted")

    @property
    def median(self) -> float:
        return statistics.median(self.gb_per_s)


Cell = tuple[str, int, int]  # reader, block bytes, depth


def _samples_of(reports: Sequence[dict[str, Any]], mode: str) -> dict[Cell, list[float]]:
    figures: dict[Cell, list[float]] = {}
    for report in reports:
        for cell in report["cells"]:
            if cell["mode"] == mode:
                key = (cell["reader"], cell["block_bytes"], cell["depth"])
                figures.setdefault(key, []).append(cell["GB_per_s"])
    if not figures:
        raise ValueError(f"bench_read measured no {mode} cell")
    return figures


def _best(figures: dict[Cell, list[float]]) -> Cell:
    return max(figures, key=lambda cell: statistics.median(figures[cell]))


def _rate_of_the_best(figures: dict[Cell, list[float]], wanted: range) -> float:
    """The median of the wanted samples, each of the cell that is best by all the other samples.

    Of several cells whose samples scatter, the one that seems best is also the luckiest: on a drive
    that moves by a fifth from sample to sample, six equal cells seem a tenth faster than they are.
    A cell that is chosen by other samples than its own has no such luck.
    """
    count = min(map(len, figures.values()))
    if count < 4:  # too few to choose by
        return statistics.median(figures[_best(figures)])
    chosen = []
    for index in wanted:
        others = {cell: [*some[:index], *some[index + 1 :]] for cell, some in figures.items()}
        chosen.append(figures[_best(others)][index])
    return statistics.median(chosen)


def merge_cells(reports: Sequence[dict[str, Any]], mode: str) -> dict[str, Any]:
    """The cell of a mode with the best median over several reports of bench_read.

    `unlucky_GB_per_s`: what is left of it where a cell is chosen by other samples than its own.
    """
    figures = _samples_of(reports, mode)
    best = _best(figures)
    return {
        "reader": best[0],
        "block_bytes": best[1],
        "depth": best[2],
        "mode": mode,
        "GB_per_s": statistics.median(figures[best]),
        "unlucky_GB_per_s": _rate_of_the_best(figures, range(len(reports))),
        "samples": figures[best],
        "cells_GB_per_s": {
            f"{cell[0]} {cell[1] >> 10} KiB x {cell[2]}": statistics.median(rates)
            for cell, rates in figures.items()
        },
    }


class DiskCeiling:
    """The disk under a file, by bench_read's grid, sampled between the runs compared with it.

    `into`: bytes of memory that are read into in turn; 0: no more than is in flight, again and
    again, which on a virtual disk may never leave the processor's cache.
    """

    def __init__(
        self, bench_read: Path, file: Path, bytes_per_cell: int, grid: str, into: int = 0
    ) -> None:
        if not bench_read.is_file():
            raise FileNotFoundError(
                f"{bench_read} is not there; build it (cmake -DWSM_BUILD_BENCH=ON) "
                "and name it by --bench-read"
            )
        self.bench_read, self.file, self.grid = bench_read, file, grid
        self.bytes_per_cell, self.into = bytes_per_cell, into
        self.reports: list[dict[str, Any]] = []

    def sample(self, count: int = 1) -> None:
        for _ in range(count):
            self._sample()

    def _sample(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "read.json")
            command: list[str] = [str(self.bench_read), str(self.file), "--repeats", "1"]
            command += ["--bytes-per-cell", str(self.bytes_per_cell), "--grid", self.grid]
            command += ["--into", str(self.into)]
            command += ["--json", str(out)]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if ran.returncode:
                raise RuntimeError(f"bench_read failed: {ran.stderr.strip()}")
            self.reports.append(json.loads(out.read_text()))

    @property
    def best(self) -> dict[str, Any]:
        return merge_cells(self.reports, "direct")

    def rate_between(self, first: int, last: int) -> float:
        """GB/s of the best cell in the samples `first` to `last`, the latter left out."""
        return _rate_of_the_best(_samples_of(self.reports, "direct"), range(first, last))
