"""End to end: the cases of a Llama-shaped model, each a figure against a bar.

    python bench/forward.py --case ram,compute,busy,wrapper --folder /dev/shm/llama-12
    python bench/forward.py --case disk,half,first --layers 4 --folder DISK/llama-4 --json d.json
    python bench/forward.py --case 1,7,bits --device cpu --preset tiny --layers 6 --folder TMP/llama

Cases, by number or name (bars.py has the bars)
    1  ram       every layer from the host cache, no device homes, an arena of two layers
    2  compute   compute-bound, against the resident model, by turns
    3  fit       16 GiB of device memory in all, against diffusers' leaf-wise group offloading
    4  disk      every layer from the disk, proved cold before each run; no host cache
    5  half      half of the model in the host cache, the rest on a cold disk
    6  first     a cold process to its first output, budgets by default
    7  tmpfs     every layer from files on tmpfs, staging of at most 1 GiB
    8  pinning   PinnedBuffer against cudaHostAlloc (bench_h2d)
    9  wrapper   everything resident: the wrapper against the plain model
    10 swap      host time of a unit, nothing to wait for
    11 leaf      leaf units from RAM: peak GPU memory
    12 busy      share of time in which the GPU computes in case 2
       resident  the plain model: the time that computing alone takes
       bits      streamed logits against the resident model's, bit for bit

A figure is a ratio: bytes that crossed the link while the clock ran (the difference of the engine's
counters, so what was prefetched before gains nothing) over the time of --passes forwards back to
back, from before the first to a synchronize after the last, over the link's ceiling, which is
sampled between the runs. What several cases need is loaded once; name them in one call. A case that
fails does not stop the others; the exit status is 1 then. A missed bar is no failure.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import bars
import harness
import torch
from cases import Case, find
from context import Context, Skipped
from harness import GIB
from shapes import parse_shape, parse_shapes

SHARED = ("streamed", "resident", "wrapped")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    from wsm_ext.sizes import parse_bytes

    def size(text: str) -> int:
        return parse_bytes(text, "size")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", default="resident,ram", help="comma-separated numbers or names")
    add("--folder", type=Path, required=True, help="where the checkpoint is, or is written")
    add("--disk-folder", type=Path, help="the same for the cases from disk (--folder)")
    add("--preset", default="70b")
    add("--layers", type=int, default=12)
    add("--shards", type=int, help="files of a checkpoint that is written (one a layer)")
    add("--disk-layers", type=int, help="of the checkpoint on the disk (--layers)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", type=parse_shapes, default="1x2048,1x1", help="BATCHxTOKENS, comma-separated")
    add("--disk-shapes", type=parse_shapes, default="1x2048", help="of the cases from disk")
    add("--compute-shape", type=parse_shape, default="8x2048", help="that is compute-bound")
    add("--passes", type=int, default=10, help="forwards in a run")
    add("--disk-passes", type=int, default=10, help="forwards in a run from the disk")
    add("--repeats", type=int, default=3, help="runs of each shape")
    add("--disk-repeats", type=int, default=3, help="runs from the disk")
    add("--units", default="auto")
    add("--arena-layers", type=float, default=2.0)
    add("--leaf-arena", type=size, default="1280MiB", help="arena of the case leaf")
    add("--home-bytes", type=size, help="device homes; none but embedding, norm and head, if unset")
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
    try:
        arguments.cases = find(arguments.case)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def run_case(case: Case, context: Context) -> dict[str, Any]:
    """Its results; {"skipped": why} or {"failed": why} where there are none."""
    begin = time.perf_counter()
    print(f"\n=== {case.number or '-'} {case.name}", flush=True)
    try:
        results = case.run(context)
    except Skipped as why:
        results = {"skipped": str(why)}
    except Exception as error:  # one case must not hide the others
        traceback.print_exc()
        results = {"failed": f"{type(error).__name__}: {error}"}
    results["case_s"] = time.perf_counter() - begin
    print(f"  took {results['case_s']:.1f} s", flush=True)
    return results


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    context = Context(arguments)
    records: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    failed = False
    for index, case in enumerate(arguments.cases):
        results = run_case(case, context)
        failed |= "failed" in results or not results.get("ok", True)
        if case.number:
            results["verdict"] = bars.judge(case.number, results)
            verdicts.append(results["verdict"])
        record = harness.result("forward", case.name, context.device, results)
        record["checkpoint"] = {
            "preset": arguments.preset,
            "layers": arguments.layers,
            "disk_layers": arguments.disk_layers or arguments.layers,
        }
        records.append(record)
        if arguments.json:
            harness.write_results(arguments.json, records)
        later = {name for other in arguments.cases[index + 1 :] for name in other.shares}
        context.drop(*(name for name in SHARED if name not in later))
    context.drop(*SHARED)
    if verdicts:
        header = ("case", "what", "figure", "bar", "verdict")
        harness.print_table("cases (bars are the H100's)", header, bars.rows(verdicts))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
