"""Cases against the resident model in the same process: 2 and 12 compute-bound, 9 the wrapper."""

from __future__ import annotations

import statistics
from typing import Any

import harness
import torch
from context import Context, describe
from cuptitrace import busy_share, record
from passes import alternate, forwards, gpu_memory, timed_passes

PROFILED_PASSES = 3
WRAPPER_ROUNDS = 20


def resident(context: Context) -> dict[str, Any]:
    """The plain model on the device: the time that computing alone takes."""
    model = context.resident()
    rows, runs = [], {}
    for batch, tokens in context.arguments.shapes:
        ids = context.ids(batch, tokens)
        timed_passes(model, ids, 2)
        passes = context.arguments.passes
        repeats = range(context.arguments.repeats)
        seconds = harness.summary([timed_passes(model, ids, passes) / passes for _ in repeats])
        runs[f"{batch}x{tokens}"] = {"seconds_per_pass": seconds}
        rows.append((f"{batch}x{tokens}", f"{seconds['median']:.4f}"))
    harness.print_table("resident", ("shape", "s/pass"), rows)
    return {"runs": runs, "gpu_memory": gpu_memory(context.device)}


def compute_bound(context: Context) -> dict[str, Any]:
    """Computing takes longer than the copies: streaming should cost nothing."""
    batch, tokens = context.arguments.compute_shape
    ids, passes = context.ids(batch, tokens), context.arguments.passes
    plain, streamed = context.resident(), context.streamed()
    for model in (plain, streamed):
        timed_passes(model, ids, 2)
    seconds = alternate(
        {
            "resident": lambda: timed_passes(plain, ids, passes) / passes,
            "streamed": lambda: timed_passes(streamed, ids, passes) / passes,
        },
        context.arguments.repeats,
    )
    figure = median_ratio(seconds["streamed"], seconds["resident"])
    print_pair(f"compute-bound, {batch}x{tokens}", seconds, figure)
    return {
        "seconds_per_pass": {name: harness.summary(some) for name, some in seconds.items()},
        "shape": f"{batch}x{tokens}",
        "gpu_memory": gpu_memory(context.device),
        **describe(streamed, context.ram_source),
        "figure": figure,
    }


def busy(context: Context) -> dict[str, Any]:
    """The share of time in which a kernel runs, while case 2's streamed passes do."""
    context.need_cuda("CUPTI times kernels on a GPU")
    batch, tokens = context.arguments.compute_shape
    ids, model = context.ids(batch, tokens), context.streamed()
    timed_passes(model, ids, 2)
    events = record(lambda: forwards(model, ids, PROFILED_PASSES))
    share = busy_share(events)
    print(f"\nGPU busy {share['share']:.4f} of {share['wall_us'] / 1e6:.3f} s")
    return {**share, "passes": PROFILED_PASSES, "figure": share["share"]}


def wrapper(context: Context) -> dict[str, Any]:
    """Everything has a home on the device: the streamed model against the plain one."""
    plain, wrapped = context.resident(), context.wrapped()
    ids, passes = context.ids(1, 1), context.arguments.passes
    for model in (plain, wrapped):
        timed_passes(model, ids, 3)
    with torch.inference_mode():
        wanted, got = (m(input_ids=ids, use_cache=False).logits for m in (plain, wrapped))
    seconds = alternate(
        {
            "plain": lambda: timed_passes(plain, ids, passes) / passes,
            "wrapped": lambda: timed_passes(wrapped, ids, passes) / passes,
        },
        WRAPPER_ROUNDS,
    )
    figure = median_ratio(seconds["wrapped"], seconds["plain"])
    print_pair("everything resident, 1x1", seconds, figure)
    return {
        "seconds_per_pass": {name: harness.summary(some) for name, some in seconds.items()},
        "figure": figure,
        "conditions": {"other bits than the plain model's": torch.equal(wanted, got)},
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def print_pair(title: str, seconds: dict[str, list[float]], figure: float) -> None:
    rows = [
        (name, f"{statistics.median(some):.5f}", f"{min(some):.5f}", f"{max(some):.5f}")
        for name, some in seconds.items()
    ]
    harness.print_table(title, ("model", "s/pass", "min", "max"), rows)
    print(f"  ratio {figure:.4f}")
