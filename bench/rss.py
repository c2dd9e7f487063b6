"""Peak memory of a process that prefills a checkpoint four times larger than its host memory.

    python bench/rss.py --folder DISK/llama-rss --json rss.json

Measured from outside the process, by its parent. The peak is the kernel's own (VmHWM of
/proc/PID/status, reset after the imports), so nothing falls between two samples; RssAnon, RssShmem
and RssFile are sampled beside it to show what it consists of. The bar, on the host device, where
the arena is RAM as well: memory after the imports + host memory + device memory + 200 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import shapes
import torch

MB = 1_000_000
ALLOWANCE_BYTES = 200 * MB
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
CHILD_LIMIT_S = 900


def status_bytes(text: str) -> dict[str, int]:
    """The fields of /proc/PID/status that count memory, in bytes; those that are there."""
    out = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in FIELDS:
            number, unit = value.split()
            if unit != "kB":
                raise ValueError(f"{name} is counted in {unit}, not in kB")
            out[name] = int(number) * 1024
    return out


def limit_bytes(base: int, host_memory: int, device_memory: int) -> int:
    return base + host_memory + device_memory + ALLOWANCE_BYTES


def child(arguments: argparse.Namespace) -> int:
    """Imports, says so, waits for the word, prefills, says so, waits to be looked at."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import wsm_ext as wsm

    print("imported", flush=True)
    sys.stdin.readline()
    model = wsm.from_pretrained(
        arguments.folder,
        device="cpu",
        device_memory=arguments.device_memory,
        host_memory=arguments.host_memory,
        units=arguments.units,
    )
    with model, torch.inference_mode():
        ids = torch.arange(arguments.tokens).reshape(1, -1)
        for _ in range(arguments.passes):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        totals = model.stats()["totals"]
        print(f"done {totals['disk_bytes']} {totals['h2d_bytes']}", flush=True)
        sys.stdin.readline()
    return 0


class Watched:
    """The child, and what its status says."""

    def __init__(self, words: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.proc = Path("/proc", str(self.process.pid))

    def memory(self) -> dict[str, int]:
        return status_bytes((self.proc / "status").read_text())

    def reset_peak(self) -> None:
        (self.proc / "clear_refs").write_text("5")

    def expect(self, word: str) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line.startswith(word):
            self.process.kill()
            raise RuntimeError(f"the child ended before it said {word!r}; it said {line!r}")
        return line

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def watch(words: list[str]) -> dict[str, Any]:
    """Memory after the imports, the peak after them, and the highest sample of each part."""
    import threading

    watched = Watched(words)
    watched.expect("imported")
    base = watched.memory()
    watched.reset_peak()
    highest: dict[str, int] = {}
    finished = threading.Event()

    def sample() -> None:
        deadline = time.monotonic() + CHILD_LIMIT_S
        while not finished.wait(0.02):
            if time.monotonic() > deadline:
                watched.process.kill()
                return
            try:
                now = watched.memory()
            except OSError:
                return
            for name, value in now.items():
                highest[name] = max(highest.get(name, 0), value)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        watched.go_on()
        done = watched.expect("done")
        peak = watched.memory()["VmHWM"]
        watched.go_on()
        if watched.process.wait(timeout=60):
            raise RuntimeError(f"the child failed with status {watched.process.returncode}")
    finally:
        finished.set()
        sampler.join()
        watched.process.kill()
    disk, h2d = (int(word) for word in done.split()[1:])
    return {
        "after_imports": base,
        "peak_bytes": peak,
        "highest_samples": highest,
        "disk_bytes": disk,
        "h2d_bytes": h2d,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--preset", default="demo")
    add("--layers", type=int, default=40)
    add("--host-memory", type=int, help="bytes; a quarter of the checkpoint if not given")
    add("--device-memory", type=int, help="bytes; four layers and the ends if not given")
    add("--units", default="auto")
    add("--tokens", type=int, default=64)
    add("--passes", type=int, default=2)
    add("--json", type=Path)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    import wsm_ext as wsm

    arguments = parse_arguments()
    if arguments.child:
        return child(arguments)
    shapes.ensure_checkpoint(arguments.folder, arguments.preset, arguments.layers)
    sizes = shapes.measure_checkpoint(wsm.Checkpoint.open(arguments.folder))
    host = arguments.host_memory or sizes.model_bytes // 4
    device = arguments.device_memory or 4 * sizes.layer_place_bytes + sizes.ends_place_bytes
    words = ["--folder", str(arguments.folder), "--host-memory", str(host)]
    words += ["--device-memory", str(device), "--units", arguments.units]
    words += ["--tokens", str(arguments.tokens), "--passes", str(arguments.passes)]
    results = watch(words)
    base = results["after_imports"]["VmRSS"]
    limit = limit_bytes(base, host, device)
    results |= {
        "measure": "VmHWM of /proc/PID/status, reset after the imports",
        "checkpoint_bytes": sizes.model_bytes,
        "host_memory_bytes": host,
        "device_memory_bytes": device,
        "limit_bytes": limit,
        "over_budget_bytes": results["peak_bytes"] - base - host - device,
        "ok": results["peak_bytes"] <= limit and sizes.model_bytes >= 4 * host,
    }
    rows = [
        (name, f"{value / MB:.0f} MB")
        for name, value in (
            ("checkpoint", sizes.model_bytes),
            ("after imports (VmRSS)", base),
            ("host memory", host),
            ("device memory", device),
            ("peak (VmHWM)", results["peak_bytes"]),
            ("limit", limit),
        )
    ]
    harness.print_table("peak memory of a prefill", ("what", "size"), rows)
    print(f"  {'within' if results['ok'] else 'OVER'} the limit")
    if arguments.json:
        record = harness.result("rss", "prefill", torch.device("cpu"), results)
        harness.write_results(arguments.json, [record])
    return int(not results["ok"])


if __name__ == "__main__":
    sys.exit(main())
