"""`make bench`: what this machine can run, small enough for any; one file of results for each part.

    python bench/local.py --programs build/release/bench --out build/bench

The C++ programs on a file of the disk under --out, the end-to-end cases on a small model, and how
costs grow. With a GPU the cases run on it. The bars are those of an H100 with layers of 70B shape:
on a small model, and on other machines, the verdicts say less than the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forward
import harness
import scaling
import shapes
import torch

LAYERS = 12
CASES = "ram,compute,disk,half,first,wrapper,swap"
GPU_CASES = CASES + ",pinning,leaf,busy"


def program(programs: Path, out: Path, name: str, device: torch.device, *words: str) -> None:
    """Runs a C++ benchmark and records what it found, with where and when."""
    binary = programs / name
    if not binary.is_file():
        print(f"{name}: not built (it needs nvcc)")
        return
    raw = out / f"{name}.part"
    print(f"\n=== {name}", flush=True)
    subprocess.run([str(binary), *words, "--json", str(raw)], check=True)
    results: dict[str, Any] = json.loads(raw.read_text())
    raw.unlink()
    record = harness.result(name, device.type, device, results)
    harness.write_results(out / f"{name}.json", [record])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=Path, required=True, help="folder of the C++ programs")
    parser.add_argument("--out", type=Path, required=True, help="for results; data beside them")
    parser.add_argument("--keep", action="store_true", help="keep the model")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, data = arguments.out, arguments.out / "data"
    model = data / "model"
    out.mkdir(parents=True, exist_ok=True)
    shapes.ensure_checkpoint(model, "demo", LAYERS, shards=1)
    file = str(model / "model.safetensors")
    try:
        program(arguments.programs, out, "bench_read", device, file, "--bytes-per-cell", "128MiB")
        pipeline = ("--unit-mb", "16", "--units", "16", "--staging-mb", "64")
        pipeline += ("--device", device.type)
        program(arguments.programs, out, "bench_pipeline", device, file, *pipeline)
        if device.type == "cuda":
            program(arguments.programs, out, "bench_h2d", device)
        else:
            program(arguments.programs, out, "bench_copy", device)
        words = ["--case", GPU_CASES if device.type == "cuda" else CASES, "--preset", "demo"]
        words += [
            "--layers",
            str(LAYERS),
            "--folder",
            str(model),
            "--json",
            str(out / "cases.json"),
        ]
        words += [
            "--shards",
            "1",
            "--staging",
            "64MiB",
            "--bench-read",
            str(arguments.programs / "bench_read"),
        ]
        words += ["--bytes-per-cell", "128MiB", "--shapes", "1x1,1x64", "--disk-shapes", "1x1"]
        words += ["--compute-shape", "2x128", "--passes", "3", "--leaf-arena", "96MiB"]
        status = forward.main(words)
        print("\n=== scaling", flush=True)
        status |= scaling.main(
            ["--folder", str(data / "scaling"), "--json", str(out / "scaling.json")]
        )
    finally:
        if not arguments.keep:
            shutil.rmtree(data, ignore_errors=True)
    print(f"\nresults: {', '.join(sorted(path.name for path in out.glob('*.json')))} in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
