"""What hashes cost: `wsm verify` against plain reads of the same files, and passes with verify=True
against passes without, by turns.

    python bench/integrity.py --folder DISK/llama-integrity --json integrity.json

Everything is read past the page cache. On a GPU, every byte that is checked is copied back first.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
import passes
import shapes
import torch

import wsm_ext as wsm
from wsm_ext.checkpoints.bulk_reads import read_all
from wsm_ext.checkpoints.hashes import Piece
from wsm_ext.checkpoints.verify import verify
from wsm_ext.commands.bench import measure_disk

STAGING = 128 * harness.MIB


def rates(checkpoint: wsm.Checkpoint, rounds: int) -> dict[str, Any]:
    """GB/s of reading every tensor, of that and hashing it, and of the best plain reads."""
    pieces = [
        Piece(extent.shard, extent.offset, extent.nbytes)
        for image in checkpoint.tensors.values()
        for extent in image.extents
    ]
    nbytes = sum(piece.nbytes for piece in pieces)
    processor: dict[str, list[float]] = {"plain": [], "verify": []}

    def plain() -> float:
        begin, before = time.perf_counter(), time.process_time()
        read_all(checkpoint.shards, pieces, lambda _, blocks: sum(map(len, blocks)))
        processor["plain"].append((time.process_time() - before) / nbytes * harness.GB)
        return nbytes / (time.perf_counter() - begin) / harness.GB

    def hashed() -> float:
        before = time.process_time()
        result = verify(checkpoint)
        processor["verify"].append((time.process_time() - before) / nbytes * harness.GB)
        if not result.equal:
            raise RuntimeError(f"the checkpoint is not as it was hashed: {result.as_dict()}")
        return nbytes / result.seconds / harness.GB

    verify(checkpoint, update=True)
    ways = {"plain": plain, "verify": hashed}
    ways["best_direct"] = lambda: measure_disk(checkpoint.shards).bytes_per_s / harness.GB
    found = {way: harness.summary(v) for way, v in passes.alternate(ways, rounds).items()}
    ratio = found["verify"]["median"] / found["plain"]["median"]
    return {
        "bytes": nbytes,
        "GB_per_s": found,
        "verify_to_plain": ratio,
        # Of all threads; tells the cost where other work takes the cores.
        "cpu_s_per_GB": {way: harness.summary(values) for way, values in processor.items()},
    }


def seconds_of_a_pass(model: Any, ids: torch.Tensor, count: int) -> float:
    return passes.timed_passes(model, ids, count) / count


def pass_times(folder: Path, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(folder))
    results: dict[str, Any] = {}
    for name, host in (("disk", STAGING), ("host cache", sizes.model_bytes + 2 * STAGING)):
        with ExitStack() as stack:
            models = {
                way: stack.enter_context(
                    wsm.from_pretrained(
                        folder,
                        device=device,
                        device_memory=arguments.device_memory,
                        host_memory=host,
                        verify=way == "verify",
                        config={"home_bytes": 0, "staging_mb": STAGING >> 20, "direct": "on"},
                    )
                )
                for way in ("plain", "verify")
            }
            ids = torch.ones((1, arguments.tokens), dtype=torch.long, device=device)
            for model in models.values():
                passes.forwards(model, ids, 1)
            runs = {
                way: partial(seconds_of_a_pass, model, ids, arguments.passes)
                for way, model in models.items()
            }
            seconds = passes.alternate(runs, arguments.rounds)
            results[name] = {
                "pass_seconds": {way: harness.summary(values) for way, values in seconds.items()},
                "verified": models["verify"].stats()["verified"],
                "h2d_bytes": models["verify"].stats()["totals"]["h2d_bytes"],
            }
        medians = results[name]["pass_seconds"]
        results[name]["ratio"] = medians["verify"]["median"] / medians["plain"]["median"]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="made where it is not there")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--device", default=None)
    parser.add_argument("--device-memory", default="256MiB")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--passes", type=int, default=2, help="in each sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", help="put into the results: what else the machine did")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    results = {
        "note": arguments.note,
        "reads": rates(wsm.Checkpoint.open(arguments.folder), arguments.rounds),
        "passes": pass_times(arguments.folder, arguments, device),
    }
    reads = results["reads"]
    harness.print_table(
        "reading the checkpoint past the page cache",
        ("way", "GB/s"),
        [(way, f"{found['median']:.2f}") for way, found in reads["GB_per_s"].items()],
    )
    harness.print_table(
        "a pass",
        ("from", "plain", "verify=True", "ratio"),
        [
            (
                name,
                *(f"{found['pass_seconds'][way]['median']:.3f} s" for way in ("plain", "verify")),
                f"{found['ratio']:.2f}",
            )
            for name, found in results["passes"].items()
        ],
    )
    if arguments.json:
        record = harness.result("integrity", "hashes", device, results)
        harness.write_results(arguments.json, [record])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
