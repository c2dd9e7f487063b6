"""The most that this machine's links can do: copies to the device, and reads of files."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..planning.device_memory import in_huge_pages

MIB = 1 << 20
GB = 1e9
# Block bytes and readers at once: the cells that have won on drives so far.
DISK_CELLS = ((256 << 10, 16), (MIB, 8), (MIB, 16), (4 * MIB, 8))
CELL_SECONDS = 0.4


class LinkProbe:
    """Copies of 16 MiB out of pinned memory, back to back: the most that the link can do.

    On a GPU they are enqueued behind a kernel that holds the stream, and timed by events. On the
    host device the link is a copy from memory to memory.
    """

    def __init__(
        self,
        device: torch.device,
        chunk_bytes: int = 16 * MIB,
        total_bytes: int = 512 * MIB,
    ) -> None:
        self.device, self.chunk_bytes = device, chunk_bytes
        cuda = device.type == "cuda"
        self.source = (
            torch.empty(total_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            if cuda
            else in_huge_pages(total_bytes)
        )
        count = min(total_bytes, 1 << 30) // 4
        pattern = torch.arange(count, dtype=torch.int32, device="cpu").view(torch.uint8)
        for part in self.source.split(pattern.numel()):
            part.copy_(pattern[: part.numel()])
        self.target = (
            torch.empty(2 * chunk_bytes, dtype=torch.uint8, device=device)
            if cuda
            else in_huge_pages(2 * chunk_bytes)
        )
        self._sample()  # warm-up

    def _copy_all(self) -> None:
        chunk = self.chunk_bytes
        for i, begin in enumerate(range(0, self.source.numel(), chunk)):
            place = (i % 2) * chunk
            self.target[place : place + chunk].copy_(
                self.source[begin : begin + chunk], non_blocking=True
            )

    def _sample(self) -> float:
        """GB/s of one run over the source."""
        if self.device.type != "cuda":
            begin_s = time.perf_counter()
            self._copy_all()
            return self.source.numel() / (time.perf_counter() - begin_s) / GB
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # about 10 ms: all copies are enqueued by then
            begin.record()
            self._copy_all()
            end.record()
            torch.cuda.synchronize()
            return float(self.source.numel() / (begin.elapsed_time(end) * 1e-3) / GB)


def measure_link(device: torch.device) -> float:
    """Bytes/s from pinned memory to the device, the median of a few samples."""
    total = (512 if device.type == "cuda" else 128) * MIB
    probe = LinkProbe(device, total_bytes=total)
    return statistics.median(probe._sample() for _ in range(5)) * GB


@dataclass(frozen=True)
class DiskCell:
    """One method to read the files: `threads` blocks of `block_bytes` at once."""

    block_bytes: int
    threads: int
    direct: bool
    bytes_per_s: float


def measure_disk(paths: Sequence[Path]) -> DiskCell:
    """The best of a few methods to read the files, past the page cache if they allow that."""
    largest = max(paths, key=lambda path: path.stat().st_size)
    with _Reads(largest) as reads:
        cells = [reads.measure(block, threads) for block, threads in DISK_CELLS]
    return max(cells, key=lambda cell: cell.bytes_per_s)


class _Reads:
    """A file open for direct reads, else for buffered ones."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.stat().st_size
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            os.preadv(self.fd, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
            self.direct = True
        except OSError:
            self.fd = os.open(path, os.O_RDONLY)
            self.direct = False

    def __enter__(self) -> _Reads:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def measure(self, block_bytes: int, threads: int) -> DiskCell:
        """Every thread reads blocks of its own stretch, from its begin again at its end."""
        block = min(block_bytes, max(mmap.PAGESIZE, self.bytes // mmap.PAGESIZE * mmap.PAGESIZE))
        blocks = max(1, self.bytes // block)
        used = min(threads, blocks)
        deadline = time.perf_counter() + CELL_SECONDS

        def read(thread: int) -> int:
            buffer = mmap.mmap(-1, block)  # aligned to pages
            first, count = blocks * thread // used, max(1, blocks // used)
            done = index = 0
            while time.perf_counter() < deadline:
                done += os.preadv(self.fd, [buffer], (first + index % count) * block)
                index += 1
            return done

        begin = time.perf_counter()
        with ThreadPoolExecutor(used) as pool:
            total = sum(pool.map(read, range(used)))
        return DiskCell(block, used, self.direct, total / (time.perf_counter() - begin))
