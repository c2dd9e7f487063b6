"""Forwards back to back, what was counted while they ran, and what memory they took."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import torch
from harness import GB

TOTALS = ("disk_bytes", "disk_read_bytes", "h2d_bytes")
CAUSES = ("disk", "h2d", "arena")


@torch.inference_mode()
def forwards(model: Any, ids: torch.Tensor, passes: int) -> None:
    """Back to back; the device is idle afterwards."""
    for _ in range(passes):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    harness.synchronize(ids.device)


def timed_passes(model: Any, ids: torch.Tensor, passes: int) -> float:
    """Seconds from before the first forward until the device is idle."""
    harness.synchronize(ids.device)
    begin = time.perf_counter()
    forwards(model, ids, passes)
    return time.perf_counter() - begin


def alternate(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of each by turns, the order reversed every round: a drift hits all alike."""
    out: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in list(runs)[:: -1 if index % 2 else 1]:
            out[name].append(runs[name]())
    return out


def totals_difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between two stats(): bytes by link, stalls by cause."""
    out: dict[str, Any] = {
        key: after["totals"].get(key, 0) - before["totals"].get(key, 0) for key in TOTALS
    }
    stalls = [stats["totals"]["stall_seconds"] for stats in (before, after)]
    out["stall_seconds"] = {cause: stalls[1][cause] - stalls[0][cause] for cause in CAUSES}
    return out


def counted_passes(model: Any, ids: torch.Tensor, passes: int) -> dict[str, Any]:
    """One run: seconds, and what was counted in it. Nothing comes between counters and clock."""
    harness.synchronize(ids.device)
    before = model.stats()
    begin = time.perf_counter()
    forwards(model, ids, passes)
    seconds = time.perf_counter() - begin
    after = model.stats()
    return {"seconds": seconds, "passes": passes, **totals_difference(before, after)}


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def gpu_memory(device: torch.device) -> dict[str, int] | None:
    """Torch's peak, what its allocator reserved, and what the whole device uses by NVML."""
    if device.type != "cuda":
        return None
    out = {
        "torch_peak_bytes": torch.cuda.max_memory_allocated(device),
        "torch_reserved_bytes": torch.cuda.memory_reserved(device),
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        out["nvml_used_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception as error:  # NVML's errors have no common base that exists without it
        free, total = torch.cuda.mem_get_info(device)
        out["device_used_bytes"] = total - free
        print(f"NVML does not answer ({error}); the CUDA runtime's figure stands in")
    return out


def outside_torch(device: torch.device) -> int:
    """Bytes on the device that torch's allocator does not know: the context, libraries."""
    ones = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    (ones @ ones).sum().item()  # loads what a first product loads
    memory = gpu_memory(device)
    if memory is None:
        return 0
    used = memory.get("nvml_used_bytes", memory.get("device_used_bytes", 0))
    return used - memory["torch_reserved_bytes"]


def run_ratios(runs: list[dict[str, Any]], key: str, ceiling: float) -> dict[str, Any]:
    """Medians over the runs of one shape, and the ratio to the ceiling."""
    rates = harness.summary([run[key] / run["seconds"] / GB for run in runs])
    return {
        "seconds_per_pass": harness.summary([run["seconds"] / run["passes"] for run in runs]),
        "GB_per_s": rates,
        "bytes_per_pass": harness.summary([run[key] / run["passes"] for run in runs])["median"],
        "ratio": harness.bandwidth_ratio(rates["median"] * GB, 1.0, ceiling),
        "runs": runs,
    }
