"""What the rate of the link depends on, without the engine: how much memory the copies come out of,
where it lies, how long they are, how long they go on, and what runs beside them.

    python bench/link_conditions.py --gib 21 --seconds 2 --json link-conditions.json

The ceiling that the cases are measured against is short: 1 GiB, again and again. A pass over a
large model is not. Where bare copies of as many bytes are as slow, it is not the engine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import GB, GIB, MIB

TARGET_BYTES = 3 * GIB + GIB // 4  # an arena of two layers
BURST = 2  # rounds over one piece


class Copies:
    """Pinned pieces of a GiB, and an arena that they are copied to, place after place."""

    def __init__(self, device: torch.device, gib: int) -> None:
        self.device = device
        self.pieces = [torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(gib)]
        for piece in self.pieces:
            piece.random_(0, 255) if piece is self.pieces[0] else piece.copy_(self.pieces[0])
        self.target = torch.empty(TARGET_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self._place = 0

    def enqueue(self, pieces: Sequence[torch.Tensor], size: int, target_bytes: int) -> int:
        """All of the pieces, once; the bytes."""
        for piece in pieces:
            for begin in range(0, GIB, size):
                if self._place + size > target_bytes:
                    self._place = 0
                place = self.target[self._place : self._place + size]
                place.copy_(piece[begin : begin + size], non_blocking=True)
                self._place += size
        return len(pieces) * GIB

    def burst(self, pieces: Sequence[torch.Tensor], size: int, target_bytes: int) -> float:
        """GB/s of copies that were all enqueued behind a kernel that holds the stream."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(20_000_000)
            begin.record()
            nbytes = sum(self.enqueue(pieces, size, target_bytes) for _ in range(BURST))
            end.record()
        end.synchronize()
        return nbytes / begin.elapsed_time(end) / 1e6

    def sustained(
        self, pieces: Sequence[torch.Tensor], size: int, seconds: float, idle_host: bool = False
    ) -> float:
        """GB/s over about so many seconds; the host runs one piece ahead, and waits for events.

        `idle_host`: it sleeps while it waits, as a thread does that has nothing to do.
        """
        events: list[torch.cuda.Event] = []
        nbytes = 0
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.cuda.stream(self.stream):
            while time.perf_counter() - start < seconds:
                for piece in pieces:
                    nbytes += self.enqueue([piece], size, TARGET_BYTES)
                    event = torch.cuda.Event()
                    event.record()
                    events.append(event)
                    if len(events) > 2:
                        first = events.pop(0)
                        while idle_host and not first.query():
                            time.sleep(0.001)
                        first.synchronize()
        torch.cuda.synchronize()
        return nbytes / (time.perf_counter() - start) / GB


def products(device: torch.device) -> Any:
    """Keeps the GPU busy with matrix products on another stream; call it to end that."""
    stream = torch.cuda.Stream(device)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    with torch.cuda.stream(stream):
        for _ in range(3000):  # about 5 s
            torch.mm(a, a, out=out)
    return stream.query


def measure(copies: Copies, seconds: float) -> dict[str, Any]:
    pieces, one = copies.pieces, copies.pieces[:1]
    out: dict[str, Any] = {}

    def note(name: str, rate: float) -> None:
        out[name] = rate
        print(f"  {name:58s} {rate:6.2f} GB/s", flush=True)

    copies.burst(one, 16 * MIB, 2 * 16 * MIB)
    small = [copies.burst(one, 16 * MIB, 2 * 16 * MIB) for _ in range(5)]
    note("1 GiB to 32 MiB, 16 MiB copies", statistics.median(small))
    note("1 GiB to an arena", copies.burst(one, 16 * MIB, TARGET_BYTES))
    for count in (4, 8, 16, len(pieces)):
        if count <= len(pieces):
            note(f"{count} GiB to an arena", copies.burst(pieces[:count], 16 * MIB, TARGET_BYTES))
    for size in (4, 16, 64, 256):
        rate = copies.burst(pieces, size * MIB, TARGET_BYTES)
        note(f"{len(pieces)} GiB to an arena, {size} MiB copies", rate)
    note(f"1 GiB for {seconds:g} s", copies.sustained(one, 16 * MIB, seconds))
    note(f"{len(pieces)} GiB for {seconds:g} s", copies.sustained(pieces, 16 * MIB, seconds))
    rate = copies.sustained(pieces, 16 * MIB, seconds, idle_host=True)
    note(f"{len(pieces)} GiB for {seconds:g} s, the host asleep", rate)
    busy = products(copies.device)
    rate = copies.sustained(pieces, 16 * MIB, seconds)
    note(f"{len(pieces)} GiB for {seconds:g} s, beside products", rate)
    out["products_ran_throughout"] = not busy()
    torch.cuda.synchronize()
    by_piece = [copies.burst([piece], 16 * MIB, TARGET_BYTES) for piece in pieces]
    out["by_piece"] = by_piece
    print("  each GiB by itself:", " ".join(f"{rate:.1f}" for rate in by_piece))
    note("1 GiB to 32 MiB, 16 MiB copies, again", copies.burst(one, 16 * MIB, 2 * 16 * MIB))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=21, help="how much memory is pinned")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each sustained run")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.cuda.set_device(device)
    results = measure(Copies(device, arguments.gib), arguments.seconds)
    if arguments.json:
        record = harness.result("link_conditions", "bare copies", device, results)
        harness.write_results(arguments.json, [record])


if __name__ == "__main__":
    main()
